"""INF-41: bytes of a format, one step of GPTQ by hand, its gain predicted, a recipe chosen under a limit."""

from __future__ import annotations

import json
import math
from typing import Any

from ridgeline.course.exercises import exercise
from ridgeline.course.files import checkout

ROWS, COLUMNS, GROUP, BITS, GROUP_BITS = 576, 1536, 32, 4, 16 + 8
MAX_CHANGE = 0.05


@exercise(difficulty=1, importance=3, minutes=5)
def stored_bytes(answer: Any, lesson: Any) -> str | None:
    """Bytes of a matrix in codes, scales and zero points."""
    right = ROWS * COLUMNS // GROUP * (GROUP * BITS + GROUP_BITS) // 8
    hints = {
        ROWS * COLUMNS * BITS // 8: "the codes are right; scales and zero points are stored too",
        ROWS * COLUMNS // GROUP * (GROUP * BITS + 16) // 8: "almost: a group has a zero point as well",
        8 * right: "that is in bits",
        ROWS * COLUMNS // 64 * (64 * BITS + GROUP_BITS) // 8: "that is with groups of 64",
        ROWS * COLUMNS * BITS: "that is in bits, and only the codes",
    }
    if not isinstance(answer, int | float):
        return f"expected a number of bytes, given {type(answer).__name__}"
    if answer == right:
        return None
    return hints.get(int(answer), "not that. How many bits has one group, and how many groups are there?")


@exercise(difficulty=2, importance=3, minutes=6)
def pay_back(answer: Any, lesson: Any) -> str | None:
    """The second weight of a row of two, after the first was rounded."""
    error, beta, weight = 2.3 - 2, 2 / 5, 0.7
    if not isinstance(answer, int | float):
        return f"expected a number, given {type(answer).__name__}"
    if math.isclose(answer, weight + beta * error, abs_tol=1e-6):
        return None
    wrong = {
        weight - beta * error: "the sign: what the first weight lost, the second has to add",
        weight + 2 / 4 * error: "x1 is guessed from x2, so it is divided by the mean square of x2",
        weight + error: "all of the error would be right only if the inputs were always equal",
        beta * error: "that is the change; asked is the weight after it",
        round(weight + beta * error): "not rounded yet: that is the next step",
    }
    for value, hint in wrong.items():
        if math.isclose(answer, value, abs_tol=1e-6):
            return hint
    return "not that. What is the error of the first weight, and which share of it does the second pay back?"


@exercise(difficulty=3, importance=2, minutes=10)
def gain(answer: Any, lesson: Any) -> str | None:
    """A function of a Hessian: RTN's error over GPTQ's, predicted."""
    import torch

    from ridgeline.compress.gptq import GptqConfig, factorize

    if not callable(answer):
        return f"expected a function of a Hessian, given {type(answer).__name__}"
    size = 24
    for correlation in (0.0, 0.5, 0.99):
        h = torch.full((size, size), correlation, dtype=torch.float64)
        h.diagonal().fill_(1.0)
        h *= torch.linspace(1, 3, size, dtype=torch.float64).outer(
            torch.linspace(1, 3, size, dtype=torch.float64)
        )
        leftover = factorize(h, GptqConfig(damp=0)).upper.diagonal().pow(-2)
        right = math.sqrt(float(h.diagonal().sum() / leftover.sum()))
        given = float(answer(h))
        if math.isclose(given, right, rel_tol=1e-4):
            continue
        if correlation == 0.0:
            return f"inputs that have nothing to do with each other leave nothing to gain: 1, not {given:.3g}"
        if math.isclose(given, right**2, rel_tol=1e-4):
            return "that is the ratio of squared errors"
        if math.isclose(given, 1 / right, rel_tol=1e-4):
            return "upside down: RTN's error is the larger one"
        return (
            f"with a correlation of {correlation} it gives {given:.3g}; add up mean squares of the "
            "inputs, and of what cannot be guessed, before you divide"
        )
    return None


@exercise(difficulty=1, importance=3, minutes=6)
def choose_recipe(answer: Any, lesson: Any) -> str | None:
    """The smallest recipe within a limit of perplexity."""
    from ridgeline.compress.pareto import points_of

    document = json.loads((checkout() / "docs/results/pareto.json").read_text())
    points = {point.name: point for point in points_of(document["details"]["rows"])}
    if answer not in points:
        return f"{answer!r} is none of {', '.join(points)}"
    chosen = points[answer]
    if chosen.change > MAX_CHANGE:
        return f"{answer} has {chosen.change:.1%} more perplexity, and {MAX_CHANGE:.0%} are allowed"
    right = min((p for p in points.values() if p.change <= MAX_CHANGE), key=lambda p: p.num_bytes)
    if chosen.num_bytes > right.num_bytes:
        return f"{answer} is within the limit, but something smaller is too"
    return None
