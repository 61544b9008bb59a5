"""A measured number and its spread; ratios that are measured in turns.

A machine that changes its speed between two runs changes both of two interleaved ones alike. So a claim about
time is a ratio of things that ran one after the other, several times, and what is stated is the median of
the pairs' ratios with their quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

Measured = Callable[[], float | None]
"""Does the work; returns its own figure, or None: then its seconds count."""


class Figure(float):
    """A float that remembers the quartiles of its samples: f"{figure:.1f}", `figure.low`, `figure.high`."""

    low: float
    high: float
    samples: tuple[float, ...]

    def __new__(cls, samples: Sequence[float]) -> Figure:
        figure = super().__new__(cls, statistics.median(samples))
        figure.samples = tuple(map(float, samples))
        if len(samples) > 1:
            figure.low, _, figure.high = statistics.quantiles(samples, n=4, method="inclusive")
        else:
            figure.low = figure.high = float(figure)
        return figure

    @property
    def spread(self) -> float:
        """Between the quartiles, in the figure's own unit."""
        return self.high - self.low


def once(work: Measured) -> float:
    """The figure of one call: what it returns, or its seconds."""
    started = time.perf_counter()
    figure = work()
    return time.perf_counter() - started if figure is None else float(figure)


def measure(work: Measured, *, repeats: int = 5, warmups: int = 1) -> Figure:
    """The median of `repeats` calls, after `warmups` that do not count."""
    for _ in range(warmups):
        once(work)
    return Figure([once(work) for _ in range(repeats)])


def ratio(numerator: Measured, denominator: Measured, *, repeats: int = 5, warmups: int = 1) -> Figure:
    """numerator / denominator, called in turns (the order swaps each time): the median of the pairs' ratios.

    For "B is x times faster than A" by seconds, the numerator is A.
    """
    for _ in range(warmups):
        once(numerator), once(denominator)
    ratios: list[float] = []
    for number in range(repeats):
        if number % 2:
            below = once(denominator)
            above = once(numerator)
        else:
            above = once(numerator)
            below = once(denominator)
        ratios.append(above / below)
    return Figure(ratios)
