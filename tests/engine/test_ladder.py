"""The ladder on a small model that is made here: real processes, real executors."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from ridgeline.bench.workload import AtOnce, Fixed, FixedRate, Uniform, Workload
from ridgeline.ladder import RUNGS, climb
from ridgeline.ladder.measure import compare_with_reference, make_engine, serve
from ridgeline.ladder.rungs import combined
from ridgeline.models.synth import synthesize

WORKLOAD = Workload(
    name="small",
    num_requests=5,
    prompt_lens=Uniform(5, 40),
    output_lens=Uniform(2, 8),
    shared_prefix_len=32,
    max_concurrency=4,
)
NAMES = (
    "naive loop",
    "KV cache",
    "continuous batching",
    "paged cache",
    "prefix cache",
    "native kernels",
    "INT8 KV",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("ladder") / "tiny.gguf"
    synthesize("tiny-llama", "Q8_0", seed=0, path=path)
    return str(path)


@pytest.fixture(scope="module")
def climbed(model):
    # No verdict is a loss here: times of a tiny model mean nothing, and every rung shall be tried.
    return climb(
        model,
        rungs=[rung for rung in RUNGS if rung.name in NAMES],
        workload=WORKLOAD,
        repeats=1,
        removals=False,
    )


def test_rungs_run_or_say_why_not(climbed):
    for step in climbed.steps:
        assert step.measured is not None or "did not stay" in step.reason, step.reason
    assert climbed.steps[0].verdict == "start" and climbed.steps[0].measured.kv_cache_bytes == 0


def test_float_rungs_give_the_tokens_and_logits_of_the_first(climbed):
    first = climbed.steps[0].measured
    assert first.kl_mean == 0.0 and first.num_same_requests == first.num_requests == 5
    for step in climbed.steps:
        if step.measured is not None and step.rung.name != "INT8 KV":
            assert step.measured.kl_mean < 1e-6, step.rung.name
            assert step.measured.num_same_requests == 5, step.rung.name


def test_figures_are_consistent(climbed):
    for step in climbed.steps:
        if (m := step.measured) is not None:
            assert 0 < m.ttft_s < m.wall_s[0] and m.peak_memory_bytes > 1 << 20
            assert m.output_tok_s[0] * m.wall_s[0] == pytest.approx(
                sum(r.max_tokens for r in WORKLOAD.requests(vocab_size=9, seed=0))
            )


def test_arrivals_are_waited_for(model):
    options = combined([rung for rung in RUNGS if rung.name in ("naive loop", "native kernels")])
    engine = make_engine(
        model, options | {"kv_cache": True, "max_model_len": 64, "max_num_batched_tokens": 64}
    )
    times = [
        serve(
            engine,
            Workload(
                name="three",
                num_requests=3,
                prompt_lens=Fixed(4),
                output_lens=Fixed(2),
                arrivals=arrivals,
            ).requests(vocab_size=50, seed=0),
        )
        for arrivals in (FixedRate(5.0), AtOnce())
    ]
    engine.close()
    assert times[0].wall_s > 0.4 > times[1].wall_s
    assert max(times[0].ttft_s) < 0.2  # from its arrival, not from the start
    assert times[0].token_ids == times[1].token_ids


def test_the_divergence_sees_a_changed_logit(model, tmp_path):
    options = combined([rung for rung in RUNGS if rung.name in ("naive loop", "native kernels")])
    engine = make_engine(
        model, options | {"kv_cache": True, "max_model_len": 64, "max_num_batched_tokens": 64}
    )
    path, tokens = tmp_path / "reference.npy", list(range(1, 41))
    assert compare_with_reference(engine, tokens, path)["kl_mean"] == 0.0
    logits = np.load(path)
    logits[3, 5] += 20.0
    np.save(path, logits)
    assert compare_with_reference(engine, tokens, path)["kl_mean"] > 0.1
    engine.close()


def test_the_command_ends_with_one_document(model, tmp_path):
    description = tmp_path / "small.json"
    description.write_text(json.dumps(WORKLOAD.describe()))
    run = (
        "import sys; from ridgeline.cli.options import make_app; from ridgeline.cli.ladder import ladder; "
        "app = make_app(name='x'); app.default(ladder); app(sys.argv[1:], exit_on_error=False)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            run,
            "-m",
            model,
            "--rungs",
            "naive loop,KV cache",
            "--repeats",
            "1",
            "--workload",
            str(description),
            "--page",
            str(tmp_path / "p.md"),
            "--html",
            str(tmp_path / "r.html"),
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert [s["rung"]["name"] for s in document["details"]["steps"]] == ["naive loop", "KV cache"]
    assert "| naive loop |" in (tmp_path / "p.md").read_text()
    assert (tmp_path / "p.svg").read_text().startswith("<svg") and "<svg" in (tmp_path / "r.html").read_text()
