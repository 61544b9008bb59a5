"""The ladder without a model: which options a rung has, what a loss does to the next ones, what a page says."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise

import numpy as np
import pytest

from ridgeline.bench.result import check_document
from ridgeline.bench.workload import NAMED
from ridgeline.config import EngineConfig
from ridgeline.errors import ConfigError, RidgelineError
from ridgeline.ladder import climbing
from ridgeline.ladder.charts import Bar, bar_chart
from ridgeline.ladder.climbing import Climb, climb, common_options, verdict_of
from ridgeline.ladder.measure import with_weights
from ridgeline.ladder.process import run_job
from ridgeline.ladder.report import charts, html, markdown
from ridgeline.ladder.rungs import AIMS, FULL, QUICK, RUNGS, combined, missing, without
from ridgeline.models.load import LoadedModel
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight
from tests.tiny import tiny_config

BY_NAME = {rung.name: rung for rung in RUNGS}


def engine_config(options) -> EngineConfig:
    rest = {name: value for name, value in options.items() if name != "weights"}
    config = EngineConfig.from_options("m", **common_options(QUICK.workload) | rest)
    return config.resolve(tiny_config("llama"), unavailable={})


@pytest.mark.parametrize("count", range(1, len(RUNGS) + 1))
def test_every_rung_is_a_configuration_that_the_engine_takes(count):
    engine_config(combined(RUNGS[:count]))


@pytest.mark.parametrize("rung", RUNGS[1:], ids=lambda rung: rung.name)
def test_every_switch_can_be_taken_away_from_the_top(rung):
    left = without(rung, RUNGS)
    assert rung not in left and not any(missing(other, left) for other in left)
    engine_config(combined(left))


@pytest.mark.parametrize("lost", RUNGS[1:], ids=lambda rung: rung.name)
def test_every_rung_stands_on_those_that_stayed(lost):
    kept = []
    for rung in RUNGS:
        if rung is not lost and not missing(rung, kept):
            kept.append(rung)
            engine_config(combined(kept))


def test_the_first_rung_is_naive_and_each_changes_something():
    first = engine_config(combined(RUNGS[:1]))
    assert (first.executor, first.attention, first.dtype) == ("eager", "naive", "float32")
    assert not first.cache.kv_cache and first.scheduler.batching == "none"
    for a, b in pairwise(range(1, len(RUNGS) + 1)):
        assert combined(RUNGS[:a]) != combined(RUNGS[:b])
    top = engine_config(combined(RUNGS))
    assert (top.executor, top.attention, top.fusion, top.dtype) == ("native", "flash", None, None)
    assert top.cache.kv_cache_dtype == "int8" and top.cache.enable_prefix_caching
    assert top.scheduler.batching == "continuous" and top.scheduler.enable_chunked_prefill


def test_names_and_aims():
    assert len(BY_NAME) == len(RUNGS)
    for i, rung in enumerate(RUNGS):
        assert rung.aim in AIMS and rung.summary.endswith(".")
        assert set(rung.needs) <= {other.name for other in RUNGS[:i]}


def test_what_goes_with_a_switch():
    gone = {rung.name for rung in RUNGS} - {rung.name for rung in without(BY_NAME["paged cache"], RUNGS)}
    assert gone == {"paged cache", "prefix cache"}
    names = [rung.name for rung in without(BY_NAME["native kernels"], RUNGS)]
    assert names[-1] == "torch.compile"


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_the_workload_gives_every_switch_something_to_do(plan):
    workload = plan.workload
    options = common_options(workload)
    assert workload.max_concurrency < workload.num_requests and workload.shares_prefixes
    seats = options["kv_cache_tokens"] // options["max_model_len"]
    assert 1 < seats < workload.max_concurrency
    longest = max(len(r.prompt_token_ids) + r.max_tokens for r in workload.requests(vocab_size=9, seed=0))
    assert longest <= options["max_model_len"]
    assert options["max_num_batched_tokens"] == options["max_num_seqs"] * options["max_model_len"]


@pytest.mark.parametrize("name", ["w1", "w3", "w5"])
def test_a_named_workload_fits(name):
    engine_config(common_options(NAMED[name]) | {"max_model_len": 256})


@pytest.mark.parametrize(
    ("change", "verdict"), [(1.2, "gain"), (0.8, "loss"), (1.04, "none"), (0.96, "none"), (None, "none")]
)
def test_verdicts(change, verdict):
    assert verdict_of(change) == verdict


class Fake:
    """Stands for the processes: tok/s by the executor and a few switches; records what was asked."""

    def __init__(self, *, refuse=(), slow=()):
        self.jobs, self.refuse, self.slow = [], refuse, slow

    def __call__(self, job, *, limit_s, on_event):
        self.jobs.append(job)
        options = job["options"]
        for name, value in self.refuse:
            if options.get(name) == value:
                return f"{name}={value!r} cannot be used"
        speed = 10.0 * (1 + (options["kv_cache"] is True)) * (1 + (options["executor"] == "native"))
        for name, value in self.slow:
            speed *= 0.5 if options.get(name) == value else 1.0
        cache_bytes = {"float16": 2, "int8": 1}.get(options.get("kv_cache_dtype"), 4) * 1000
        runs = [
            {
                "wall_s": 10 / speed,
                "output_tok_s": speed,
                "ttft_s": [0.1, 0.3],
                "tpot_s": [0.02],
                "itl_s": [0.02],
                "itl_p99_s": 0.02,
                "token_ids": [[1, 2, 3], [4, 5, 6 if options["executor"] == "eager" else 7]],
            }
        ] * job["repeats"]
        return {
            "runs": runs,
            "load_s": 1.0,
            "warm_up_s": 0.1,
            "peak_memory_bytes": 1 << 20,
            "kv_cache_bytes": cache_bytes,
            "kl_mean": 0.0 if options["executor"] == "eager" else 1e-3,
            "top1_agreement": 1.0,
            "token_ids": [1, 2, 3],
            "text": "words",
        }


def fake_climb(monkeypatch, fake, **options) -> Climb:
    monkeypatch.setattr(climbing, "run_job", fake)
    return climb("some-model", **options)


def by_name(steps):
    return {step.rung.name: step for step in steps}


def test_a_loss_is_shown_and_not_carried_on(monkeypatch):
    fake = Fake(slow=[("dtype", "bfloat16")])
    result = fake_climb(monkeypatch, fake)
    steps = by_name(result.steps)
    assert steps["bfloat16"].verdict == "loss" and steps["bfloat16"].speed_up == pytest.approx(0.5)
    assert "bfloat16" not in result.top
    assert steps["static batching"].options["dtype"] == "float32"
    assert steps["static batching"].speed_up == pytest.approx(1.0)  # over the KV cache, not over the loss
    assert steps["KV cache"].verdict == "gain" and steps["KV cache"].speed_up == pytest.approx(2.0)
    assert steps["native kernels"].speed_up_total == pytest.approx(4.0)


def test_what_needs_a_loss_is_not_run(monkeypatch):
    result = fake_climb(monkeypatch, Fake(slow=[("kv_layout", "paged")]))
    step = by_name(result.steps)["prefix cache"]
    assert step.verdict == "not run" and "paged cache" in step.reason


def test_a_rung_that_cannot_run_is_a_row_and_the_climb_goes_on(monkeypatch):
    result = fake_climb(monkeypatch, Fake(refuse=[("executor", "compiled")]))
    steps = by_name(result.steps)
    assert steps["torch.compile"].reason == "executor='compiled' cannot be used"
    assert steps["native kernels"].verdict == "gain"
    assert result.top[-1] == RUNGS[-1].name


def test_without_torch_the_native_kernels_are_the_first(monkeypatch):
    fake = Fake(refuse=[("executor", "eager"), ("executor", "compiled")])
    result = fake_climb(monkeypatch, fake)
    ran = [step for step in result.steps if step.measured]
    assert ran[0].rung.name == "native kernels" and ran[0].verdict == "start"
    assert ran[0].speed_up_total == pytest.approx(1.0)
    assert ran[0].options["kv_cache"] is False and ran[1].rung.name == "KV cache"
    assert by_name(result.steps)["torch.compile"].verdict == "not run"
    assert result.top[-1] == RUNGS[-1].name


def test_no_rung_at_all_is_an_error_with_the_reasons(monkeypatch):
    with pytest.raises(RidgelineError, match="kv_layout='contiguous' cannot be used"):
        fake_climb(monkeypatch, Fake(refuse=[("kv_layout", "contiguous")]))


def test_what_needs_a_rung_that_did_not_run_says_so(monkeypatch):
    result = fake_climb(monkeypatch, Fake(refuse=[("executor", "native")]))
    reason = by_name(result.steps)["INT4 weights"].reason
    assert "native kernels" in reason


def test_all_are_compared_with_the_first(monkeypatch):
    fake = Fake()
    result = fake_climb(monkeypatch, fake)
    assert fake.jobs[0]["token_ids"] is None and fake.jobs[1]["token_ids"] == [1, 2, 3]
    assert len({job["reference"] for job in fake.jobs}) == 1
    native = by_name(result.steps)["native kernels"].measured
    assert (native.num_same_requests, native.num_requests, native.first_difference) == (1, 2, 2)


def test_removals_skip_what_was_replaced(monkeypatch):
    result = fake_climb(monkeypatch, Fake())
    removed = by_name(result.removals)
    for replaced in ("bfloat16", "static batching", "torch.compile", "INT8 weights", "float16 KV"):
        assert replaced not in removed
    assert removed["native kernels"].speed_up == pytest.approx(2.0)
    assert removed["native kernels"].also_gone == (
        "INT8 weights",
        "INT4 weights",
        "fusion",
        "float16 KV",
        "INT8 KV",
        "tensor parallel",
        "pipeline parallel",
    )
    assert removed["INT8 KV"].change == pytest.approx(2.0) and removed["INT8 KV"].verdict == "gain"


def test_quick_leaves_slow_starts_out(monkeypatch):
    result = fake_climb(monkeypatch, Fake(), quick=True, removals=False)
    assert by_name(result.steps)["torch.compile"].verdict == "not run" and result.removals == ()


def test_progress_ends_at_the_total(monkeypatch):
    seen = []
    fake_climb(monkeypatch, Fake(), progress=lambda *call: seen.append(call))
    done = [call[2] for call in seen]
    assert done == sorted(done)
    rows = [call[0] for call in seen if call[4] is not None]
    assert rows[: len(RUNGS)] == list(BY_NAME)
    assert seen[-1][3] >= seen[-1][2] > seen[0][2]


def test_the_document_and_its_pages(monkeypatch):
    slow = Fake(slow=[("dtype", "bfloat16")], refuse=[("executor", "compiled")])
    document = json.loads(json.dumps(fake_climb(monkeypatch, slow).document()))
    check_document(document, "here")
    assert document["kind"] == "ladder" and document["workload"]["name"] == "ladder"
    assert document["metrics"]["KV cache: output_tok_s"]["samples"] == [20.0] * (2 * FULL.repeats)
    page = markdown(document, picture="ladder.svg")
    for text in ("| bfloat16 | 10.0 | 0.50 |", "LOSS", "not run: executor='compiled'", "![", "ladder.svg)"):
        assert text in page, text
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:18]}) == 1
    report = html(document)
    assert report.count("<svg") == len(charts(document)) == 4
    assert "http" not in report.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched


def test_bars_on_a_log_axis_have_lengths_of_factors():
    svg = bar_chart(
        "t", [Bar("a", 10.0, "", low=1.0), Bar("b", 100.0, "", low=10.0), Bar("c", 0.0, "0")], log=True
    )
    widths = [float(part.split('"')[0]) for part in svg.split('width="')[3:]]
    assert widths[0] == pytest.approx(widths[1], abs=0.2)
    assert widths[2] == 1.0 and not any(math.isnan(width) for width in widths)


def test_a_bar_chart_escapes_its_words():
    assert "<b>" not in bar_chart("a <b>", [Bar("<b>", 1.0, "<b>")])


@pytest.fixture
def model():
    rng = np.random.default_rng(0)

    def weight(name, shape, format="F32"):
        values = Weight(name, FORMATS["F32"], shape, {"data": rng.standard_normal(shape).astype(np.float32)})
        return values.converted(FORMATS[format])

    table = weight("embed_tokens", (16, 64))
    weights = {
        "embed_tokens": table,
        "lm_head": table,
        "norm": weight("norm", (64,)),
        "layers.0.q_proj": weight("q", (64, 64)),
        "layers.0.k_proj": weight("k", (64, 64), "Q4_1"),
        "layers.0.v_proj": weight("v", (64, 64), "Q8_0"),
        "layers.0.o_proj": weight("o", (64, 48)),
    }
    return LoadedModel(tiny_config("llama"), weights, None)


@pytest.mark.parametrize(
    ("form", "formats"),
    [
        ("float", ("F32", "F32", "F32", "F32", "Q4_1", "Q8_0", "F32")),
        ("int8", ("Q8_0", "Q8_0", "F32", "Q8_0", "Q8_0", "Q8_0", "F32")),
        ("int4", ("Q8_0", "Q8_0", "F32", "Q4_0", "Q4_1", "Q4_0", "F32")),
    ],
)
def test_the_forms_of_weights(model, form, formats):
    """48 columns are no whole blocks and stay; a tied table stays one object."""
    changed = with_weights(model, form).weights
    assert tuple(weight.format.name for weight in changed.values()) == formats
    assert changed["embed_tokens"] is changed["lm_head"]
    q, before = changed["layers.0.q_proj"].dequantize(), model.weights["layers.0.q_proj"].dequantize()
    assert np.abs(q - before).max() <= {"float": 0.0, "int8": 0.02, "int4": 0.4}[form]


def test_an_unknown_form_is_refused(model):
    with pytest.raises(ConfigError, match="float, int8, int4"):
        with_weights(model, "int2")


def test_a_process_that_dies_is_a_reason(monkeypatch):
    assert "its process ended with status" in run_job({}, limit_s=60, on_event=print)
    monkeypatch.setattr(sys, "executable", "/bin/cat")  # cat: no such file -m
    assert run_job({}, limit_s=60, on_event=print).startswith("its process ended")


def test_a_process_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    assert run_job({}, limit_s=0.2, on_event=print) == "ended after 0.2 s"


def test_the_first_rung_always_gives_the_options_of_the_start():
    from ridgeline.cli.ladder import _named

    assert [rung.name for rung in _named("KV cache")] == ["naive loop", "KV cache"]
    with pytest.raises(ConfigError, match="no rung 'kv'"):
        _named("kv")


def test_a_loss_by_chance_is_measured_again_and_stays(monkeypatch):
    fake, disturbed = Fake(), []

    def unlucky(job, **rest):
        result = fake(job, **rest)
        if job["options"]["dtype"] == "bfloat16" and not disturbed:
            disturbed.append(job)
            result["runs"] = [run | {"output_tok_s": run["output_tok_s"] * 0.94} for run in result["runs"]]
        return result

    result = fake_climb(monkeypatch, unlucky, repeats=2)
    step = by_name(result.steps)["bfloat16"]
    assert step.verdict == "none" and len(step.measured.output_tok_s) == 4
    assert "bfloat16" in result.top
    again = [job["options"]["dtype"] for job in fake.jobs[2:5]]
    assert again == ["bfloat16", "float32", "bfloat16"]
