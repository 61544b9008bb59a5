"""The climb: one process after another, each with one switch more, and then the top without each switch.

A rung that makes worse what it is there for stays in the record as a loss and is left out of the next ones;
so the top is what pays on this machine. Before it counts as one it is measured again, with the configuration
before it, because two processes on a shared machine differ by more than two runs of one. A rung that cannot
run is a row with its reason. Greedy tokens and logits are compared with those of the first rung that ran.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ridgeline.bench.result import Metric, make_document
from ridgeline.bench.workload import Workload
from ridgeline.errors import RidgelineError
from ridgeline.ladder.process import run_job
from ridgeline.ladder.rungs import (
    AIMS,
    FULL,
    QUICK,
    RUNGS,
    WINDOW_TOKENS,
    Plan,
    Rung,
    combined,
    missing,
    without,
)

MARGIN = 0.05
"""Changes of less than this are called none."""

Verdict = Literal["start", "gain", "none", "loss", "not run"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One configuration. Times in seconds, medians over requests and repeats; samples are one a repeat."""

    wall_s: tuple[float, ...]
    output_tok_s: tuple[float, ...]
    ttft_s: float
    tpot_s: float | None
    itl_p99_s: float | None
    """Median over repeats of the 99th percentile of all gaps between tokens."""
    load_s: float
    warm_up_s: float
    """Compiling included."""
    peak_memory_bytes: int | None
    """Of the process while it serves; None where the high-water mark cannot be set back after loading."""
    kv_cache_bytes: int
    kl_mean: float
    """Mean KL(first rung || this one) per token of the text, in nats."""
    top1_agreement: float
    num_requests: int
    num_same_requests: int
    """Requests whose greedy tokens are all those of the first rung."""
    first_difference: int | None
    """Earliest place in an answer, from 0, where a token differs; None: all are the same."""

    def value(self, aim: str) -> float | None:
        """What AIMS calls `aim`, as one number."""
        found: tuple[float, ...] | float | None = getattr(self, aim)
        return statistics.median(found) if isinstance(found, tuple) else found


@dataclass(frozen=True, slots=True)
class Step:
    """One row: a rung added, or taken away from the top."""

    rung: Rung
    options: Mapping[str, Any]
    """All options of this configuration."""
    verdict: Verdict
    """A gain or loss in what the rung is there for."""
    measured: Measured | None = None
    reason: str | None = None
    """Why it was not run."""
    change: float | None = None
    """By what factor the aim became better (above 1) than before it; of a removal: than without it."""
    speed_up: float | None = None
    """Output tok/s over the configuration before it; of a removal: of the top over this."""
    speed_up_total: float | None = None
    """Output tok/s over the first rung that ran."""
    also_gone: tuple[str, ...] = ()
    """Of a removal: rungs that cannot be without it."""


@dataclass(frozen=True, slots=True)
class Climb:
    """All that was measured."""

    model: str
    plan: Plan
    steps: tuple[Step, ...]
    removals: tuple[Step, ...]
    """The top configuration without each switch that it has."""
    top: tuple[str, ...]
    """Names of the rungs that stayed."""
    text: str
    """What the logits were compared on."""
    margin: float = MARGIN

    def document(self) -> dict[str, Any]:
        """The result document, kind "ladder": samples as metrics, rows in `details`."""
        metrics = [
            Metric(f"{prefix}{step.rung.name}: {name}", unit, better, getattr(step.measured, name))
            for prefix, steps in (("", self.steps), ("without ", self.removals))
            for step in steps
            if step.measured is not None
            for name, unit, better in _SAMPLED
        ]
        return make_document(
            "ladder",
            metrics=metrics,
            settings={"model": self.model} | {k: v for k, v in asdict(self.plan).items() if k != "workload"},
            workload=self.plan.workload.describe(),
            seeds=list(range(self.plan.repeats)),
            details={
                "top": list(self.top),
                "text": self.text,
                "margin": self.margin,
                "window_tokens": WINDOW_TOKENS,
                "steps": [asdict(step) for step in self.steps],
                "removals": [asdict(step) for step in self.removals],
            },
        )


_SAMPLED: tuple[tuple[str, str, Literal["higher", "lower"]], ...] = (
    ("output_tok_s", "tok/s", "higher"),
    ("wall_s", "s", "lower"),
)

Progress = Callable[[str, str, float, float, Step | None], None]
"""Called with a rung's name, what happens now, cost done and cost in all, and the row when it is ready."""


