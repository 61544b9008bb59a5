"""The prediction is put together from known rates, so with made-up rates it can be computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace

import pytest

from ridgeline.cli.main import main as ridgeline
from ridgeline.config import EngineConfig
from ridgeline.errors import ConfigError
from ridgeline.models.load import describe_model
from ridgeline.models.synth import synthesize
from ridgeline.ops.program import Opcode, StepShape
from ridgeline.profiling.machine import MachineLimits
from ridgeline.profiling.rates import (
    ATTENTION_GRID,
    COLUMNS,
    FEW_TOKENS,
    MANY_TOKENS,
    ROWS,
    AttentionRate,
    EngineRate,
    LinearRate,
    scored_pairs,
    set_of,
)
from ridgeline.profiling.roofline import Predictor

LIMITS = MachineLimits(
    name="made up",
    num_threads=2,
    isa="generic",
    read=((2**18, 10.0), (2**29, 10.0)),
    read_one_thread=(),
    fp32_gflop_s=50.0,
    int8_gop_s=200.0,
    int16_gop_s=100.0,
    barrier_s=0.0,
    measured="never",
)


class Rates:
    """A weight takes 1 ns and another for each 8 tokens; everything else has a price of its own."""

    def linear(self, format, *, among):
        tokens = FEW_TOKENS + MANY_TOKENS
        return {t: LinearRate(1e-6, t * 1e-9, t * 2e-9, (1 + t / 8) * 1e-9) for t in tokens}

    def attention(self, **kernel):
        return {(new, seqs): AttentionRate(new * seqs * 1e-7, 1e-9) for new, seqs in ATTENTION_GRID}

    def shared_pair_s(self, **kernel):
        return 0.25e-9

    def element_s(self, kind):
        return 0.0

    def engine(self, *, among):
        return EngineRate((1e-4, 1e-4, 2e-4), 1e-5, 0.0)


def main(arguments):
    """Run a command that must end well."""
    with pytest.raises(SystemExit) as end:
        ridgeline(arguments)
    if end.value.code:
        raise end.value


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return synthesize(
        "smollm2-135m", "Q4_0", path=tmp_path_factory.mktemp("m") / "tiny.gguf", num_layers=2, vocab_size=512
    )


@pytest.fixture(scope="module")
def config(model_path):
    return EngineConfig.from_options(
        str(model_path), executor="native", max_model_len=512, kv_cache_tokens=1024
    )


def predictor(model_path, config, rates=None):
    return Predictor.for_model(describe_model(model_path), config, LIMITS, rates)


def test_a_decode_step_is_the_sum_of_its_rates(model_path, config):
    p = predictor(model_path, config, Rates())
    linears = [i for i in p.program.instructions if i.opcode is Opcode.LINEAR]
    matrices = [p.program.weights[w] for i in linears for w in i.matrices]
    num_weights = sum(w.num_elements for w in matrices)
    calls = sum(1e-6 + p.program.buffers[i.read_buffers[0]].columns * 1e-9 for i in linears)
    calls += sum(w.shape[0] for w in matrices) * 2e-9
    heads = describe_model(model_path).config.num_kv_heads
    attention = 2 * heads * (1e-7 + 64 * 1e-9)
    expected = num_weights * 1.125e-9 + calls + attention + 1.1e-4
    others = sum(
        e.predicted_s
        for e in p.estimates(StepShape.decode(1, 64))
        if not e.name.startswith(("linear", "attention"))
    )
    assert p.decode_s(1, 64) == pytest.approx(expected + others, rel=1e-9)
    assert others < 1e-6


@pytest.mark.parametrize(("window", "num_sinks"), [(None, 0), (1, 0), (50, 0), (64, 4), (100, 40)])
@pytest.mark.parametrize(("num_new", "length"), [(1, 1), (1, 32), (1, 33), (1, 500), (40, 40), (70, 300)])
def test_keys_are_scored_by_whole_tiles(num_new, length, window, num_sinks):
    touched = 0
    for query in range(length - num_new, length):
        keys = range(query + 1)
        seen = [k for k in keys if window is None or k > query - window or k < num_sinks]
        touched += 32 * len({k // 32 for k in seen})
    assert scored_pairs(num_new, length, window=window, num_sinks=num_sinks) == touched


def test_ragged_sequences_take_as_long_as_their_tiles(model_path, config):
    p = predictor(model_path, config, Rates())
    ragged = [(1, 40), (1, 300), (1, 65), (1, 96)]  # 2, 10, 3 and 3 tiles
    assert p.step_s(ragged, 4) == pytest.approx(p._step_s(StepShape(tuple(ragged), 4)), rel=1e-9)
    assert p.step_s(ragged, 4) < p.step_s([(1, 160)] * 4, 4)


def test_pages_that_another_sequence_reads_cost_less(model_path, config):
    p = predictor(model_path, config, Rates())
    alone, shared = p.step_s([(1, 320)] * 4, 4), p.step_s([(1, 320)] * 4, 4, num_shared_keys=3 * 320)
    pairs, heads, layers = 4 * 320, p._layout.num_kv_heads, p._layout.num_layers
    assert alone - shared == pytest.approx(0.75 * (1 - 0.25) * 1e-9 * pairs * heads * layers, rel=1e-6)


def test_matrices_are_among_all_bytes_of_a_step(model_path, config):
    sets, coarse = [], []

    class Asked(Rates):
        def linear(self, format, *, among):
            sets.append(among)
            return super().linear(format, among=among)

        def attention(self, *, among, **kernel):
            coarse.append(among)
            return super().attention(**kernel)

        def engine(self, *, among):
            coarse.append(among)
            return super().engine(among=among)

    p = predictor(model_path, config, Asked())
    p._model_bytes = 2**25
    p.step_s([(1, 32)], 1)
    assert set(sets) == set(coarse) == {2**25}
    token_bytes = p._layout.num_layers * p._kv_token_bytes
    length = 32 * (
        2**20 // token_bytes
    )  # of sixteen sequences: 2**29 bytes and the weights, more than the largest set
    p.step_s([(1, length)] * 16, 16)
    assert set(sets) == {2**25, 2**29}
    p.step_s([(1, length)] * 16, 16, num_shared_keys=16 * length)
    assert set(sets) == {2**25, 2**29}, "shared pages are read once"
    assert set(coarse) == {2**25, 2**29}
    assert [set_of(n) for n in (1, 2**27, int(1.15 * 2**27), 2**40)] == [2**24, 2**27, int(2**27.25), 2**29]
    assert [set_of(n, parts=2) for n in (2**27, int(1.15 * 2**27), int(1.8 * 2**27))] == [2**27, 2**27, 2**28]


def test_a_rate_is_found_from_the_times_of_four_matrices():
    law = LinearRate(2e-6, 3e-9, 5e-9, 7e-12)
    corners = {(r, c): LinearRate.seconds([(law, r)], c) for r in ROWS for c in COLUMNS}
    found = LinearRate.of_corners(corners)
    assert astuple(found) == pytest.approx(astuple(law), rel=1e-6)
    assert LinearRate.seconds([(found, 100), (law, 28)], 576) == pytest.approx(
        2e-6 + 576 * 3e-9 + 128 * 5e-9 + 128 * 576 * 7e-12, rel=1e-6
    )
    assert LinearRate.seconds([(LinearRate(-1.0, 0.0, 0.0, 0.0), 1)], 1) == 0.0


def test_activations_come_from_where_what_is_read_between_fits(model_path, config):
    model, batch = describe_model(model_path), StepShape(((1, 32),) * 16, 16)
    even = Predictor.for_model(model, config, LIMITS, Rates())
    steep = replace(LIMITS, read=((2**18, 1000.0), (2**20, 1000.0), (2**21, 10.0), (2**29, 10.0)))
    far = Predictor.for_model(model, config, steep, Rates())
    far._model_bytes = even._model_bytes = 2**25
    o_proj = "linear Q4_0 576 x 576"
    cheap, dear = ({e.name: e for e in p.estimates(batch)}[o_proj] for p in (even, far))
    moved = 4 * 4 * 576 * 16  # input, residual, and output twice
    assert far._moved_bytes(batch) / 2 > 2**21
    assert dear.predicted_s - cheap.predicted_s == pytest.approx(
        2 * moved * (1 / 10 - 1 / 1000) / 1e9, rel=1e-3
    )


def test_the_engine_takes_longer_after_longer_steps():
    rate = EngineRate((1e-4, 2e-4, 5e-4), 1e-5, 1e-9)
    assert rate.seconds(1, 1, 0) == pytest.approx(1.1e-4)
    assert rate.seconds(4, 4, 1000) == pytest.approx(1.5e-4 + 4e-5 + 1e-6)
    assert rate.seconds(4096, 0, 0) == pytest.approx(5e-4)


def test_a_prompt_is_the_sum_of_its_chunks(model_path, config):
    p = predictor(model_path, config, Rates())
    parts = p.step_s([(200, 200)], 0) + p.step_s([(100, 300)], 1)
    assert p.prefill_s(300, chunk=200) == pytest.approx(parts)


def test_more_tokens_than_measured_go_on_in_proportion(model_path, config):
    p = predictor(model_path, config, Rates())
    largest = MANY_TOKENS[-1]
    kinds = {e.name: e.predicted_s for e in p.estimates(StepShape(((largest, largest),), 0))}
    twice = {e.name: e.predicted_s for e in p.estimates(StepShape(((2 * largest, 2 * largest),), 0))}
    for name, seconds in kinds.items():
        if name.startswith("linear") and seconds > 1e-5:  # not the head, which has no rows here
            assert twice[name] == pytest.approx(2 * seconds, rel=1e-6)


def test_the_bound_is_bytes_or_flops_over_the_limit(model_path, config):
    p = predictor(model_path, config)
    for shape in (StepShape.prefill(256), StepShape.decode(1, 64)):
        estimates = p.estimates(shape)
        assert sum(e.flops for e in estimates) == p.program.flops(shape)
        layer_bytes = describe_model(model_path).config.num_kv_heads * 64 * 2 * 2
        assert sum(e.num_bytes for e in estimates) == p.program.bytes(shape, kv_token_bytes=layer_bytes)
        for e in estimates:
            peak = 200 if "Q4_0" in e.name else 100 if "Q8_0" in e.name else 50
            compute = e.flops / peak / 1e9
            assert e.predicted_s is None
            memory = e.num_bytes / 10 / 1e9
            assert math.isclose(e.bound_s, max(compute, memory)) and e.is_compute_bound == (compute > memory)
    assert any(e.is_compute_bound for e in p.estimates(StepShape.prefill(256)))
    assert not any(e.is_compute_bound for e in p.estimates(StepShape.decode(1, 64)) if "linear" in e.name)


def test_a_described_model_is_predicted_in_another_dtype(model_path, config):
    stored = Predictor.for_model(describe_model(model_path), config, LIMITS, None)
    wide = Predictor.for_model(describe_model(model_path), config.with_options(dtype="float32"), LIMITS, None)
    matrices = [w for w in wide.program.weights if len(w.shape) > 1]
    assert {w.format.name for w in matrices} == {"F32"}
    assert wide.program.weight_bytes() > 4 * stored.program.weight_bytes()


def test_only_native_is_predicted(model_path, config):
    with pytest.raises(ConfigError, match="cannot be predicted"):
        predictor(model_path, config.with_options(executor="eager"), Rates())


def test_the_command_compares_with_a_described_device(model_path, capsys):
    main(["roofline", "-m", str(model_path), "--device", "h100", "--prompt-len", "64", "--json"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["limits"]["name"].startswith("NVIDIA H100")
    assert [entry["prompt_len"] for entry in document["grid"]["ttft"]] == [32, 64, 128, 512]
    main(["roofline", "-m", str(model_path), "--device", "h100"])
    assert "FLOPs per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt-len", "0"), "at least 1"),
        (("--plot", "r.gif"), "png or .svg"),
        (("--measure", "--device", "h100"), "only this machine"),
    ],
)
def test_impossible_requests_are_refused(model_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        main(["roofline", "-m", str(model_path), *flags])
