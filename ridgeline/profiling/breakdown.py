"""From a Trace to a table: time, bytes and FLOPs of each kind of op, of prefill and of decode apart.

Instructions that do the same with the same shapes in other layers are one row. Bytes and FLOPs are the
Program's own counts for the shapes of the recorded steps, so the rows add up to its totals; time is measured.
A row's share of the limit is the larger of its share of the memory bandwidth and of the arithmetic peak.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.ops.native import EVENT_BUSY, EVENT_OP, EVENT_WAIT
from ridgeline.ops.packing import weight_label
from ridgeline.ops.program import Instruction, Opcode, Program
from ridgeline.profiling.machine import MachineLimits
from ridgeline.profiling.roofline import peak_of
from ridgeline.profiling.trace import Phase, Step, Trace

OUTSIDE_FORWARD = ("schedule", "batch layout", "sampler", "update", "outputs", "stats")
"""Ranges of a step around its forward pass; `detokenize` lies inside `outputs`."""


@dataclass(frozen=True, slots=True)
class OpRow:
    """All calls of one kind of op in one phase."""

    op: str
    format: str
    """Of its weights, or of the KV pages; empty where it has neither."""
    shape: str
    calls: int
    seconds: float
    share: float
    """Of the time of all ops."""
    num_bytes: int
    flops: int
    limit_share: float | None
    """Of the machine's limit, by the larger of bandwidth and arithmetic; None where unknown."""
    bound: str | None
    """"memory" or "compute": which of the two that was."""

    @property
    def gb_s(self) -> float:
        return self.num_bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gflop_s(self) -> float:
        return self.flops / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class ThreadUse:
    """One thread of the kernels while steps ran."""

    busy_s: float
    wait_s: float
    """Inside the forward pass, with nothing to do."""


