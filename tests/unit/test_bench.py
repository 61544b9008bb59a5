"""The measuring itself on a tiny model, and the pure part of scripts/bench_peers.py: samples to page."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ridgeline.bench.latency import measure_latency
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError
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


def test_latency_counts_every_repetition():
    llm = LLMEngine(EngineConfig.from_options("tiny", max_model_len=128), tiny_model("llama"), None)
    found = measure_latency(llm, prompt_len=40, output_len=5, reps=3, seed=0)
    assert len(found.prefill_tok_s) == len(found.decode_tok_s) == 3
    assert min(found.prefill_tok_s + found.decode_tok_s) > 0
    assert measure_latency(llm, prompt_len=4, output_len=1, reps=2, seed=0).decode_tok_s == ()
    with pytest.raises(ConfigError, match="reps=0: expected at least 1"):
        measure_latency(llm, prompt_len=4, output_len=1, reps=0, seed=0)
    llm.close()


def test_latency_as_a_process_ends_with_json(tmp_path):
    path = synthesize("tiny-llama", "Q8_0", path=tmp_path / "m.gguf")
    command = [sys.executable, "-m", "ridgeline.bench.latency", str(path)]
    command += ["--prompt-len", "8", "--output-len", "3", "--reps", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["decode_tok_s"]) == 2


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
