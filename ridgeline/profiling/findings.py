"""What a breakdown says, in words: a handful of rules over its numbers, none of which knows a model.

Each rule looks at one phase and gives a sentence with its figure, or nothing. They are sorted by the share of
the time that they speak about, so the first is what to look at first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ridgeline.profiling.breakdown import OpRow, PhaseBreakdown
from ridgeline.profiling.machine import MachineLimits
from ridgeline.profiling.trace import Phase

NOTABLE_SHARE = 0.1
"""Less of a step than this is not worth a sentence."""
NEAR_LIMIT, FAR_FROM_LIMIT = 0.7, 0.4
"""From here on a kernel is as good as the machine; below there it is not what it could be."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence, with the share of the phase's wall time that it is about."""

    phase: Phase
    rule: str
    share: float
    text: str


def find(breakdown: PhaseBreakdown, limits: MachineLimits | None) -> list[Finding]:
    """All that the rules have to say about a phase, the largest share of its time first."""
    found = [
        Finding(breakdown.phase, rule.__name__, share, text)
        for rule in RULES
        for share, text in rule(breakdown, limits)
    ]
    return sorted(found, key=lambda finding: -finding.share)


Rule = Callable[[PhaseBreakdown, MachineLimits | None], Iterator[tuple[float, str]]]


def bound_by(b: PhaseBreakdown, limits: MachineLimits | None) -> Iterator[tuple[float, str]]:
    """Memory or arithmetic: what the linears, which are most of the work, are nearer to."""
    linears = [row for row in b.rows if row.op.startswith("linear")]
    seconds = sum(row.seconds for row in linears)
    if limits is None or not seconds or b.num_steps == 0:
        return
    num_bytes, flops = sum(row.num_bytes for row in linears), sum(row.flops for row in linears)
    gb_s, gflop_s = num_bytes / seconds / 1e9, flops / seconds / 1e9
    memory_s = sum(row.seconds for row in linears if row.bound == "memory")
    limit_share = sum((row.limit_share or 0.0) * row.seconds for row in linears) / seconds
    if memory_s >= seconds / 2:
        kind = "bandwidth-bound" if limit_share >= NEAR_LIMIT else "nearer to the memory's limit"
        limit = limits.read_gb_s(b.num_bytes / b.num_steps)
        figure = (
            f"linears read {num_bytes / b.num_steps / 1e6:,.0f} MB a step at {gb_s:,.1f} GB/s, "
            f"{gb_s / limit:.0%} of the {limit:,.1f} GB/s that this machine reads as many bytes with"
        )
    else:
        kind = "compute-bound" if limit_share >= NEAR_LIMIT else "nearer to the arithmetic limit"
        figure = (
            f"linears do {flops / b.num_steps / 1e9:,.1f} GFLOP a step at {gflop_s:,.0f} GFLOP/s, "
            f"{limit_share:.0%} of the peak for their formats"
        )
    yield seconds / b.wall_s, f"{b.phase} is {kind}: {figure}"


def large_ops(b: PhaseBreakdown, _limits: MachineLimits | None) -> Iterator[tuple[float, str]]:
    """Ops besides the linears that take a notable part of the step."""
    for row in _notable(b):
        if row.op.startswith("linear") or row.calls == 0:
            continue
        low, high = b.contexts
        context = f" at a context of {low if low == high else f'{low} to {high}'}" * (row.op == "attention")
        yield (
            row.seconds / b.wall_s,
            f"{row.op} is {row.seconds / b.wall_s:.0%} of {b.phase}{context} "
            f"({1e3 * row.seconds / b.num_steps:,.3f} ms a step, {row.calls // b.num_steps} calls)",
        )


def slow_linears(b: PhaseBreakdown, _limits: MachineLimits | None) -> Iterator[tuple[float, str]]:
    """Matrices that stay far from both limits."""
    for row in _notable(b):
        if row.op.startswith("linear") and row.limit_share is not None and row.limit_share < FAR_FROM_LIMIT:
            microseconds = 1e6 * row.seconds / row.calls
            yield (
                row.seconds / b.wall_s,
                f"{row.op} {row.format} ({row.shape}) reaches {row.limit_share:.0%} of the {row.bound} limit "
                f"in {b.phase}: {microseconds:,.0f} us a call, {row.gb_s:,.1f} GB/s, "
                f"{row.gflop_s:,.0f} GFLOP/s",
            )


def idle_threads(b: PhaseBreakdown, _limits: MachineLimits | None) -> Iterator[tuple[float, str]]:
    """Threads with nothing to do during the forward pass, and why there is less for them."""
    for number, thread in enumerate(b.threads):
        idle = thread.wait_s / b.wall_s
        if len(b.threads) > 1 and idle >= NOTABLE_SHARE / 2:
            yield (
                idle,
                f"thread {number} waits for the others {idle:.0%} of {b.phase} "
                f"({1e3 * thread.wait_s / b.num_steps:,.3f} ms a step)",
            )


def outside_forward(b: PhaseBreakdown, _limits: MachineLimits | None) -> Iterator[tuple[float, str]]:
    """Scheduler, batch, sampler, text: everything but the forward pass."""
    share = b.outside_s / b.wall_s
    largest = sorted(b.outside, key=lambda name: -b.outside[name])[:2]
    parts = ", ".join(f"{name} {1e3 * b.outside[name] / b.num_steps:,.3f}" for name in largest)
    if share >= NOTABLE_SHARE / 5:
        yield (
            share,
            f"what is not the forward pass takes {1e3 * b.outside_s / b.num_steps:,.3f} ms, {share:.0%} of a "
            f"{b.phase} step (most: {parts} ms)",
        )


def between_ops(b: PhaseBreakdown, _limits: MachineLimits | None) -> Iterator[tuple[float, str]]:
    """Time of the forward pass that no op accounts for."""
    gap_s = b.forward_s - b.ops_s
    if b.rows and gap_s / b.wall_s >= NOTABLE_SHARE / 2:
        yield (
            gap_s / b.wall_s,
            f"{gap_s / b.wall_s:.0%} of {b.phase} passes in the forward pass but between its ops "
            f"({1e3 * gap_s / b.num_steps:,.3f} ms a step)",
        )


RULES: tuple[Rule, ...] = (bound_by, large_ops, slow_linears, idle_threads, outside_forward, between_ops)


def _notable(b: PhaseBreakdown) -> list[OpRow]:
    return [row for row in b.rows if row.seconds / b.wall_s >= NOTABLE_SHARE]
