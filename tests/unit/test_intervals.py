"""Intervals: they cover what they claim, also for samples that drift, and differences are found or not."""

from __future__ import annotations

import numpy as np
import pytest

from ridgeline.bench.intervals import (
    block_length,
    bootstrap_interval,
    difference,
    half_width,
    holm,
    percentile,
)
from ridgeline.errors import ConfigError


def correlated(rng, n, rho):
    """A first-order autoregressive series around 100."""
    values = [rng.standard_normal()]
    for _ in range(n - 1):
        values.append(rho * values[-1] + (1 - rho**2) ** 0.5 * rng.standard_normal())
    return tuple(100 + np.array(values))


def coverage(make, **options):
    found = [bootstrap_interval(make(np.random.default_rng(seed)), **options) for seed in range(120)]
    return sum(low <= 100 <= high for low, high in found) / len(found)


def test_percentiles_are_those_of_numpy():
    samples = [5.0, 1.0, 4.0, 2.0]
    assert percentile(samples, 50) == 3.0 and percentile(samples, 95) == pytest.approx(4.85)
    with pytest.raises(ConfigError, match="at least one sample"):
        percentile([], 50)


@pytest.mark.parametrize(("n", "rho"), [(5, 0.0), (10, 0.0), (40, 0.0), (40, 0.6), (200, 0.8)])
def test_an_interval_covers_the_truth(n, rho):
    assert coverage(lambda rng: correlated(rng, n, rho)) >= 0.88


def drifting(rng, n, *, shift=0.0, course=None):
    """Noise of 1 on a machine that changes by 10 for a quarter of the time."""
    course = np.repeat([0.0, 10.0, 0.0, -4.0], n // 4) if course is None else course
    return tuple(100 + shift + course + rng.standard_normal(n))


def test_in_turns_an_interval_covers_the_median_of_the_course():
    """The truth is the median of the same course measured over and over."""
    n = 80
    truth = np.median(np.concatenate([drifting(np.random.default_rng(s), n) for s in range(1000, 1400)]))
    for options, least, most in (({"in_turns": True}, 0.9, 1.6), ({}, 0.9, 20.0)):
        found = [bootstrap_interval(drifting(np.random.default_rng(s), n), **options) for s in range(120)]
        assert sum(low <= truth <= high for low, high in found) / len(found) >= least
        assert np.median([high - low for low, high in found]) < most
    wide = bootstrap_interval(drifting(np.random.default_rng(0), n))
    narrow = bootstrap_interval(drifting(np.random.default_rng(0), n), in_turns=True)
    assert half_width(wide, 1) > 3 * half_width(narrow, 1)


@pytest.mark.parametrize("n", [5, 9, 15, 40])
def test_in_turns_few_samples_cover_too(n):
    assert coverage(lambda rng: correlated(rng, n, 0.0), in_turns=True) >= 0.88


def test_in_turns_rounds_stay_whole():
    def make(rng):
        return tuple((100 + rng.standard_normal((20, 1)) + 0.1 * rng.standard_normal((20, 4))).ravel())

    assert coverage(make, rounds=(4,) * 20, in_turns=True) >= 0.88
    assert coverage(make, in_turns=True) < 0.8  # one by one they seem to say more than they do


def test_in_turns_a_small_difference_shows_in_spite_of_drift():
    rng = np.random.default_rng(3)
    a, b, same = drifting(rng, 80), drifting(rng, 80, shift=1.5), drifting(rng, 80)
    assert difference(a, b).p_value > 0.05
    found = difference(a, b, in_turns=True)
    assert found.p_value < 0.01 and found.low < 1.015 < found.high
    assert difference(a, same, in_turns=True).p_value > 0.05
    wrong = sum(
        difference(*(drifting(np.random.default_rng(2 * s + i), 40) for i in (0, 1)), in_turns=True).p_value
        < 0.05
        for s in range(100)
    )
    assert wrong <= 10


def test_rounds_that_differ_need_whole_rounds():
    """20 samples in each of 8 rounds, most of the spread between rounds."""

    def make(rng):
        return tuple((100 + rng.standard_normal((8, 1)) + 0.1 * rng.standard_normal((8, 20))).ravel())

    assert coverage(make, rounds=(20,) * 8) >= 0.88


def test_an_interval_is_not_needlessly_wide():
    rng = np.random.default_rng(0)
    interval = bootstrap_interval(tuple(100 + rng.standard_normal(100)), statistic="mean")
    assert 0.1 < half_width(interval, 1.0) < 0.35


def test_blocks_grow_with_correlation():
    rng = np.random.default_rng(1)
    independent, slow = (np.array(correlated(rng, 400, rho)) for rho in (0.0, 0.9))
    assert block_length(independent) < 16 < block_length(slow) <= 80
    assert block_length(np.ones(50)) >= 1


def test_equal_samples_have_an_interval_without_width():
    assert bootstrap_interval((3.0,) * 9) == (3.0, 3.0)


def test_the_spread_of_processes_is_added():
    low, high = bootstrap_interval((3.0,) * 9, process_spread=0.01)
    assert 2.9 < low < 2.95 and 3.05 < high < 3.1
    assert difference((3.0,) * 9, (3.03,) * 9, process_spread=0.01).p_value > 0.05
    assert difference((3.0,) * 9, (3.03,) * 9).p_value < 0.01


def test_few_samples_are_refused():
    with pytest.raises(ConfigError, match="4 samples: an interval needs at least 5"):
        bootstrap_interval((1.0, 2.0, 3.0, 4.0))


def test_a_difference_is_found_and_noise_is_not():
    rng = np.random.default_rng(2)
    a, b, c = (tuple(mean + rng.standard_normal(30)) for mean in (100, 100, 104))
    same, other = difference(a, b), difference(a, c)
    assert same.low < 1 < same.high and same.p_value > 0.05
    assert 1 < other.low < 1.04 < other.high and other.p_value < 0.01
    back = difference(c, a)
    assert back.ratio == pytest.approx(1 / other.ratio) and back.high < 1


def test_differences_of_nothing_are_seldom_found():
    found = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        found += difference(correlated(rng, 20, 0.3), correlated(rng, 20, 0.3)).p_value < 0.05
    assert found <= 10


def test_a_ratio_needs_positive_figures():
    with pytest.raises(ConfigError, match="no ratio"):
        difference((0.0,) * 5, (1.0,) * 5)


def test_holm_adjusts_in_steps():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
