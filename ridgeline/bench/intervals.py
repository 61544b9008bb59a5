"""How far a measured figure can be trusted: percentiles, intervals, differences, from samples in time order.

Samples of one machine are not independent: clocks, neighbours and caches change slowly. So whole stretches
are resampled, not single samples: blocks as long as the samples are correlated (circular block bootstrap,
Politis and Romano 1992), of whole rounds where a measurement has rounds. From few stretches a bootstrap is
too sure of itself; the interval is widened by Student's t and sqrt(k / (k - 1)) for k of them (the expanded
interval of Hesterberg 2015).

Such an interval covers the drift of the machine. Two measurements that took turns saw the same drift, and it
says nothing of their difference: `in_turns` keeps it, and resamples within short windows of time only, the
blocks of a design of experiments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ridgeline.errors import ConfigError

Statistic = Literal["median", "mean"]
Floats = NDArray[np.float64]

MIN_SAMPLES = 5
"""Fewer samples, or rounds, have no interval."""
NUM_RESAMPLES = 2000
WINDOW = 10
"""Consecutive samples, or rounds, within which a machine is taken to be one machine."""
PROCESS_SPREAD = 0.006
"""Standard deviation, as a share, of what a process adds to all its figures alike (where its memory lies, see
Mytkowicz et al. 2009): no number of samples in one process shows it. From a pilot of 24 pairs of processes:
what their medians of decode differ by beyond the noise of sampling; those of prefill by a fifth of that."""
_CHUNK = 1 << 20
"""Numbers resampled at a time."""
_Z95 = 1.959963984540054


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) with linear interpolation, as numpy's default. Raises ConfigError."""
    if not samples or not 0 <= q <= 100:
        raise ConfigError(
            f"percentile {q} of {len(samples)} samples: expected 0 to 100 and at least one sample"
        )
    return float(np.percentile(np.asarray(samples, np.float64), q))


