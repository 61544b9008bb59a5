"""What sampling asks of the native library, against numpy, and that sampling with it chooses the same tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ridgeline.engine.sampler import sample_plan
from ridgeline.engine.scheduler import PlanRow, SamplingRow
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.library import ISAS
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.recorder import Recorder
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight
from ridgeline.sampling_params import SamplingParams

LAYOUT = CacheLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32", block_size=32, num_blocks=1)


@pytest.fixture(scope="module", params=ISAS)
def native(request, available_isas):
    if request.param not in available_isas:
        pytest.skip(f"this machine does not run {request.param}")
    recorder = Recorder()
    table = Weight("table", FORMATS["F32"], (2, 16), {"data": np.zeros((2, 16), np.float32)})
    program = recorder.program(recorder.embed(recorder.bind(table), None))
    made = NativeProgram(program, LAYOUT, max_tokens=1, max_logits=1, num_threads=2, isa=request.param)
    yield made
    made.close()


def logits_of(rows: int, columns: int, *, ties: bool = False) -> np.ndarray:
    logits = np.random.default_rng(columns).standard_normal((rows, columns)).astype(np.float32) * 4
    return np.round(logits) if ties else logits


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 511, 4096, 4097, 49152])
@pytest.mark.parametrize("ties", [False, True])
def test_greedy_is_argmax_and_log_sum_exp(native, columns, ties):
    logits = logits_of(3, columns, ties=ties)
    best, largest, log_total = native.greedy(logits)
    np.testing.assert_array_equal(best, logits.argmax(-1))
    np.testing.assert_array_equal(largest, logits.max(-1))
    exact = logits.astype(np.float64)
    expected = exact.max(-1) + np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1))
    np.testing.assert_allclose(log_total, expected, rtol=0, atol=2e-6)


def test_greedy_is_the_same_whatever_the_threads_and_the_batch(native):
    logits = logits_of(5, 10000)
    together = native.greedy(logits)
    for row in range(5):
        for both, alone in zip(together, native.greedy(logits[row : row + 1]), strict=True):
            assert both[row] == alone[0]


@pytest.mark.parametrize("at", [0, 15, 16, 4095, 4096, 4999])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_greedy_refuses_what_is_no_distribution(native, at, bad):
    logits = logits_of(2, 5000)
    logits[1, at] = bad
    best = native.greedy(logits)[0]
    assert best[0] == logits[0].argmax() and best[1] == -1


def test_greedy_takes_minus_infinity_as_impossible(native):
    logits = logits_of(1, 9000)
    logits[0, :4096] = -np.inf
    best, _, log_total = native.greedy(logits)
    assert best[0] == logits[0].argmax() and np.isfinite(log_total[0])
    assert native.greedy(np.full((1, 40), -np.inf, np.float32))[0][0] == -1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 7, 256, 3000])
def test_top_k_is_a_stable_sort(native, count, ties):
    for columns in (5, 40, 1000):
        logits = logits_of(1, columns, ties=ties)[0]
        order = np.argsort(-logits, kind="stable")[:count]
        ids, values = native.top_k(logits, count)
        np.testing.assert_array_equal(ids, order)
        np.testing.assert_array_equal(values, logits[order])


KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sampling_with_the_library_chooses_what_numpy_chooses(native, kind, ties):
    logits = logits_of(40, 3000, ties=ties)
    rows = []
    for i in range(len(logits)):
        sampling = SamplingRow(SamplingParams(**kind), 7 + i, i, prompt_token_ids=(1, 2, 3))
        rows.append(PlanRow(f"r{i}", (0,), 0, (0,), 1, samples=True, sampling=sampling))
    expected, found = sample_plan(logits, rows), sample_plan(logits, rows, native)
    for name, theirs in expected.items():
        assert replace(found[name], logprob=theirs.logprob) == theirs
        assert found[name].logprob == pytest.approx(theirs.logprob, abs=2e-6)
