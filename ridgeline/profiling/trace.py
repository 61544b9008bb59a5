"""Where the time of an engine goes: ranges of Python, ops of every thread, on one time axis.

`trace` wraps the bound methods of one engine while it records, so the engine itself has no hooks and pays
nothing when nobody looks. Native ops come from the library's own timeline, whose clock is that of
time.perf_counter_ns; torch ops come from torch.profiler, where our ranges appear as record_function ranges.

The result is written in Chrome's trace format (traceEvents with complete "X" events), which Perfetto opens.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ridgeline.engine.engine import LLMEngine
from ridgeline.engine.executors.native import NativeExecutor
from ridgeline.engine.scheduler import StepPlan
from ridgeline.ops.native import EVENT_BUSY, EVENT_WAIT, NativeProgram
from ridgeline.ops.program import Instruction, Opcode, Program, StepShape
from ridgeline.sampling_params import SamplingParams

Phase = Literal["prefill", "decode"]
PYTHON_TID = 1
"""Thread ids in the file: Python first, then the kernels' threads; torch's own export keeps its own."""
NATIVE_TID = 10
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Range:
    """Something that Python did, in nanoseconds of time.perf_counter_ns."""

    name: str
    begin_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class TorchOp:
    """One op that torch ran: its own time, without that of the ops inside it."""

    name: str
    self_s: float
    flops: int


@dataclass(slots=True)
class Step:
    """One engine step. Owned by the recording until it ends."""

    number: int
    begin_ns: int
    end_ns: int = 0
    phase: Phase = "decode"
    shape: StepShape = field(default_factory=lambda: StepShape((), 0))
    ranges: list[Range] = field(default_factory=list)
    events: npt.NDArray[np.void] | None = None
    """Native only: of dtype `ops.native.EVENT`."""
    torch_ops: list[TorchOp] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e9

    def seconds(self, name: str) -> float:
        """Time in all ranges of this name."""
        return sum(r.end_ns - r.begin_ns for r in self.ranges if r.name == name) / 1e9


@dataclass(slots=True)
class Trace:
    """What was recorded. `program` is None for executors that have none (torch)."""

    program: Program | None
    kv_token_bytes: int
    kv_dtype: str
    num_threads: int
    steps: list[Step] = field(default_factory=list)
    outside: list[Range] = field(default_factory=list)
    """Ranges between steps, such as tokenizing a prompt."""
    torch_events: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The trace in Chrome's format; times are microseconds from the first event."""
        if self.torch_events:
            return {"traceEvents": self.torch_events, "displayTimeUnit": "ms"}
        starts = [r.begin_ns for r in self.outside] + [s.begin_ns for s in self.steps]
        zero = min(starts, default=0)
        events = [_name("process_name", "ridgeline", PYTHON_TID), _name("thread_name", "Python", PYTHON_TID)]
        for thread in range(self.num_threads if self.program is not None else 0):
            events.append(_name("thread_name", f"kernels, thread {thread}", NATIVE_TID + thread))
        events += [_complete(r.name, r.begin_ns - zero, r.end_ns - zero) for r in self.outside]
        for step in self.steps:
            sizes = {
                "phase": step.phase,
                "tokens": step.shape.num_tokens,
                "sequences": [list(sequence) for sequence in step.shape.sequences],
                "logit rows": step.shape.num_logits,
            }
            events.append(
                _complete(f"step {step.number}", step.begin_ns - zero, step.end_ns - zero, args=sizes)
            )
            events += [_complete(r.name, r.begin_ns - zero, r.end_ns - zero) for r in step.ranges]
            events += self._native_events(step, zero)
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def _native_events(self, step: Step, zero: int) -> Iterator[dict[str, Any]]:
        if step.events is None or self.program is None:
            return
        for begin_ns, end_ns, number, thread, kind in step.events.tolist():
            begin, end, tid = begin_ns - zero, end_ns - zero, NATIVE_TID + thread
            if kind == EVENT_WAIT:
                yield _complete("wait", begin, end, tid=tid)
            elif number < 0:
                yield _complete("sampling", begin, end, tid=tid)
            elif kind == EVENT_BUSY:
                yield _complete(op_name(self.program, self.program.instructions[number]), begin, end, tid=tid)
            else:
                instruction = self.program.instructions[number]
                args = self.op_args(instruction, step.shape, (end_ns - begin_ns) / 1e9) | {"number": number}
                yield _complete(op_name(self.program, instruction), begin, end, tid=tid, args=args)

    def op_args(self, instruction: Instruction, shape: StepShape, seconds: float) -> dict[str, Any]:
        """What one op moved and computed, and how fast."""
        assert self.program is not None
        num_bytes = self.program.instruction_bytes(instruction, shape, kv_token_bytes=self.kv_token_bytes)
        flops = self.program.instruction_flops(instruction, shape)
        buffers = instruction.outputs or instruction.read_buffers
        args = {
            "rows": self.program.num_rows(buffers[0], shape),
            "bytes": num_bytes,
            "flops": flops,
        }
        per_ns = 1 / (1e9 * max(seconds, 1e-9))
        return args | {"GB/s": round(num_bytes * per_ns, 3), "GFLOP/s": round(flops * per_ns, 3)}

    def save(self, path: Path) -> None:
        """Write the file that ui.perfetto.dev and chrome://tracing open."""
        path.write_text(json.dumps(self.document()), encoding="utf-8")