def bootstrap_interval(
    samples: Sequence[float],
    *,
    statistic: Statistic = "median",
    level: float = 0.95,
    seed: int = 0,
    rounds: Sequence[int] = (),
    process_spread: float = 0.0,
    in_turns: bool = False,
) -> tuple[float, float]:
    """(low, high) of the statistic, from samples in time order.

    `rounds`: how many consecutive samples belong to each independent round; with at least MIN_SAMPLES of
    them whole rounds are resampled. `process_spread` is added to the spread of the samples, see
    PROCESS_SPREAD. `in_turns`: given the machine's course, see above; for what is compared with others that
    took turns with it. Raises ConfigError for fewer than MIN_SAMPLES samples.
    """
    values = np.asarray(samples, np.float64)
    replicates, widening = _replicates(values, statistic, rounds, seed, process_spread, in_turns)
    return _interval(_estimate(values, statistic), replicates, widening, level)


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two sets of samples: b relative to a."""

    ratio: float
    """Statistic of b / statistic of a."""
    low: float
    high: float
    """The interval of the ratio."""
    p_value: float
    """Two-sided, of the ratio being 1."""


def difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    statistic: Statistic = "median",
    level: float = 0.95,
    seed: int = 0,
    rounds_a: Sequence[int] = (),
    rounds_b: Sequence[int] = (),
    process_spread: float = 0.0,
    in_turns: bool = False,
) -> Difference:
    """The ratio of the statistics with its interval; both sets are resampled independently.

    `in_turns`: the samples of a and b took turns, and what the machine did meanwhile is no part of the
    interval. Raises ConfigError for fewer than MIN_SAMPLES samples, or a statistic that is not positive (no
    ratio).
    """
    values_a, values_b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    centre_a, centre_b = _estimate(values_a, statistic), _estimate(values_b, statistic)
    if min(centre_a, centre_b) <= 0:
        raise ConfigError(f"no ratio of {centre_b} to {centre_a}: both must be positive")
    replicates_a, widening_a = _replicates(values_a, statistic, rounds_a, seed, process_spread, in_turns)
    replicates_b, widening_b = _replicates(values_b, statistic, rounds_b, seed + 1, process_spread, in_turns)
    centre = math.log(centre_b / centre_a)
    tiny = np.finfo(np.float64).tiny
    logs = np.log(np.maximum(replicates_b, tiny)) - np.log(np.maximum(replicates_a, tiny))
    widening = max(widening_a, widening_b)
    low, high = _interval(centre, logs, widening, level)
    widened = centre + (logs - centre) * widening
    tail = min(int((widened <= 0).sum()), int((widened >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (len(logs) + 1))
    return Difference(math.exp(centre), math.exp(low), math.exp(high), p_value)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment: below 0.05 afterwards holds for all of them at once."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    for rank, (name, p_value) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_value))
        adjusted[name] = largest
    return adjusted


def half_width(interval: tuple[float, float], centre: float) -> float:
    """Half of the interval as a share of the figure it belongs to."""
    return math.inf if centre == 0 else (interval[1] - interval[0]) / 2 / abs(centre)


def _estimate(values: Floats, statistic: Statistic) -> float:
    if len(values) < MIN_SAMPLES:
        raise ConfigError(
            f"{len(values)} samples: an interval needs at least {MIN_SAMPLES}; measure more iterations"
        )
    return float(np.median(values) if statistic == "median" else np.mean(values))


def _replicates(
    values: Floats,
    statistic: Statistic,
    rounds: Sequence[int],
    seed: int,
    process_spread: float,
    in_turns: bool,
) -> tuple[Floats, float]:
    """The statistic of NUM_RESAMPLES resampled series, and by how much their spread is too small."""
    _estimate(values, statistic)
    rng = np.random.default_rng(seed)
    compute: Any = np.median if statistic == "median" else np.mean
    choose = _within_windows if in_turns else _in_blocks
    replicates: list[Floats] = []
    if len(rounds) >= MIN_SAMPLES and max(rounds) > 1:
        assert sum(rounds) == len(values)
        parts = np.split(values, np.cumsum(rounds)[:-1])
        chosen, widening = choose(np.array([compute(part) for part in parts]), NUM_RESAMPLES, rng)
        replicates.append(np.array([compute(np.concatenate([parts[i] for i in row])) for row in chosen]))
    else:
        rows = max(1, _CHUNK // len(values))
        for start in range(0, NUM_RESAMPLES, rows):
            chosen, widening = choose(values, min(rows, NUM_RESAMPLES - start), rng)
            replicates.append(compute(values[chosen], axis=1))
    alike = 1 + process_spread * rng.standard_normal(NUM_RESAMPLES)
    return np.concatenate(replicates) * alike, widening


def _in_blocks(values: Floats, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], float]:
    """Indices (count, n) of series made of blocks, and the widening for so many blocks."""
    n, block = len(values), block_length(values)
    num_blocks = math.ceil(n / block)
    starts = rng.integers(0, n, (count, num_blocks, 1))
    chosen = (starts + np.arange(block)).reshape(count, -1)[:, :n] % n
    return chosen, _widening(num_blocks, num_blocks - 1)


def _within_windows(values: Floats, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], float]:
    """Indices (count, n) of series whose every window is drawn from itself, and the widening for that.

    A stratified bootstrap; of k samples in a window it is too narrow by sqrt(k / (k - 1)).
    """
    n = len(values)
    windows = np.array_split(np.arange(n), max(1, n // WINDOW))
    chosen = np.concatenate(
        [window[rng.integers(0, len(window), (count, len(window)))] for window in windows], 1
    )
    return chosen, _widening(len(windows[-1]), n - len(windows))


def block_length(values: Floats) -> int:
    """How many consecutive samples stay together: twice the correlation time of their ranks, at least the
    cube root of their number, and never so many that fewer than five blocks make the series."""
    n = len(values)
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable") - (n - 1) / 2
    total = float(ranks @ ranks)
    correlation_time = 1.0
    for lag in range(1, n // 2):
        rho = float(ranks[:-lag] @ ranks[lag:]) / total
        if rho < 2 / math.sqrt(n):
            break
        correlation_time += 2 * rho
    wanted = max(math.ceil(n ** (1 / 3)), math.ceil(2 * correlation_time) if correlation_time > 1 else 1)
    return int(max(1, min(wanted, n // MIN_SAMPLES)))


def _interval(centre: float, replicates: Floats, widening: float, level: float) -> tuple[float, float]:
    """Percentiles of the replicates, pushed away from the centre."""
    tail = (1 - level) / 2
    low, high = np.quantile(replicates, (tail, 1 - tail))
    return float(centre - widening * max(0.0, centre - low)), float(
        centre + widening * max(0.0, high - centre)
    )


def _widening(size: int, freedom: int) -> float:
    """t / z * sqrt(size / (size - 1)), with the 97.5 % point of Student's t by its Cornish-Fisher series."""
    nu, z = freedom, _Z95
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    return t / z * math.sqrt(size / (size - 1))
