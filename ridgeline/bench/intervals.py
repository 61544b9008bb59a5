"""How far a measured figure can be trusted: percentiles, intervals, differences, from samples in time order.

Samples of one machine are not independent: clocks, neighbours and caches change slowly. So whole stretches
are resampled, not single samples: blocks as long as the samples are correlated (circular block bootstrap,
Politis and Romano 1992), of whole rounds where a measurement has rounds. From few stretches a bootstrap is
too sure of itself; the interval is widened by Student's t and sqrt(k / (k - 1)) for k of them (the expanded
interval of Hesterberg 2015).
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
PROCESS_SPREAD = 0.005
"""Standard deviation, as a share, of what a process adds to all its figures alike (where its memory lies, see
Mytkowicz et al. 2009): no number of samples in one process shows it. Set by hand after a pilot; medians of 20
pairs of processes then differed by 0.5 to 0.7 % each, noise of sampling included (repeatability.json)."""
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
) -> tuple[float, float]:
    """(low, high) of the statistic, from samples in time order.

    `rounds`: how many consecutive samples belong to each independent round; with at least MIN_SAMPLES of
    them whole rounds are resampled. `process_spread` is added to the spread of the samples, see
    PROCESS_SPREAD. Raises ConfigError for fewer than MIN_SAMPLES samples.
    """
    values = np.asarray(samples, np.float64)
    replicates, num_stretches = _replicates(values, statistic, rounds, seed, process_spread)
    return _interval(_estimate(values, statistic), replicates, num_stretches, level)


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
) -> Difference:
    """The ratio of the statistics with its interval; both sets are resampled independently.

    Raises ConfigError for fewer than MIN_SAMPLES samples, or a statistic that is not positive (no ratio).
    """
    values_a, values_b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    centre_a, centre_b = _estimate(values_a, statistic), _estimate(values_b, statistic)
    if min(centre_a, centre_b) <= 0:
        raise ConfigError(f"no ratio of {centre_b} to {centre_a}: both must be positive")
    replicates_a, num_a = _replicates(values_a, statistic, rounds_a, seed, process_spread)
    replicates_b, num_b = _replicates(values_b, statistic, rounds_b, seed + 1, process_spread)
    centre = math.log(centre_b / centre_a)
    tiny = np.finfo(np.float64).tiny
    logs = np.log(np.maximum(replicates_b, tiny)) - np.log(np.maximum(replicates_a, tiny))
    num_stretches = min(num_a, num_b)
    low, high = _interval(centre, logs, num_stretches, level)
    widened = centre + (logs - centre) * _widening(num_stretches)
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
    values: Floats, statistic: Statistic, rounds: Sequence[int], seed: int, process_spread: float
) -> tuple[Floats, int]:
    """The statistic of NUM_RESAMPLES resampled series, and of how many stretches each is made."""
    _estimate(values, statistic)
    rng = np.random.default_rng(seed)
    compute: Any = np.median if statistic == "median" else np.mean
    replicates: list[Floats] = []
    num_blocks = 0
    if len(rounds) >= MIN_SAMPLES and max(rounds) > 1:
        assert sum(rounds) == len(values)
        parts = np.split(values, np.cumsum(rounds)[:-1])
        chosen, num_blocks = _chosen(np.array([compute(part) for part in parts]), NUM_RESAMPLES, rng)
        replicates.append(np.array([compute(np.concatenate([parts[i] for i in row])) for row in chosen]))
    else:
        rows = max(1, _CHUNK // len(values))
        for start in range(0, NUM_RESAMPLES, rows):
            chosen, num_blocks = _chosen(values, min(rows, NUM_RESAMPLES - start), rng)
            replicates.append(compute(values[chosen], axis=1))
    alike = 1 + process_spread * rng.standard_normal(NUM_RESAMPLES)
    return np.concatenate(replicates) * alike, num_blocks


def _chosen(values: Floats, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], int]:
    """Indices (count, n) of resampled series, and the number of blocks that each is made of."""
    n, block = len(values), block_length(values)
    num_blocks = math.ceil(n / block)
    starts = rng.integers(0, n, (count, num_blocks, 1))
    return (starts + np.arange(block)).reshape(count, -1)[:, :n] % n, num_blocks


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


def _interval(centre: float, replicates: Floats, num_stretches: int, level: float) -> tuple[float, float]:
    """Percentiles of the replicates, pushed away from the centre."""
    tail = (1 - level) / 2
    low, high = np.quantile(replicates, (tail, 1 - tail))
    factor = _widening(num_stretches)
    return float(centre - factor * max(0.0, centre - low)), float(centre + factor * max(0.0, high - centre))


def _widening(num_stretches: int) -> float:
    """t / z * sqrt(k / (k - 1)), with the 97.5 % point of Student's t by its Cornish-Fisher series."""
    nu, z = num_stretches - 1, _Z95
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * nu**3)
    return t / z * math.sqrt(num_stretches / nu)
