"""Baseline Benchmarking: samples for a tail, false alarms of many metrics, the speed-up to claim."""

from __future__ import annotations

import statistics
from typing import Any

from ridgeline.bench.intervals import difference
from ridgeline.course.exercises import exercise

OLD = (52.1, 49.8, 55.3, 50.6, 51.9, 58.8, 50.2, 53.4, 49.9, 51.2, 54.7, 50.8)
NEW = (48.9, 47.5, 53.0, 49.6, 48.1, 50.3, 47.2, 55.9, 48.4, 47.9, 50.7, 48.8)
NUM_METRICS = 7


@exercise(difficulty=1, importance=3, minutes=5)
def samples_for_p99(answer: Any, lesson: Any) -> str | None:
    if 1 - 0.99**answer >= 0.95 and 1 - 0.99 ** (answer - 1) < 0.95:
        return None
    if answer == 59:
        return "that is for P95"
    if answer == 100:
        return "with so many there is one beyond on average, but with what probability is there none?"
    if 1 - 0.99**answer >= 0.95:
        return "enough, but not the smallest number"
    return "with so many the chance that none lies beyond P99 is still more than 5 %"


@exercise(difficulty=1, importance=2, minutes=3)
def false_alarm(answer: Any, lesson: Any) -> str | None:
    right = 1 - 0.95**NUM_METRICS
    if abs(answer - right) <= 0.005:
        return None
    if abs(answer - NUM_METRICS * 0.05) <= 0.005:
        return "an upper bound: adding up counts runs with two false alarms twice"
    if abs(answer - 0.95**NUM_METRICS) <= 0.005:
        return "that is the probability of no false alarm at all"
    return "what is the probability that all seven stay silent?"


@exercise(difficulty=2, importance=3, minutes=6)
def speedup_to_claim(answer: Any, lesson: Any) -> str | None:
    found = difference(NEW, OLD)
    if abs(answer / found.low - 1) <= 0.003:
        return None
    if abs(answer / found.ratio - 1) <= 0.003:
        return "that is the best guess; in half of all cases the truth is below it"
    if abs(answer / found.high - 1) <= 0.003:
        return "that is *at most*; *at least* was asked for"
    if answer < 1:
        return "a speed-up of less than 1 is a slow-down: which of the two is the denominator?"
    if abs(answer / (statistics.fmean(OLD) / statistics.fmean(NEW)) - 1) <= 0.003:
        return "that is the ratio of the means; a claim with 95 % confidence needs the interval"
    return "use an end of the interval of `difference(new, old)`"