@dataclass(slots=True)
class _Session:
    """Owns the temporary folder, and what the first rung that ran left for the others to compare with."""

    model: str
    plan: Plan
    folder: Path
    common: dict[str, Any]
    report: Callable[[str, str, Step | None], None]
    first: Measured | None = None
    first_tokens: list[list[int]] | None = None
    text_ids: list[int] | None = None
    text: str = ""

    def options(self, rungs: Sequence[Rung]) -> dict[str, Any]:
        return self.common | combined(rungs) | dict(self.plan.options)

    def measure(self, name: str, options: Mapping[str, Any]) -> Measured | str:
        """One configuration in its own process; a string is the reason why there is none."""
        job = {
            "model": self.model,
            "options": dict(options),
            "workload": str(self.folder / "workload.json"),
            "repeats": self.plan.repeats,
            "rung_s": self.plan.rung_s,
            "reference": str(self.folder / "reference.npy"),
            "token_ids": self.text_ids,
            "text": self.text,
        }
        result = run_job(
            job, limit_s=self.plan.limit_s, on_event=lambda event: self.report(name, event, None)
        )
        if isinstance(result, str):
            return result
        runs = result["runs"]
        tokens = runs[0]["token_ids"]
        if self.first_tokens is None:
            self.first_tokens, self.text_ids, self.text = tokens, result["token_ids"], result["text"]
        differences = [_first_difference(a, b) for a, b in zip(self.first_tokens, tokens, strict=True)]
        different = [d for d in differences if d is not None]
        measured = Measured(
            wall_s=tuple(run["wall_s"] for run in runs),
            output_tok_s=tuple(run["output_tok_s"] for run in runs),
            ttft_s=statistics.median(x for run in runs for x in run["ttft_s"]),
            tpot_s=_median([x for run in runs for x in run["tpot_s"]]),
            itl_p99_s=_median([run["itl_p99_s"] for run in runs if run["itl_p99_s"] is not None]),
            load_s=result["load_s"],
            warm_up_s=result["warm_up_s"],
            peak_memory_bytes=result["peak_memory_bytes"],
            kv_cache_bytes=result["kv_cache_bytes"],
            kl_mean=result["kl_mean"],
            top1_agreement=result["top1_agreement"],
            num_requests=len(tokens),
            num_same_requests=len(tokens) - len(different),
            first_difference=min(different, default=None),
        )
        if self.first is None:
            self.first = measured
        return measured