def op_name(program: Program, instruction: Instruction) -> str:
    """`linear layers.3.q_proj+k_proj+v_proj`, `attention layer 3`, `glu`."""
    name = instruction.opcode.name.lower()
    if instruction.opcode in (Opcode.ATTENTION, Opcode.STORE_KV):
        return f"{name} layer {instruction.attribute('layer')}"
    matrices = instruction.matrices or instruction.read_weights
    names = [program.weights[w].name for w in matrices]
    return " ".join([name, "+".join(names[:1] + [n.rpartition(".")[2] for n in names[1:]])]).strip()


def _complete(
    name: str, begin_ns: int, end_ns: int, *, tid: int = PYTHON_TID, args: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    event = {"name": name, "ph": "X", "ts": begin_ns / 1e3, "dur": (end_ns - begin_ns) / 1e3, "pid": 1}
    return event | {"tid": tid} | ({"args": dict(args)} if args else {})


def _name(what: str, name: str, tid: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": tid, "args": {"name": name}}


class _Recording:
    """Owns the open ranges while an engine runs. `annotate(name)` also opens a range in torch's profiler."""

    def __init__(self, trace: Trace, annotate: Callable[[str], Any] | None) -> None:
        self._trace = trace
        self._annotate = annotate
        self._step: Step | None = None
        self._num_steps = 0

    def begin(self, name: str) -> tuple[str, int, Any]:
        annotation = None
        if self._annotate is not None:
            annotation = self._annotate(name)
            annotation.__enter__()
        return name, time.perf_counter_ns(), annotation

    def end(self, opened: tuple[str, int, Any]) -> None:
        name, begin_ns, annotation = opened
        if annotation is not None:
            annotation.__exit__(None, None, None)
        ranges = self._trace.outside if self._step is None else self._step.ranges
        ranges.append(Range(name, begin_ns, time.perf_counter_ns()))

    def ranged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            opened = self.begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                self.end(opened)

        return call

    def step(self, function: Callable[[], Any], native: NativeProgram | None) -> Callable[[], Any]:
        def call() -> Any:
            annotation = self._annotate(_step_name(self._num_steps)) if self._annotate is not None else None
            if annotation is not None:
                annotation.__enter__()
            step = self._step = Step(self._num_steps, time.perf_counter_ns())
            try:
                return function()
            finally:
                step.end_ns = time.perf_counter_ns()
                if annotation is not None:
                    annotation.__exit__(None, None, None)
                if native is not None:
                    step.events = native.take_events()
                self._trace.steps.append(step)
                self._step = None
                self._num_steps += 1

        return call

    def submit(self, function: Callable[[StepPlan], Any]) -> Callable[[StepPlan], Any]:
        """Layout before the forward pass, sampling after it: `forward` closes the one and opens the other."""

        def call(plan: StepPlan) -> Any:
            assert self._step is not None
            self._step.phase, self._step.shape = phase_of(plan), shape_of(plan)
            self._around = self.begin("batch layout")
            try:
                return function(plan)
            finally:
                self.end(self._around)

        return call

    def forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.end(self._around)
            opened = self.begin("forward")
            try:
                return function(*args, **kwargs)
            finally:
                self.end(opened)
                self._around = self.begin("sampler")

        return call


def phase_of(plan: StepPlan) -> Phase:
    """Prefill as long as any row computes a prompt, the last token of which gives the first output."""
    for row in plan.rows:
        first = row.sampling is not None and row.sampling.num_output == 0
        if len(row.token_ids) > 1 or not row.samples or first:
            return "prefill"
    return "decode"


def shape_of(plan: StepPlan) -> StepShape:
    """Sizes of a step without its padding, which is computed but needed by nobody."""
    return StepShape(
        tuple((len(row.token_ids), row.start + len(row.token_ids)) for row in plan.rows),
        sum(row.num_logits for row in plan.rows),
    )


def _step_name(number: int) -> str:
    return f"step {number}"


@contextmanager
def trace(llm: LLMEngine) -> Iterator[Trace]:
    """Record every step that `llm` takes inside the block; afterwards the Trace is complete.

        with trace(llm.engine) as recorded: ...
        recorded.save(Path("trace.json"))

    One recording at a time, from the thread that owns the engine.
    """
    executor = llm.executor
    native = executor.native if isinstance(executor, NativeExecutor) else None
    layout = llm.layout
    result = Trace(
        program=None if native is None else native.program,
        kv_token_bytes=layout.num_bytes // (layout.num_slots * layout.num_layers),
        kv_dtype=layout.dtype,
        num_threads=1 if native is None else native.num_threads,
    )
    with _torch_profiler(result, llm.config.device if native is None else None) as annotate:
        recording = _Recording(result, annotate)
        target: Any = executor if native is None else native
        forward = "forward" if native is None else "step"
        wrapped: list[tuple[Any, str, Callable[..., Any]]] = [
            (llm, "step", recording.step(llm.step, native)),
            (executor, "submit", recording.submit(executor.submit)),
            (target, forward, recording.forward(getattr(target, forward))),
        ]
        parts: list[tuple[str, Any, str]] = [
            ("schedule", llm.scheduler, "schedule"),
            ("update", llm.scheduler, "update"),
            ("outputs", llm._outputs, "update"),
            ("stats", llm.stats, "record_step"),
        ]
        if llm.tokenizer is not None:
            parts += [("tokenize", llm.tokenizer, "encode"), ("detokenize", llm.tokenizer, "token_bytes")]
        wrapped += [
            (owner, name, recording.ranged(label, getattr(owner, name))) for label, owner, name in parts
        ]
        if native is not None:
            native.record_events()
        for owner, name, replacement in wrapped:
            setattr(owner, name, replacement)
        try:
            yield result
        finally:
            for owner, name, _ in wrapped:
                delattr(owner, name)  # the method of the class is seen again
            if native is not None:
                native.record_events(0)


def record_requests(
    llm: LLMEngine,
    *,
    prompt_len: int,
    output_len: int,
    batch_size: int = 1,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Serve `batch_size` requests of random tokens, greedily and past end-of-sequence, and record them.

    A batch of the same size and other tokens goes before, unrecorded: caches are warm and code is compiled.
    `on_step` gets (output tokens so far, all), between steps. Raises RequestError for what does not fit.
    """
    rng = random.Random(seed)
    total = batch_size * (output_len + min(output_len, WARM_UP_TOKENS))
    done = 0

    def serve(num_output: int) -> None:
        nonlocal done
        params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
        for _ in range(batch_size):
            prompt = [rng.randrange(llm.model.config.vocab_size) for _ in range(prompt_len)]
            llm.add_request({"prompt_token_ids": prompt}, params)
        while llm.has_unfinished:
            done += len(llm.step())
            on_step(done, total)

    serve(min(output_len, WARM_UP_TOKENS))
    with trace(llm) as recorded:
        serve(output_len)
    return recorded


@contextmanager
def _torch_profiler(result: Trace, device: str | None) -> Iterator[Callable[[str], Any] | None]:
    """Run torch.profiler on `device` and take its events over; without one there is nothing to do."""
    if device is None:
        yield None
        return
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities, with_flops=True) as profiler:
        yield record_function
    _take_torch_ops(result, profiler, on_device=device == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "torch.json"
        profiler.export_chrome_trace(str(path))
        result.torch_events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def _take_torch_ops(result: Trace, profiler: Any, *, on_device: bool) -> None:
    """Give every op to the step in whose range it began."""
    events = profiler.events()
    names = {_step_name(step.number): step for step in result.steps}
    ours = {r.name for step in result.steps for r in step.ranges} | {r.name for r in result.outside}
    starts = sorted((e.time_range.start, e.name) for e in events if e.name in names and not _on_device(e))
    if not starts:
        return
    times = [start for start, _ in starts]
    for event in events:
        at = bisect_right(times, event.time_range.start) - 1
        if at < 0 or event.name in ours or event.name in names or _on_device(event):
            continue
        self_us = event.self_device_time_total if on_device else event.self_cpu_time_total
        if self_us > 0:
            # The name of a compiled graph is a hash; its own time is that of its fused kernels.
            name = "compiled graph" if "CompiledFxGraph" in event.name else event.name
            names[starts[at][1]].torch_ops.append(TorchOp(name, self_us / 1e6, int(event.flops or 0)))


def _on_device(event: Any) -> bool:
    """Kernels are listed once more on their own; their time is already that of the op that launched them."""
    return "CPU" not in str(event.device_type)
