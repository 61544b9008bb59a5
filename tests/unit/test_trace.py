"""The file format, the labels, the counts of bytes, and the rules that turn figures into sentences."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ridgeline.engine.scheduler import PlanRow, SamplingRow, StepPlan
from ridgeline.models.decoder import record_decoder
from ridgeline.ops.fuse import fuse
from ridgeline.ops.native import EVENT, EVENT_BUSY, EVENT_OP, EVENT_WAIT
from ridgeline.ops.program import Opcode, StepShape
from ridgeline.profiling.breakdown import OpRow, PhaseBreakdown, ThreadUse, break_down, label
from ridgeline.profiling.findings import find
from ridgeline.profiling.machine import MachineLimits
from ridgeline.profiling.trace import Range, Step, Trace, op_name, phase_of, shape_of
from ridgeline.sampling_params import SamplingParams
from tests.tiny import ARCHITECTURES, tiny_model

KV_TOKEN_BYTES = 96
LIMITS = MachineLimits(
    name="a machine",
    num_threads=2,
    isa="generic",
    read=((2**20, 40.0), (2**30, 20.0)),
    read_one_thread=(),
    fp32_gflop_s=100.0,
    int8_gop_s=400.0,
    int16_gop_s=200.0,
    barrier_s=1e-6,
    measured="never",
)


def program_of(name="llama"):
    model = tiny_model(name)
    return fuse(record_decoder(model.config, model.weights, max_model_len=256))


def unfused(name):
    model = tiny_model(name)
    return record_decoder(model.config, model.weights, max_model_len=256)


def events(*rows):
    return np.array(
        [(1000 * a, 1000 * b, number, thread, kind) for a, b, number, thread, kind in rows], EVENT
    )


def whole_step(program, *, number=0, begin=0, phase="decode", shape=None):
    """A step in which every instruction takes 10 us: 6 with thread 1 at work, and 2 of waiting for it."""
    rows, at = [], begin + 20
    for i in range(len(program.instructions)):
        rows.append((at + 8, at + 10, i, 0, EVENT_WAIT))
        rows.append((at, at + 10, i, 0, EVENT_OP))
        at += 10
    workers = [(begin + 20 + 10 * i, begin + 26 + 10 * i, i, 1, EVENT_BUSY) for i in range(len(rows) // 2)]
    step = Step(number, 1000 * begin, 1000 * (at + 30), phase, shape or StepShape.decode(1, 9))
    step.ranges = [
        Range("schedule", 1000 * begin, 1000 * (begin + 10)),
        Range("forward", 1000 * (begin + 20), 1000 * at),
        Range("sampler", 1000 * at, 1000 * (at + 20)),
    ]
    step.events = events(*rows, *workers)
    return step


def recorded(program, *steps):
    return Trace(program, KV_TOKEN_BYTES, "float32", 2, list(steps), [Range("tokenize", -5000, -1000)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bytes_of_fusion_differ_only_by_activations(name):
    """Weights, the cache and the embedding's rows are moved whether or not ops are joined."""
    shape = StepShape(((1, 70), (5, 5), (40, 90)), 3)
    plain, fused = unfused(name), program_of(name)
    assert plain.flops(shape) == fused.flops(shape) > 0
    without = StepShape(((0, 70), (0, 5), (0, 90)), 0)  # no rows, so no activations: weights and reads only

    def moved(program, kv):
        return program.bytes(shape, kv_token_bytes=kv) - program.bytes(shape, kv_token_bytes=0)

    assert moved(plain, KV_TOKEN_BYTES) == moved(fused, KV_TOKEN_BYTES) == KV_TOKEN_BYTES * moved(plain, 1)
    assert plain.bytes(without, kv_token_bytes=0) == fused.bytes(without, kv_token_bytes=0)
    assert fused.bytes(shape, kv_token_bytes=0) < plain.bytes(shape, kv_token_bytes=0)


def test_bytes_of_a_decode_step_by_hand():
    program, model = program_of(), tiny_model("llama")
    config = model.config
    shape = StepShape.decode(3, 50)
    matrices = sum(w.num_bytes for n, w in model.weights.items() if n != "embed_tokens")
    kv = config.num_layers * 3 * (50 + 1) * KV_TOKEN_BYTES
    by_op = [program.instruction_bytes(i, shape, kv_token_bytes=KV_TOKEN_BYTES) for i in program.instructions]
    assert sum(by_op) == program.bytes(shape, kv_token_bytes=KV_TOKEN_BYTES)
    activations = sum(
        4 * 3 * program.buffers[b].columns
        for i in program.instructions
        for b in (*i.outputs, *i.read_buffers)
    )
    embedding = 3 * 4 * config.hidden_size
    assert sum(by_op) == matrices + kv + activations + embedding


