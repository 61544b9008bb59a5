"""INF-42: the damage of a column, the gain of scales, a method chosen by its worst case."""

from __future__ import annotations

import json
import math
import random
import statistics
from typing import Any

from ridgeline.course.exercises import exercise
from ridgeline.course.files import checkout

METHODS = ("rtn", "awq", "gptq", "awq-gptq")


@exercise(difficulty=1, importance=3, minutes=5)
def share_of_damage(answer: Any, lesson: Any) -> str | None:
    """RTN's error over what is left, with half of the damage in one column."""
    if not isinstance(answer, int | float):
        return f"expected a number, given {type(answer).__name__}"
    right = math.sqrt(2)
    if math.isclose(answer, right, rel_tol=0.01):
        return None
    if math.isclose(answer, right**2, rel_tol=0.01):
        return "that is the factor of the squared error"
    if math.isclose(answer, 1 / right, rel_tol=0.01):
        return "upside down: the error before, over the error after"
    return "not that. Which share of the sum of mean squares is in that one column?"


@exercise(difficulty=2, importance=2, minutes=6)
def awq_gain(answer: Any, lesson: Any) -> str | None:
    """A function of feature sizes: the root of their mean square over their mean."""
    if not callable(answer):
        return f"expected a function of a list, given {type(answer).__name__}"
    rng = random.Random(42)
    for sizes in ([1.0] * 8, [1.0] * 63 + [20.0], [rng.uniform(0.5, 3) for _ in range(40)]):
        right = math.sqrt(statistics.fmean(s * s for s in sizes)) / statistics.fmean(sizes)
        given = float(answer(sizes))
        if math.isclose(given, right, rel_tol=1e-6):
            continue
        if right == 1:
            return f"features that are all alike leave nothing to gain: 1, not {given:.3g}"
        if math.isclose(given, right**2, rel_tol=1e-6):
            return "that is the gain of the squared error"
        if math.isclose(given, 1 / right, rel_tol=1e-6):
            return "upside down: a gain is at least 1"
        return f"{given:.3g} for one large feature among small ones; the formula has a mean below and above"
    return None


@exercise(difficulty=1, importance=3, minutes=4)
def pick_method(answer: Any, lesson: Any) -> str | None:
    """The method with the best worst seed, and the one without calibration."""
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        return "expected two names: (taken, needs_none)"
    if unknown := [name for name in answer if name not in METHODS]:
        return f"{unknown[0]!r} is none of {', '.join(METHODS)}"
    runs = json.loads((checkout() / "docs/results/quantizers.json").read_text())["runs"]

    def worst(method: str) -> float:
        found = [run["windows"] for key, run in runs.items() if key.rpartition("-")[0] == method]
        return max(statistics.fmean(w["base"]) - statistics.fmean(w["model"]) for w in found)

    taken, needs_none = answer
    if needs_none != "rtn":
        return f"{needs_none} looks at inputs, so it needs a text"
    if any(worst(other) < worst(taken) for other in METHODS):
        return f"the worst seed of {taken} is worse than the worst seed of another method"
    return None