def climb(
    model: str,
    *,
    quick: bool = False,
    rungs: Sequence[Rung] = RUNGS,
    workload: Workload | None = None,
    repeats: int | None = None,
    removals: bool = True,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Climb:
    """Measure every rung on top of those before it that did not lose, then the top without each of its own.

    `quick`: a smaller workload, no slow starts. `options`: engine options of every rung, as num_threads.
    Raises RidgelineError where not even one rung could run.
    """
    plan = QUICK if quick else FULL
    plan = replace(
        plan,
        workload=workload or plan.workload,
        repeats=repeats or plan.repeats,
        options=dict(options or {}),
    )
    cost = {r.name: r.cost if plan.slow_starts or not r.slow_start else 0.0 for r in rungs}
    total = sum(cost.values()) + (len(rungs) - 1 if removals else 0)
    done = 0.0

    def report(name: str, event: str, step: Step | None) -> None:
        if progress is not None:
            progress(name, event, done, total, step)

    with tempfile.TemporaryDirectory(prefix="ridgeline-ladder-") as folder:
        session = _Session(model, plan, Path(folder), common_options(plan.workload), report)
        (session.folder / "workload.json").write_text(json.dumps(plan.workload.describe()), encoding="utf-8")
        steps: list[Step] = []
        kept: list[Rung] = []
        current: Measured | None = None  # of the rungs in `kept`
        below: Measured | None = None  # of these without the last
        waiting = list(rungs)
        while waiting:
            rung = waiting.pop(0)
            step = _climb_one(session, rung, kept, current)
            if step.verdict == "loss" and not rung.slow_start and current is not None:
                step, current = _measure_again(session, step, kept, current)
                stayed = next(i for i, s in enumerate(steps) if s.rung is kept[-1])
                steps[stayed] = _judged(session, replace(steps[stayed], measured=current), below)
            if step.measured is not None and step.verdict != "loss":
                kept.append(rung)
                below, current = current, step.measured
            elif not steps:  # no torch: its other options hold for all, and the native kernels come first
                kept.append(rung)
                waiting.sort(key=lambda later: later.options.get("executor") != "native")
            steps.append(step)
            done += cost[rung.name]
            report(rung.name, "ready", step)
        if current is None:
            raise RidgelineError(
                "no rung of the ladder could run: "
                + "; ".join(f"{s.rung.name}: {s.reason}" for s in steps[:3])
            )
        removed: list[Step] = []
        for rung in kept[1:] if removals else ():
            step_or_none = _take_away(session, rung, kept, current)
            done += 1
            if step_or_none is not None:
                removed.append(step_or_none)
                report(rung.name, "ready", step_or_none)
        return Climb(model, plan, tuple(steps), tuple(removed), tuple(r.name for r in kept), session.text)


def common_options(workload: Workload) -> dict[str, Any]:
    """Engine options that the workload calls for, the same on every rung.

    The cache holds half of what all running requests could need, so that how it is handed out matters.
    """
    longest = max(len(r.prompt_token_ids) + r.max_tokens for r in workload.requests(vocab_size=1, seed=0))
    max_model_len = -(-max(longest, WINDOW_TOKENS) // 32) * 32
    max_num_seqs = workload.max_concurrency or 16
    return {
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs * max_model_len,
        "kv_cache_tokens": max(1, max_num_seqs // 2) * max_model_len,
    }


def _climb_one(session: _Session, rung: Rung, kept: Sequence[Rung], current: Measured | None) -> Step:
    options = session.options([*kept, rung])
    lacking = missing(rung, kept)
    if lacking:
        return Step(rung, options, "not run", reason=f"needs {', '.join(lacking)}, which did not stay")
    if rung.slow_start and not session.plan.slow_starts:
        return Step(rung, options, "not run", reason="left out of a quick climb: it starts slowly")
    session.report(rung.name, "start", None)
    measured = session.measure(rung.name, options)
    if isinstance(measured, str):
        return Step(rung, options, "not run", reason=measured)
    return _judged(session, Step(rung, options, "start", measured), current)


def _judged(session: _Session, step: Step, before: Measured | None) -> Step:
    """The row with its verdict and factors against the configuration before it, if there is one."""
    assert step.measured is not None and session.first is not None
    total = _ratio(step.measured, session.first, "output_tok_s")
    if before is None:
        return replace(step, speed_up_total=total)
    change = _ratio(step.measured, before, step.rung.aim)
    return replace(
        step,
        verdict=verdict_of(change),
        change=change,
        speed_up=_ratio(step.measured, before, "output_tok_s"),
        speed_up_total=total,
    )


def _measure_again(
    session: _Session, step: Step, kept: Sequence[Rung], before: Measured
) -> tuple[Step, Measured]:
    """The row and the configuration before it, both with a second process's samples added."""
    again = [
        session.measure(f"{step.rung.name}, again", options)
        for options in (session.options(kept), step.options)
    ]
    if any(isinstance(measured, str) for measured in again) or step.measured is None:
        return step, before
    before, after = (
        _pooled(first, second)
        for first, second in zip((before, step.measured), again, strict=True)
        if isinstance(second, Measured)
    )
    return _judged(session, replace(step, measured=after), before), before


def _pooled(first: Measured, second: Measured) -> Measured:
    """Samples of both; of the P99s the smaller, since what disturbs a run only makes it longer."""
    gaps = [m.itl_p99_s for m in (first, second) if m.itl_p99_s is not None]
    return replace(
        first,
        wall_s=first.wall_s + second.wall_s,
        output_tok_s=first.output_tok_s + second.output_tok_s,
        itl_p99_s=min(gaps, default=None),
    )


def _take_away(session: _Session, rung: Rung, kept: Sequence[Rung], top: Measured) -> Step | None:
    """The top without one rung; None where a later rung replaces all that it set."""
    left = without(rung, kept)
    options = session.options(left)
    if options == session.options(kept):
        return None
    also_gone = tuple(r.name for r in kept if r not in left and r is not rung)
    name = f"without {rung.name}"
    session.report(name, "start", None)
    measured = session.measure(name, options)
    if isinstance(measured, str):
        return Step(rung, options, "not run", reason=measured, also_gone=also_gone)
    assert session.first is not None
    change = _ratio(top, measured, rung.aim)
    return Step(
        rung,
        options,
        verdict_of(change),
        measured,
        change=change,
        speed_up=_ratio(top, measured, "output_tok_s"),
        speed_up_total=_ratio(measured, session.first, "output_tok_s"),
        also_gone=also_gone,
    )


def _ratio(new: Measured, old: Measured, aim: str) -> float | None:
    """How many times better `new` is; None where there is nothing to compare."""
    a, b = new.value(aim), old.value(aim)
    if not a or not b:
        return None
    return a / b if AIMS[aim][1] else b / a


def verdict_of(change: float | None) -> Verdict:
    """What a change of the aim, as a factor, is called."""
    if change is None or abs(change - 1) < MARGIN:
        return "none"
    return "gain" if change > 1 else "loss"


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