def test_windows_and_sinks_limit_what_is_read():
    shape = StepShape(((1, 100), (10, 100), (10, 10)), 3)
    assert shape.num_cached_read(None, 0) == 210
    assert shape.num_cached_read(20, 0) == 20 + 29 + 10
    assert shape.num_cached_read(20, 4) == 24 + 33 + 10

    def seen(num_new, seq_len, window, num_sinks):
        keys = set()
        for position in range(seq_len - num_new, seq_len):
            keys |= set(range(max(0, position - window + 1), position + 1)) | set(
                range(min(num_sinks, position + 1))
            )
        return len(keys)

    for num_new, seq_len, window, sinks in (
        (1, 100, 20, 4),
        (10, 100, 20, 4),
        (10, 30, 20, 4),
        (7, 22, 20, 4),
    ):
        by_hand = seen(num_new, seq_len, window, sinks)
        assert StepShape(((num_new, seq_len),), 1).num_cached_read(window, sinks) == by_hand


def test_rows_add_up_to_the_program():
    program = program_of("gemma3")
    shapes = [StepShape.decode(2, 40), StepShape(((1, 41), (7, 7)), 2)]
    steps = [whole_step(program, number=n, begin=10_000 * n, shape=shape) for n, shape in enumerate(shapes)]
    b = break_down(recorded(program, *steps), "decode", LIMITS)
    assert b is not None and break_down(recorded(program, *steps), "prefill", LIMITS) is None
    assert b.num_bytes == sum(program.bytes(shape, kv_token_bytes=KV_TOKEN_BYTES) for shape in shapes)
    assert b.flops == sum(program.flops(shape) for shape in shapes)
    assert sum(row.calls for row in b.rows) == 2 * len(program.instructions)
    assert b.ops_s == pytest.approx(b.forward_s) == pytest.approx(2 * 10e-6 * len(program.instructions))
    assert sum(row.share for row in b.rows) == pytest.approx(1)
    assert b.outside == pytest.approx(
        {
            "schedule": 20e-6,
            "sampler": 40e-6,
            "batch layout": 0,
            "update": 0,
            "outputs": 0,
            "stats": 0,
            "other": 40e-6,
        }
    )
    num_ops = 2 * len(program.instructions)
    assert [(t.busy_s, t.wait_s) for t in b.threads] == [
        pytest.approx((8e-6 * num_ops, 2e-6 * num_ops)),
        pytest.approx((6e-6 * num_ops, 4e-6 * num_ops)),
    ]


def test_layers_with_and_without_a_window_are_rows_of_their_own():
    program = program_of("gemma3")
    step = whole_step(program, shape=StepShape.decode(1, 100))
    b = break_down(recorded(program, step), "decode", None)
    shapes = {row.shape: row.calls for row in b.rows if row.op == "attention"}
    assert shapes == {"4 heads of 24, window 20": 2, "4 heads of 24": 1}
    assert all(row.limit_share is None for row in b.rows)


def test_share_of_the_limit_is_the_larger_one():
    program = program_of()
    step = whole_step(program, shape=StepShape.decode(1, 9))
    b = break_down(recorded(program, step), "decode", LIMITS)
    row = next(row for row in b.rows if row.op.startswith("linear"))
    memory = row.gb_s / LIMITS.read_gb_s(b.num_bytes)
    assert row.bound == "memory" and row.limit_share == pytest.approx(memory)
    assert row.gflop_s / LIMITS.fp32_gflop_s < memory
    fast = break_down(recorded(program, step), "decode", replace(LIMITS, fp32_gflop_s=1e-3))
    row = next(row for row in fast.rows if row.op.startswith("linear"))
    assert row.bound == "compute" and row.limit_share == pytest.approx(row.gflop_s / 1e-3)


def test_labels_are_the_same_in_layers_that_look_alike():
    program = program_of()
    labels = [label(program, i, "float16") for i in program.instructions]
    linears = {
        found for found, i in zip(labels, program.instructions, strict=True) if i.opcode is Opcode.LINEAR
    }
    assert ("linear q_proj+k_proj+v_proj", "F32", "160 x 48") in linears
    assert ("linear gate_proj+up_proj", "F32", "144 x 48") in linears
    assert ("attention", "float16", "6 heads of 16") in labels
    names = [op_name(program, i) for i in program.instructions]
    assert len(set(names)) == len(names) and "linear layers.1.q_proj+k_proj+v_proj" in names


