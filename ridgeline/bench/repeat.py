"""How often a measurement is repeated: until its medians are known to a few percent, or the time is over.

A shared machine drifts within minutes, so one long iteration says little about the next. `repeat` runs many
short ones: warm-ups until they stop getting faster, then at least `num_iters`, then more until the 95 %
interval of every median is within 5 % of it. Which of the two ended it is part of the result. Every iteration
gets a seed of its own, so that no prompt was seen before, and takes its turn with other measurements on this
machine (see `turns`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ridgeline.bench.intervals import MIN_SAMPLES, half_width
from ridgeline.bench.result import Better, Metric
from ridgeline.bench.turns import turn
from ridgeline.errors import ConfigError

TARGET_HALF_WIDTH = 0.05
"""Of the interval of a median, as a share of the median."""
_STILL_WARMING = 0.95
"""A warm-up this much shorter than the one before calls for another."""
_MAX_EXTRA_WARMUPS = 5
_WARMUP_SEED = 1 << 20
"""Seeds of warm-ups are apart from those of iterations."""

Samples = Mapping[str, Sequence[float]]
Progress = Callable[[int, int, str], None]
"""(iterations done, iterations at least, what is known so far)."""
Kinds = Mapping[str, tuple[str, Better]]
"""Metric name -> unit and direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatOptions:
    """How often and how long. The fields are flags."""

    num_iters: int = 20
    """Iterations that count, at least; a P95 needs 20 samples, a P99 100."""
    num_iters_warmup: int = 2
    """Iterations before, that do not count; more follow while they still get faster."""
    max_time: float = 120.0
    """Seconds after which no iteration is added for the sake of a narrower interval."""

    def __post_init__(self) -> None:
        if self.num_iters < MIN_SAMPLES:
            raise ConfigError(
                f"--num-iters {self.num_iters}: an interval needs at least {MIN_SAMPLES}; give more"
            )
        if self.num_iters_warmup < 0 or self.max_time < 0:
            raise ConfigError("--num-iters-warmup and --max-time: expected 0 or more")


@dataclass(frozen=True, slots=True)
class Repeated:
    """All samples, in time order, and why there are so many."""

    metrics: tuple[Metric, ...]
    seeds: tuple[int, ...]
    started_at: tuple[float, ...]
    """When each iteration began, in seconds since 1970."""
    num_warmups: int
    stopped: Literal["precise", "time"]
    seconds: float

    def details(self) -> dict[str, Any]:
        """For the document."""
        return {
            "num_iters": len(self.seeds),
            "num_warmups": self.num_warmups,
            "stopped": self.stopped,
            "target_half_width": TARGET_HALF_WIDTH,
            "half_widths": {metric.name: precision(metric) for metric in self.metrics},
            "intervals_in_turns": {
                metric.name: list(metric.interval(in_turns=True)) for metric in self.metrics
            },
            "started_at": list(self.started_at),
            "seconds": self.seconds,
        }


def precision(metric: Metric) -> float:
    """Half-width of the interval of the median, as a share of the median."""
    return half_width(metric.interval(), statistics.median(metric.samples))


def repeat(
    run: Callable[[int], Samples],
    options: RepeatOptions,
    *,
    seed: int,
    kinds: Kinds,
    progress: Progress | None = None,
) -> Repeated:
    """Call run as often as needed, iteration k with seed + k -> its samples by metric name.

    A metric without any sample (TPOT of single tokens) is left out.
    """
    num_warmups = _warm_up(run, options, seed + _WARMUP_SEED, progress)
    started = time.monotonic()
    iterations: list[Samples] = []
    started_at: list[float] = []
    while True:
        with turn():
            started_at.append(time.time())
            iterations.append(run(seed + len(iterations)))
        done, seconds = len(iterations), time.monotonic() - started
        widest, stopped = "", None
        if done >= options.num_iters:
            metrics = _pool(iterations, kinds)
            least_known = max(metrics, key=precision)
            widest = f"{least_known.name} ± {precision(least_known):.1%}"
            if precision(least_known) <= TARGET_HALF_WIDTH:
                stopped = "precise"
            elif seconds >= options.max_time:
                stopped = "time"
        if progress is not None:
            progress(done, options.num_iters, widest)
        if stopped is not None:
            seeds = tuple(seed + k for k in range(done))
            return Repeated(metrics, seeds, tuple(started_at), num_warmups, stopped, seconds)  # type: ignore[arg-type]


def _warm_up(
    run: Callable[[int], Samples], options: RepeatOptions, seed: int, progress: Progress | None
) -> int:
    durations: list[float] = []
    while len(durations) < options.num_iters_warmup or (
        options.num_iters_warmup <= len(durations) < options.num_iters_warmup + _MAX_EXTRA_WARMUPS
        and len(durations) >= 2
        and durations[-1] < _STILL_WARMING * durations[-2]
    ):
        if progress is not None:
            progress(0, options.num_iters, "warming up")
        with turn():
            started = time.monotonic()
            run(seed + len(durations))
            durations.append(time.monotonic() - started)
    return len(durations)


def _pool(iterations: Sequence[Samples], kinds: Kinds) -> tuple[Metric, ...]:
    """One metric each, its rounds the iterations."""
    pooled = []
    for name, (unit, better) in kinds.items():
        parts = [tuple(samples.get(name, ())) for samples in iterations]
        if any(parts):
            rounds = tuple(len(part) for part in parts)
            pooled.append(
                Metric(
                    name, unit, better, sum(parts, ()), rounds if min(rounds) > 0 and max(rounds) > 1 else ()
                )
            )
    return tuple(pooled)
