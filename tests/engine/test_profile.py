"""Profiles of running engines: counters that reconcile, ranges that nest, and an engine that stays as it was."""

from __future__ import annotations

import json
import os
from itertools import pairwise

import pytest

from ridgeline import LLM
from ridgeline.cli.main import main
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.ops.native import EVENT_BUSY, EVENT_OP, EVENT_WAIT
from ridgeline.ops.program import StepShape
from ridgeline.profiling.breakdown import break_down
from ridgeline.profiling.measured import measure_ops
from ridgeline.profiling.trace import record_requests, trace
from ridgeline.sampling_params import SamplingParams
from tests.tiny import tiny_model

PARTS = ("schedule", "batch layout", "forward", "sampler", "update", "outputs", "stats")


def engine(name="llama", **options):
    options = {"executor": "native", "max_model_len": 160, "max_num_seqs": 4} | options
    return LLMEngine(EngineConfig.from_options("tiny", **options), tiny_model(name), None)


def command(capsys, *arguments):
    """Output of one command that succeeds."""
    with pytest.raises(SystemExit) as ended:
        main(["profile", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def spans(ranges):
    return sorted((r.begin_ns, r.end_ns) for r in ranges)


@pytest.mark.parametrize("name", ["llama", "gemma3", "sinks"])
def test_counters_reconcile_and_ranges_nest(name):
    llm = engine(name, num_threads=2, max_num_batched_tokens=48)
    recorded = record_requests(llm, prompt_len=40, output_len=6, batch_size=3)
    program, steps = llm.executor.program, recorded.steps
    llm.close()
    assert [s.phase for s in steps].count("decode") >= 4 and steps[0].phase == "prefill"
    for phase in ("prefill", "decode"):
        b = break_down(recorded, phase, None)
        shapes = [s.shape for s in steps if s.phase == phase]
        kv = recorded.kv_token_bytes
        assert b.num_bytes == sum(program.bytes(shape, kv_token_bytes=kv) for shape in shapes)
        assert b.flops == sum(program.flops(shape) for shape in shapes)
        assert sum(row.calls for row in b.rows) == len(shapes) * len(program.instructions)
        assert 0 < b.ops_s <= b.forward_s <= b.wall_s
        assert sum(b.outside.values()) + b.forward_s == pytest.approx(b.wall_s, rel=1e-3)
    for step, after in pairwise(steps):
        assert step.end_ns <= after.begin_ns
    for step in steps:
        parts = [r for r in step.ranges if r.name in PARTS]
        assert [r.name for r in sorted(parts, key=lambda r: r.begin_ns)] == list(PARTS)
        inside = [(step.begin_ns, step.begin_ns), *spans(parts), (step.end_ns, step.end_ns)]
        assert all(before[1] <= after[0] for before, after in pairwise(inside))
        (forward,) = (r for r in parts if r.name == "forward")
        for kind, thread in ((EVENT_OP, 0), (EVENT_WAIT, 0), (EVENT_BUSY, 1)):
            chosen = step.events[(step.events["kind"] == kind) & (step.events["thread"] == thread)]
            begins, ends = chosen["begin_ns"].tolist(), chosen["end_ns"].tolist()
            assert all(b <= e for b, e in zip(begins, ends, strict=True))
            assert all(e <= b for e, b in zip(ends, begins[1:], strict=False)), "in order, none overlap"
            within = chosen[chosen["instruction"] >= 0]
            assert (within["begin_ns"] >= forward.begin_ns).all()
            assert (within["end_ns"] <= forward.end_ns).all()


def test_waits_and_other_threads_lie_inside_the_instruction():
    llm = engine(num_threads=3)
    recorded = record_requests(llm, prompt_len=130, output_len=4)
    llm.close()
    assert any((s.events["kind"] == EVENT_BUSY).any() for s in recorded.steps)
    for step in recorded.steps:
        ops = {e["instruction"]: e for e in step.events if e["kind"] == EVENT_OP}
        assert sorted(ops) == list(range(len(llm.executor.program.instructions)))
        for event in step.events:
            if event["instruction"] >= 0:
                whole = ops[event["instruction"]]
                assert whole["begin_ns"] <= event["begin_ns"] <= event["end_ns"] <= whole["end_ns"]


def test_recording_changes_no_token_and_leaves_the_engine_as_it_was():
    def tokens(llm):
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)
        llm.add_request({"prompt_token_ids": list(range(3, 60))}, params)
        while llm.has_unfinished:
            outputs = llm.step()
        return outputs[0].outputs[0].token_ids

    plain = engine()
    expected = tokens(plain)
    llm = engine()
    with trace(llm) as recorded:
        assert tokens(llm) == expected
    num_steps = len(recorded.steps)
    assert num_steps == 12
    for owner in (llm, llm.executor, llm.executor.native, llm.scheduler, llm._outputs, llm.stats):
        assert not {"step", "submit", "schedule", "update", "record_step"} & set(vars(owner))
    assert tokens(llm) == expected and len(recorded.steps) == num_steps
    assert len(llm.executor.native.take_events()) == 0, "nothing is recorded any more"
    plain.close()
    llm.close()


def test_an_error_in_a_step_ends_the_recording(monkeypatch):
    llm = engine()
    monkeypatch.setattr(type(llm.executor), "submit", lambda self, plan: 1 / 0)
    llm.add_request({"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=2))
    with pytest.raises(ZeroDivisionError), trace(llm):
        llm.step()
    assert "step" not in vars(llm)
    llm.close()


def test_too_little_room_is_noticed():
    llm = engine()
    native = llm.executor.native
    native.record_events(3)
    llm.add_request({"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=2))
    llm.step()
    with pytest.raises(AssertionError, match="more than 3 events"):
        native.take_events()
    llm.close()


@pytest.mark.parametrize("executor", ["eager", "compiled"])
def test_torch_ops_are_listed_by_phase(executor, tmp_path):
    pytest.importorskip("torch")
    llm = engine(executor=executor, dtype="float32")
    recorded = record_requests(llm, prompt_len=40, output_len=5)
    llm.close()
    for phase in ("prefill", "decode"):
        b = break_down(recorded, phase, None)
        assert b.rows and b.flops > 0 and sum(row.share for row in b.rows) == pytest.approx(1)
        assert b.ops_s <= b.forward_s * 1.05
        assert not {"forward", "schedule", "step 0"} & {row.op for row in b.rows}
    recorded.save(tmp_path / "trace.json")
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e.get("name") for e in found]
    assert {"step 0", "step 4", *PARTS} <= set(names) and any(str(n).startswith("aten::") for n in names)


def test_ops_account_for_the_native_step_of_the_real_model():
    with LLM("smollm2", executor="native", max_model_len=256) as llm:
        recorded = record_requests(llm.engine, prompt_len=128, output_len=32)
    for phase in ("prefill", "decode"):
        b = break_down(recorded, phase, None)
        assert b.ops_s / b.forward_s >= 0.95, f"{phase}: {b.ops_s / b.forward_s:.3f}"
        assert len(b.threads) == len(os.sched_getaffinity(0))


def test_ops_are_timed_on_blocks_side_by_side_or_from_all_over(monkeypatch):
    monkeypatch.setattr("ridgeline.profiling.measured.OP_SECONDS", 0.0)
    llm = engine(kv_cache_tokens=1024, num_threads=1)
    tables, step = [], llm.executor.native.step
    monkeypatch.setattr(
        llm.executor.native,
        "step",
        lambda batch: (tables.append(batch.block_tables.tolist()), step(batch))[1],
    )
    shape = StepShape.decode(2, 128)
    assert measure_ops(llm, shape).keys() == measure_ops(llm, shape, scatter_seed=1).keys()
    llm.close()
    assert tables[0] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    scattered = sum(tables[-1], [])
    assert len(set(scattered)) == 8 and scattered != sorted(scattered) and max(scattered) < 32


def test_the_command_ends_with_one_document(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("ridgeline.cli.profile.machine_limits", lambda **_: None)
    out = tmp_path / "trace.json"
    sizes = ("-m", "smollm2", "--prompt-len", "20", "--output-len", "4")
    found = json.loads(command(capsys, *sizes, "--out", str(out), "--json").splitlines()[-1])
    assert found["schema"] == "ridgeline.result/1" and found["kind"] == "profile"
    decode = found["details"]["phases"]["decode"]
    assert decode["num_steps"] == 3 and decode["rows"][0]["op"].startswith("linear")
    assert found["metrics"]["decode_step_s"]["n"] == 3
    assert json.loads(out.read_text())["traceEvents"]
    shown = command(capsys, *sizes)
    assert "prefill: 1 steps, 20 tokens" in shown and "attention" in shown and "Findings" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "3", "--max-num-seqs", "2"), "--max-num-seqs 3"),
        (("--output-len", "0"), "expected at least 1"),
        (("--out", "/nowhere/at/all.json"), "make it first"),
    ],
)
def test_mistakes_are_said_before_the_model_is_loaded(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["profile", "-m", "no-such-model", *arguments])
