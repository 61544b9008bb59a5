"""Measuring a tiny model, how often it is repeated, and the pure part of scripts/bench_peers.py."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ridgeline.bench.drive import drive
from ridgeline.bench.latency import METRICS as LATENCY_METRICS
from ridgeline.bench.latency import LatencyOptions, measure_latency, time_batch
from ridgeline.bench.repeat import RepeatOptions, precision, repeat
from ridgeline.bench.result import check_document, load_document
from ridgeline.bench.startup import METRICS as STARTUP_METRICS
from ridgeline.bench.startup import start_once
from ridgeline.bench.throughput import WorkloadOptions, measure_throughput
from ridgeline.bench.workload import Fixed, Gamma, Uniform, Workload
from ridgeline.cli.bench import result_table
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError, RidgelineError
from ridgeline.models.synth import synthesize
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("bench_peers", ROOT / "scripts/bench_peers.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_peers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return synthesize("tiny-llama", "Q8_0", path=tmp_path_factory.mktemp("bench") / "m.gguf")


@pytest.fixture(scope="module")
def config(model_path):
    return EngineConfig.from_options(str(model_path), num_threads=1)


FAST = RepeatOptions(num_iters=5, num_iters_warmup=1, max_time=0)


def test_a_batch_has_the_samples_of_every_request():
    llm = LLMEngine(EngineConfig.from_options("tiny", max_model_len=128), tiny_model("llama"), None)
    workload = LatencyOptions(input_len=40, output_len=5, batch_size=3).workload()
    found = time_batch(llm, workload, 0)
    assert [len(found[name]) for name in LATENCY_METRICS] == [1, 1, 3, 3, 3]
    assert max(found["ttft_ms"]) == pytest.approx(1e3 * 120 / found["prefill_tok_s"][0])
    for ttft, tpot, e2el in zip(found["ttft_ms"], found["tpot_ms"], found["e2el_ms"], strict=True):
        assert 0 < ttft < e2el == pytest.approx(ttft + 4 * tpot)
    found = time_batch(llm, LatencyOptions(input_len=4, output_len=1).workload(), 0)
    assert found["decode_tok_s"] == found["tpot_ms"] == []
    llm.close()


def test_latency_is_a_document(config):
    seen = []
    document = measure_latency(
        config,
        LatencyOptions(input_len=8, output_len=3, batch_size=2),
        FAST,
        progress=lambda done, total, known: seen.append((done, total)),
    )
    check_document(document, "here")
    assert document["seeds"] == [0, 1, 2, 3, 4] and seen[-1] == (5, 5)
    ttft = document["metrics"]["ttft_ms"]
    assert ttft["n"] == 10 and ttft["rounds"] == [2] * 5 and ttft["ci95"] is not None
    assert document["metrics"]["tpot_ms"]["missing"] == {"p95": 10, "p99": 90}
    assert document["settings"]["max_model_len"] == 11 and document["settings"]["input_len"] == 8
    assert set(document["details"]["definitions"]) == set(document["metrics"])
    assert "5 iterations after 1 warm-ups" in result_table(document)


def test_throughput_runs_the_workload_with_new_words(config):
    workload = Workload(
        name="mixed",
        num_requests=6,
        prompt_lens=Uniform(40, 60),
        output_lens=Uniform(2, 4),
        arrivals=Gamma(200.0),
        max_concurrency=3,
    )
    document = measure_throughput(config, workload, FAST)
    check_document(document, "here")
    requests = workload.requests(vocab_size=9, seed=0)
    num_output = sum(r.max_tokens for r in requests)
    metrics = document["metrics"]
    assert metrics["e2el_ms"]["n"] == 30 and metrics["itl_ms"]["n"] == 5 * (num_output - 6)
    share = metrics["output_throughput"]["samples"][0] / metrics["request_throughput"]["samples"][0]
    assert share == pytest.approx(num_output / 6)
    assert document["details"]["num_cached_tokens"] == 0


def test_a_shared_prefix_is_cached_and_a_conversation_takes_turns(config):
    llm = LLMEngine.from_config(config)
    lengths = {"prompt_lens": Fixed(32), "output_lens": Fixed(32)}
    workload = Workload(name="talk", num_requests=6, turns=3, **lengths)
    times = drive(llm, workload.requests(vocab_size=256, seed=0))
    assert [len(r.request.prompt_token_ids) for r in times] == [32, 96, 160] * 2
    for before, after in zip(times, times[1:], strict=False):
        if after.request.turn:
            assert after.arrival_s >= before.token_times[-1]
            assert after.num_cached_tokens >= 32
    llm.close()


def test_a_start_is_timed_in_its_own_process(config):
    figures = start_once(config)
    assert set(figures) == set(STARTUP_METRICS)
    parts = figures["import_s"] + figures["load_s"] + figures["first_token_s"]
    assert 0 < parts < figures["process_s"]
    assert 2e7 < figures["peak_memory_bytes"] < 1e9
    with pytest.raises(RidgelineError, match="no-such-model"):
        start_once(EngineConfig.from_options("no-such-model.gguf"))


def test_repeating_goes_on_until_the_medians_are_known():
    """Noise of 20 % needs far more than five iterations for an interval of 5 %."""
    rng = random.Random(0)
    options = RepeatOptions(num_iters=5, num_iters_warmup=0, max_time=60)
    noisy = repeat(lambda seed: {"x": [rng.gauss(10, 2)]}, options, seed=7, kinds={"x": ("s", "lower")})
    assert noisy.stopped == "precise" and len(noisy.seeds) > 20 and noisy.seeds[:2] == (7, 8)
    assert precision(noisy.metrics[0]) <= 0.05
    details = noisy.details()
    low, high = details["intervals_in_turns"]["x"]
    assert low < 10.2 and high > 9.8 and (high - low) / 2 / 10 < 0.06
    assert len(details["started_at"]) == len(noisy.seeds) and details["started_at"] == sorted(
        details["started_at"]
    )
    steady = repeat(lambda seed: {"x": [1.0], "y": []}, options, seed=0, kinds={"x": ("s", "lower")})
    assert len(steady.seeds) == 5
    late = repeat(
        lambda seed: {"x": [rng.gauss(10, 5)]},
        RepeatOptions(num_iters=5, max_time=0),
        seed=0,
        kinds={"x": ("s", "lower")},
    )
    assert late.stopped == "time" and len(late.seeds) == 5


def test_warm_ups_go_on_while_they_get_faster(monkeypatch):
    clock = iter([0, 10, 10, 15, 15, 17, 17, 19, *[20] * 50])
    # A clock of this module's own: threads of other tests read the real one.
    own = SimpleNamespace(monotonic=lambda: float(next(clock)), time=lambda: 0.0)
    monkeypatch.setattr("ridgeline.bench.repeat.time", own)
    found = repeat(
        lambda seed: {"x": [1.0]},
        RepeatOptions(num_iters=5, num_iters_warmup=2),
        seed=0,
        kinds={"x": ("s", "lower")},
    )
    assert found.num_warmups == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepeatOptions(num_iters=4), "--num-iters 4: an interval needs at least 5"),
        (lambda: RepeatOptions(num_iters_warmup=-1), "expected 0 or more"),
        (lambda: LatencyOptions(batch_size=0), "--batch-size 0: expected at least 1"),
        (
            lambda: LatencyOptions(batch_size=33).config(EngineConfig(model="m")),
            "more than --max-num-seqs 32",
        ),
        (
            lambda: LatencyOptions().config(EngineConfig(model="m", max_model_len=9)),
            "requests have 640 tokens",
        ),
        (lambda: WorkloadOptions(workload="w9").chosen(), "names: w1"),
        (lambda: WorkloadOptions(request_rate=0).chosen(), "rate=0"),
    ],
)
def test_a_mistake_is_explained(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_latency_as_a_process_ends_with_json(model_path):
    command = [sys.executable, "-m", "ridgeline.bench.latency", str(model_path)]
    command += ["--prompt-len", "8", "--output-len", "3", "--reps", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    samples = json.loads(done.stdout)
    assert len(samples["decode_tok_s"]) == len(samples["prefill_tok_s"]) == 2


def test_the_command_ends_with_the_document_it_saves(model_path, tmp_path):
    run = [sys.executable, "-c", "import sys; from ridgeline.cli.bench import bench; bench(sys.argv[1:])"]
    saved = tmp_path / "a.json"
    options = ["--input-len", "8", "--output-len", "3", "--num-iters", "5", "--save-result", str(saved)]
    done = subprocess.run(
        [*run, "latency", "-m", str(model_path), *options, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == load_document(saved)
    assert "result written to" in done.stderr


def row(peers, **fields):
    return peers.Row(**({"name": "r", "title": "a row", "kind": "prefill", "model": "q4_0"} | fields))


@pytest.mark.parametrize(
    ("fields", "peer", "ours", "met"),
    [
        ({"bar": 2.0}, [10, 11, 9], [20, 30, 19], True),
        ({"bar": 2.0}, [10, 11, 9], [19, 30, 18], False),
        ({"kind": "w4", "bar": 8.0}, [16], [2.1], False),
        ({"kind": "w4", "bar": 8.0}, [17], [2.1], True),
        ({"kind": "start", "absolute_bar": 0.6}, [], [0.61, 0.5, 0.7], False),
        ({"bar": 2.0}, [], [30], None),
        ({"kind": "memory"}, [1], [2], None),
        ({"kind": "decode", "bar": 1.0, "limit_bar": 0.75}, [50], [100], True),
        ({"kind": "decode", "bar": 1.0, "limit_bar": 0.9}, [50], [100], False),
    ],
)
def test_a_bar_is_met_by_the_medians(peers, fields, peer, ours, met):
    samples = {"llama.cpp": peer, "ridgeline": ours}
    summary = peers.summarize(row(peers, **fields), samples, weight_bytes=80_000_000, read_gb_s=10.0)
    assert summary.met is met
    if fields.get("kind") == "decode":
        assert summary.limit_share == pytest.approx(0.8)


def test_the_committed_page_is_what_the_committed_result_gives(peers):
    result = json.loads((ROOT / "docs/results/peers.json").read_text())
    assert peers.page(result) == (ROOT / "docs/peers.md").read_text()
    assert all(len(entry["samples"]["ridgeline"]) >= 5 for entry in result["rows"].values())