@dataclass(frozen=True, slots=True)
class PhaseBreakdown:
    """Where the steps of one phase spent their time."""

    phase: Phase
    num_steps: int
    num_tokens: int
    num_logits: int
    wall_s: float
    forward_s: float
    ops_s: float
    """Sum over all ops; less than forward_s by what lies between them."""
    outside: dict[str, float]
    """Seconds of each range of `OUTSIDE_FORWARD`, and `other`: between them."""
    rows: tuple[OpRow, ...]
    """Longest first."""
    threads: tuple[ThreadUse, ...]
    contexts: tuple[int, int]
    """Fewest and most tokens in the cache of a sequence after a step."""

    @property
    def num_bytes(self) -> int:
        return sum(row.num_bytes for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    @property
    def outside_s(self) -> float:
        """Time of the steps outside of their forward pass."""
        return self.wall_s - self.forward_s


def break_down(trace: Trace, phase: Phase, limits: MachineLimits | None) -> PhaseBreakdown | None:
    """The steps of one phase summed up; None if there are none."""
    steps = [step for step in trace.steps if step.phase == phase and step.shape.num_tokens]
    if not steps:
        return None
    wall_s = sum(step.wall_s for step in steps)
    outside = {name: sum(step.seconds(name) for step in steps) for name in OUTSIDE_FORWARD}
    forward_s = sum(step.seconds("forward") for step in steps)
    outside["other"] = max(0.0, wall_s - forward_s - sum(outside.values()))
    rows = _torch_rows(steps) if trace.program is None else _native_rows(trace, trace.program, steps, limits)
    lengths = [seq_len for step in steps for _, seq_len in step.shape.sequences]
    return PhaseBreakdown(
        phase=phase,
        num_steps=len(steps),
        num_tokens=sum(step.shape.num_tokens for step in steps),
        num_logits=sum(step.shape.num_logits for step in steps),
        wall_s=wall_s,
        forward_s=forward_s,
        ops_s=sum(row.seconds for row in rows),
        outside=outside,
        rows=rows,
        threads=_threads(trace, steps, forward_s),
        contexts=(min(lengths), max(lengths)),
    )


def _native_rows(
    trace: Trace, program: Program, steps: Sequence[Step], limits: MachineLimits | None
) -> tuple[OpRow, ...]:
    labels = [label(program, instruction, trace.kv_dtype) for instruction in program.instructions]
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0, 0])
    for step in steps:
        assert step.events is not None
        counted: dict[tuple[str, str, str, object], tuple[int, int]] = {}
        for event in step.events[step.events["kind"] == EVENT_OP].tolist():
            begin_ns, end_ns, number = event[:3]
            instruction = program.instructions[number]
            # Layers that look alike move alike, but for their window.
            alike = (*labels[number], dict(instruction.attributes).get("window"))
            if alike not in counted:
                counted[alike] = (
                    program.instruction_bytes(instruction, step.shape, kv_token_bytes=trace.kv_token_bytes),
                    program.instruction_flops(instruction, step.shape),
                )
            total = sums[labels[number]]
            for i, value in enumerate((1, (end_ns - begin_ns) / 1e9, *counted[alike])):
                total[i] += value
    all_s = sum(total[1] for total in sums.values())
    step_bytes = sum(total[2] for total in sums.values()) / len(steps)
    rows = []
    for (op, format, shape), (calls, seconds, num_bytes, flops) in sums.items():
        limit_share, bound = _limit_share(op, format, seconds, num_bytes, flops, step_bytes, limits)
        rows.append(
            OpRow(
                op,
                format,
                shape,
                int(calls),
                seconds,
                seconds / all_s if all_s else 0.0,
                int(num_bytes),
                int(flops),
                limit_share,
                bound,
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _limit_share(
    op: str,
    format: str,
    seconds: float,
    num_bytes: float,
    flops: float,
    step_bytes: float,
    limits: MachineLimits | None,
) -> tuple[float | None, str | None]:
    if limits is None or not seconds:
        return None, None
    # A step reads its bytes over and over, so what the caches can hold of them counts.
    memory = num_bytes / seconds / 1e9 / limits.read_gb_s(step_bytes)
    formats = format.split("+") if op.startswith("linear") else ["F32"]
    peak = min(peak_of(name, limits) for name in formats)
    compute = flops / seconds / 1e9 / peak
    return (memory, "memory") if memory >= compute else (compute, "compute")


def label(program: Program, instruction: Instruction, kv_dtype: str) -> tuple[str, str, str]:
    """(op, format, shape) of a kind of instruction: what is equal in layers that look alike."""
    name = instruction.opcode.name.lower()
    matrices = instruction.matrices or instruction.read_weights
    weights = [program.weights[w] for w in matrices]
    names = "+".join(dict.fromkeys(w.name.removesuffix(".weight").rpartition(".")[2] for w in weights))
    formats = "+".join(dict.fromkeys(weight_label(w) for w in weights))
    columns = [program.buffers[i].columns for i in instruction.outputs]
    match instruction.opcode:
        case Opcode.LINEAR:
            num_rows = sum(w.shape[0] for w in weights)
            return f"linear {names}", formats, f"{num_rows} x {weights[0].shape[1]}"
        case Opcode.ATTENTION:
            head_dim, window = instruction.attribute("head_dim"), instruction.attribute("window")
            assert isinstance(head_dim, int)
            seen = "" if window is None else f", window {window}"
            return name, kv_dtype, f"{columns[0] // head_dim} heads of {head_dim}{seen}"
        case Opcode.STORE_KV:
            return name, kv_dtype, str(program.buffers[instruction.read_buffers[0]].columns)
        case Opcode.EMBED:
            return name, formats, str(columns[0])
        case Opcode.RMS_NORM:
            return f"{name} {names}", "", str(columns[0])
    return name, "", str(columns[0])


def _torch_rows(steps: Sequence[Step]) -> tuple[OpRow, ...]:
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0])
    for step in steps:
        for op in step.torch_ops:
            for i, value in enumerate((1, op.self_s, op.flops)):
                sums[op.name][i] += value
    all_s = sum(total[1] for total in sums.values())
    rows = [
        OpRow(name, "", "", int(calls), seconds, seconds / all_s, 0, int(flops), None, None)
        for name, (calls, seconds, flops) in sums.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _threads(trace: Trace, steps: Sequence[Step], forward_s: float) -> tuple[ThreadUse, ...]:
    """Thread 0 waits at the end of shared work; another one whenever it has no work of the forward pass."""
    busy = [0.0] * trace.num_threads
    waited = 0.0
    for step in steps:
        if step.events is None:
            return ()
        inside = step.events[step.events["instruction"] >= 0]
        lengths = (inside["end_ns"] - inside["begin_ns"]) / 1e9
        waited += float(lengths[inside["kind"] == EVENT_WAIT].sum())
        busy[0] += float(lengths[inside["kind"] == EVENT_OP].sum())
        for thread in range(1, trace.num_threads):
            of_thread = (inside["kind"] == EVENT_BUSY) & (inside["thread"] == thread)
            busy[thread] += float(lengths[of_thread].sum())
    others = (ThreadUse(seconds, max(0.0, forward_s - seconds)) for seconds in busy[1:])
    return (ThreadUse(busy[0] - waited, waited), *others)
