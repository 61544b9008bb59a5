"""INF-13: when compiling is paid back, and how much of a step it can touch."""

from __future__ import annotations

import math
import random
from typing import Any

from ridgeline.course.exercises import exercise

SHARE, FACTOR = 0.3, 4.0


@exercise(difficulty=2, importance=3, minutes=8)
def payback(answer: Any, lesson: Any) -> str | None:
    """Steps after which compiling has saved the time that it took; infinite where it never does."""
    if not callable(answer):
        return f"expected a function of compile_s, eager_s and compiled_s, given {type(answer).__name__}"
    rng = random.Random(13)
    cases = [(10.0, 0.02, 0.015), *((rng.uniform(1, 90), rng.uniform(0.01, 0.1), 0.009) for _ in range(9))]
    for compile_s, eager_s, compiled_s in cases:
        found, right = answer(compile_s, eager_s, compiled_s), compile_s / (eager_s - compiled_s)
        if abs(found - right) <= 1 + 1e-6 * right:
            continue
        if abs(found - compile_s / eager_s) <= 1:
            return "after so many steps eager is where the compiled run begins; but eager goes on, too"
        if abs(found - compile_s / compiled_s) <= 1:
            return "a step does not save all of its time, only the difference"
        return f"for {compile_s:.1f} s, {1e3 * eager_s:.1f} ms and {1e3 * compiled_s:.1f} ms it gives {found}"
    for case in ((10.0, 0.02, 0.02), (10.0, 0.02, 0.03)):
        found = answer(*case)
        if not (isinstance(found, int | float) and math.isinf(found) and found > 0):
            return f"with {case} nothing is ever saved, and it gives {found}; expected math.inf"
    return None


@exercise(difficulty=2, importance=3, minutes=5)
def limit(answer: Any, lesson: Any) -> str | None:
    """Speed-up of a step of which 30 % become four times as fast."""
    right = 1 / (1 - SHARE + SHARE / FACTOR)
    if not isinstance(answer, int | float):
        return f"expected a number, given {type(answer).__name__}"
    if abs(answer / right - 1) < 0.01:
        return None
    if abs(answer * (1 - SHARE) - 1) < 0.01:
        return "that is the limit for a factor without end; they still take a quarter of their time"
    if abs(answer * right - 1) < 0.01:
        return "that is the time that is left; as times as fast, please"
    if abs(answer - (1 - SHARE + SHARE * FACTOR)) < 0.01:
        return "factors are not averaged: add up the times before and after"
    return "not that. Let the step take 1: how much of it is left?"