def test_the_file_has_every_range_once_on_one_axis(tmp_path):
    program = program_of()
    trace = recorded(program, whole_step(program), whole_step(program, number=1, begin=5000))
    trace.save(tmp_path / "trace.json")
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [e for e in found if e["ph"] == "X"]
    assert {e["ph"] for e in found} == {"X", "M"}
    assert min(e["ts"] for e in complete) == 0 and all(e["dur"] >= 0 for e in complete)
    names = [e["name"] for e in complete]
    assert names.count("tokenize") == 1 and names.count("forward") == 2 and "step 1" in names
    ops = [e for e in complete if "GB/s" in e.get("args", {})]
    assert len(ops) == 2 * len(program.instructions)
    assert ops[0]["args"]["rows"] == 1 and ops[0]["args"]["GB/s"] > 0
    assert names.count("wait") == len(ops)


def test_sampling_between_steps_has_no_instruction():
    program = program_of()
    step = whole_step(program)
    step.events = np.concatenate(
        [step.events, events((900, 910, -1, 1, EVENT_BUSY), (905, 910, -1, 0, EVENT_WAIT))]
    )
    trace = recorded(program, step)
    assert "sampling" in [e["name"] for e in trace.document()["traceEvents"]]
    assert (
        break_down(trace, "decode", None).threads
        == break_down(recorded(program, whole_step(program)), "decode", None).threads
    )


def row_of(num_tokens, *, start=0, samples=True, num_output=0):
    sampling = SamplingRow(SamplingParams(), 0, num_output) if samples else None
    return PlanRow("r", (1,) * num_tokens, start, (0,), int(samples), samples=samples, sampling=sampling)


def test_a_step_is_decode_when_no_row_computes_a_prompt():
    decode = row_of(1, start=9, num_output=3)
    assert phase_of(StepPlan(0, (decode, decode))) == "decode"
    for prompt in (row_of(5), row_of(1), row_of(1, samples=False)):
        assert phase_of(StepPlan(0, (decode, prompt))) == "prefill"
    assert shape_of(StepPlan(0, (decode, row_of(5)))) == StepShape(((1, 10), (5, 5)), 2)


def row(op, seconds, *, format="", num_bytes=0, flops=0, limit_share=None, bound=None):
    return OpRow(op, format, "2 x 2", 10, seconds, 0.5, num_bytes, flops, limit_share, bound)


def breakdown(rows, *, forward_s=0.9, outside=None, threads=()):
    return PhaseBreakdown(
        phase="decode",
        num_steps=10,
        num_tokens=10,
        num_logits=10,
        wall_s=1.0,
        forward_s=forward_s,
        ops_s=sum(r.seconds for r in rows),
        outside=outside or {"schedule": 0.02, "sampler": 0.08},
        rows=tuple(rows),
        threads=threads,
        contexts=(100, 110),
    )


def texts(b, limits=LIMITS):
    found = find(b, limits)
    assert [f.share for f in found] == sorted((f.share for f in found), reverse=True)
    return {f.rule: f.text for f in found}


def test_findings_say_what_binds():
    memory = row(
        "linear w", 0.8, format="Q4_0", num_bytes=10**10, flops=10**10, limit_share=0.9, bound="memory"
    )
    text = texts(breakdown([memory]))["bound_by"]
    assert text.startswith("decode is bandwidth-bound: linears read 1,000 MB a step at 12.5 GB/s")
    slow = replace(memory, limit_share=0.3)
    found = texts(breakdown([slow]))
    assert "nearer to the memory's limit" in found["bound_by"]
    assert "reaches 30% of the memory limit" in found["slow_linears"]
    compute = replace(memory, bound="compute", limit_share=0.8)
    assert "is compute-bound" in texts(breakdown([compute]))["bound_by"]
    assert "bound_by" not in texts(breakdown([memory]), None)


def test_findings_name_what_else_takes_time():
    rows = [row("attention", 0.4), row("rms_norm", 0.05), row("linear w", 0.3)]
    threads = (ThreadUse(0.85, 0.01), ThreadUse(0.7, 0.2))
    found = find(breakdown(rows, threads=threads), LIMITS)
    by_rule = {f.rule: f.text for f in found}
    assert "attention is 40% of decode at a context of 100 to 110" in by_rule["large_ops"]
    assert "thread 1 waits for the others 20%" in by_rule["idle_threads"]
    assert (
        "takes 10.000 ms, 10% of a decode step (most: sampler 8.000, schedule 2.000 ms)"
        in by_rule["outside_forward"]
    )
    assert "15% of decode passes in the forward pass but between its ops" in by_rule["between_ops"]
    assert "rms_norm" not in " ".join(by_rule.values()) and "thread 0" not in by_rule["idle_threads"]


def test_nothing_to_say_is_said_by_nobody():
    rows = [row("linear w", 0.99, num_bytes=1, limit_share=0.9, bound="memory")]
    quiet = breakdown(rows, forward_s=0.99, outside={"schedule": 0.01})
    assert list(texts(quiet, None)) == []
