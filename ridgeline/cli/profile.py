"""`ridgeline profile`: where the time of prefill and decode goes, op by op, and what that says."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from ridgeline.bench.result import Metric, make_document
from ridgeline.cli.options import print_json
from ridgeline.cli.terminal import progress_bar, say
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError
from ridgeline.profiling.breakdown import OpRow, PhaseBreakdown, break_down
from ridgeline.profiling.findings import Finding, find
from ridgeline.profiling.machine import MachineLimits, machine_limits
from ridgeline.profiling.trace import Phase, Trace, record_requests


def profile(
    *,
    engine: EngineConfig,
    prompt_len: int = 128,
    output_len: int = 32,
    batch_size: int = 1,
    out: Path | None = None,
    top: int = 15,
    json: bool = False,
) -> None:
    """Run requests of random tokens and show where the time goes: by op, by thread, and in words.

    Examples:

        ridgeline profile -m smollm2

        ridgeline profile -m smollm2 --prompt-len 512 --batch-size 8 --out trace.json

        ridgeline profile -m smollm2 --executor eager --top 30

        ridgeline profile -m model.gguf --json | tail -1 | jq .details.findings

    Parameters
    ----------
    prompt_len
        Tokens of each prompt.
    output_len
        Tokens of each answer; the first one comes from the prefill.
    batch_size
        Requests at the same time.
    out
        Write the timeline here, in the format that ui.perfetto.dev and chrome://tracing open.
    top
        Rows of each table.
    json
        End with one JSON document: both breakdowns with all rows, and the findings.
    """
    for flag, value in (
        ("--prompt-len", prompt_len),
        ("--output-len", output_len),
        ("--batch-size", batch_size),
        ("--top", top),
    ):
        if value < 1:
            raise ConfigError(f"{flag} {value}: expected at least 1")
    if batch_size > engine.scheduler.max_num_seqs:
        raise ConfigError(
            f"--batch-size {batch_size} is more than the {engine.scheduler.max_num_seqs} requests that run "
            f"at the same time; add --max-num-seqs {batch_size}"
        )
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.absolute().parent}; make it first")
    if engine.max_model_len is None:
        engine = engine.with_options(max_model_len=prompt_len + output_len)
    llm = LLMEngine.from_config(engine)
    try:
        limits = None
        if llm.config.executor == "native":
            limits = machine_limits(num_threads=engine.num_threads, progress=say)
        with progress_bar("recording") as report:
            recorded = record_requests(
                llm,
                prompt_len=prompt_len,
                output_len=output_len,
                batch_size=batch_size,
                on_step=report,
            )
    finally:
        llm.close()
    if out is not None:
        recorded.save(out)
        say(f"timeline written to {out}; open it at https://ui.perfetto.dev")
    phases = [b for b in (break_down(recorded, phase, limits) for phase in get_args(Phase)) if b is not None]
    findings = sorted((f for b in phases for f in find(b, limits)), key=lambda f: -f.share)
    if json:
        chosen = {"prompt_len": prompt_len, "output_len": output_len, "batch_size": batch_size}
        print_json(_document(recorded, phases, findings, limits, llm.config.flat() | chosen))
        return
    lines = [line for b in phases for line in (*_table(b, top, limits), "")]
    sys.stdout.write("\n".join(lines + [f"{'Findings':8}"] + [f"  {f.text}" for f in findings]) + "\n")


def _table(b: PhaseBreakdown, top: int, limits: MachineLimits | None) -> list[str]:
    """One phase for people: totals, ops, threads, and what lies outside of the forward pass."""
    ms = 1e3 / b.num_steps
    lines = [
        f"{b.phase}: {b.num_steps} steps, {b.num_tokens / b.num_steps:,.0f} tokens and "
        f"{ms * b.wall_s:,.3f} ms each ({b.num_tokens / b.wall_s:,.1f} tok/s)"
    ]
    if b.rows and b.num_bytes:
        gb_s, gflop_s = b.num_bytes / b.ops_s / 1e9, b.flops / b.ops_s / 1e9
        lines.append(
            f"  {b.num_bytes / b.num_steps / 1e6:,.1f} MB and {b.flops / b.num_steps / 1e9:,.2f} GFLOP a step"
            f": {gb_s:,.1f} GB/s, {gflop_s:,.1f} GFLOP/s"
        )
    if limits is not None:
        lines.append(
            f"  limits: {limits.read_gb_s(b.num_bytes / b.num_steps):,.1f} GB/s reading so much, "
            f"{limits.fp32_gflop_s:,.0f} GFLOP/s float32, {limits.int8_gop_s:,.0f} GOP/s int8"
        )
    native = any(row.num_bytes for row in b.rows)
    width = max((len(row.op) for row in b.rows[:top]), default=2) + 2
    heads = f"  {'op':{width}}{'format':9}{'shape':22}" if native else f"  {'op':{width}}"
    heads += f"{'ms/step':>9}{'share':>7}{'calls':>7}"
    heads += f"{'GB/s':>8}{'GFLOP/s':>9}{'of limit':>10}" if native else f"{'GFLOP/s':>9}"
    lines.append(heads)
    for row in b.rows[:top]:
        lines.append(_row(row, width, ms, native))
    if len(b.rows) > top:
        rest = b.rows[top:]
        name = f"{len(rest)} others"
        blank = 31 if native else 0
        lines.append(
            f"  {name:{width + blank}}{ms * sum(r.seconds for r in rest):9.3f}"
            f"{sum(r.share for r in rest):7.1%}{sum(r.calls for r in rest):7}"
        )
    for number, thread in enumerate(b.threads):
        lines.append(
            f"  thread {number}: busy {thread.busy_s / b.wall_s:.1%} of the step, "
            f"waiting {thread.wait_s / b.wall_s:.1%}"
        )
    parts = ", ".join(f"{name} {ms * seconds:.3f}" for name, seconds in b.outside.items())
    lines.append(f"  outside the forward pass: {b.outside_s / b.wall_s:.1%} of the step (ms: {parts})")
    return lines


def _row(row: OpRow, width: int, ms: float, native: bool) -> str:
    line = f"  {row.op:{width}}" + (f"{row.format:9}{row.shape:22}" if native else "")
    line += f"{ms * row.seconds:9.3f}{row.share:7.1%}{row.calls:7}"
    gflop_s = f"{row.gflop_s:9.1f}" if row.flops else f"{'-':>9}"
    if not native:
        return line + gflop_s
    share = f"{'-':>10}" if row.limit_share is None else f"{row.limit_share:6.0%} {(row.bound or '')[:3]}"
    return f"{line}{row.gb_s:8.1f}{gflop_s}{share}"


def _document(
    recorded: Trace,
    phases: list[PhaseBreakdown],
    findings: list[Finding],
    limits: MachineLimits | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """`ridgeline.result/1` with the breakdowns in `details`."""
    metrics = []
    for b in phases:
        samples = tuple(step.wall_s for step in recorded.steps if step.phase == b.phase)
        metrics.append(Metric(f"{b.phase}_step_s", "s", "lower", samples))
    details = {
        "phases": {b.phase: _phase(b) for b in phases},
        "findings": [asdict(f) for f in findings],
        "limits": None if limits is None else asdict(limits),
    }
    return make_document("profile", metrics=metrics, settings=settings, details=details)


def _phase(b: PhaseBreakdown) -> dict[str, Any]:
    rows = [asdict(row) | {"gb_s": row.gb_s, "gflop_s": row.gflop_s} for row in b.rows]
    totals = {"num_bytes": b.num_bytes, "flops": b.flops, "outside_s": b.outside_s}
    return asdict(b) | totals | {"rows": rows}
