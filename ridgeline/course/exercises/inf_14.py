"""INF-14: what shrinks a model, what an outlier costs, what SmoothQuant does about it."""

from __future__ import annotations

import math
from typing import Any

from ridgeline.course.exercises import exercise

LARGEST, TYPICAL, LEVELS = 40, 0.5, 127
MAX_INPUT, MAX_WEIGHT = 64, 0.25


@exercise(difficulty=1, importance=3, minutes=5)
def memory_ratio(answer: Any, lesson: Any) -> str | None:
    """A function of the share that stays in float16."""
    if not callable(answer):
        return f"expected a function of s, given {type(answer).__name__}"
    for share in (0.0, 1.0, 0.2, 0.55):
        given, right = float(answer(share)), 4 / (1 + share)
        if math.isclose(given, right, rel_tol=1e-6):
            continue
        if math.isclose(given, 1 / right, rel_tol=1e-6):
            return "upside down: it should be larger than 1"
        if math.isclose(given, 4 / (1 - share + 4 * share), rel_tol=1e-6):
            return "the rest is in float16, which has two bytes"
        if share in (0.0, 1.0):
            kept = "nothing" if share == 0 else "everything"
            return f"with {kept} in float16 it gives {given:.3g}; how many bytes has a weight then?"
        return f"{given:.3g} for s = {share}: add up bytes first, and divide once"
    return None


@exercise(difficulty=2, importance=3, minutes=6)
def outlier_damage(answer: Any, lesson: Any) -> str | None:
    """Relative rounding error in percent, from the crest factor."""
    if not isinstance(answer, int | float):
        return f"expected a number of percent, given {type(answer).__name__}"
    right = 100 * LARGEST / TYPICAL / (LEVELS * math.sqrt(12))
    if math.isclose(answer, right, rel_tol=0.01):
        return None
    wrong = {
        right * math.sqrt(12): "that is a whole step; what is the root mean square of the error?",
        right * math.sqrt(12) / 2: "that is the largest error; what is the root of the mean square?",
        right / 100: "asked is the number of percent",
        right * TYPICAL: "relative to what? The typical input is not 1",
    }
    for value, hint in wrong.items():
        if math.isclose(answer, value, rel_tol=0.01):
            return hint
    return "not that. What is the crest factor, and what does the formula make of it?"


@exercise(difficulty=1, importance=2, minutes=4)
def smooth_scale(answer: Any, lesson: Any) -> str | None:
    """SmoothQuant's scale of one feature at alpha 0.5."""
    if not isinstance(answer, int | float):
        return f"expected a number, given {type(answer).__name__}"
    right = math.sqrt(MAX_INPUT / MAX_WEIGHT)
    if math.isclose(answer, right, rel_tol=1e-6):
        return None
    if math.isclose(answer, right**2, rel_tol=1e-6):
        return "each of the two has an exponent of one half"
    if math.isclose(answer, 1 / right, rel_tol=1e-6):
        return "upside down: the input is divided by s"
    if math.isclose(answer, math.sqrt(MAX_INPUT * MAX_WEIGHT), rel_tol=1e-6):
        return "that is how large both are afterwards; by what was the input divided?"
    return "not that. Put both numbers into the formula for s"
