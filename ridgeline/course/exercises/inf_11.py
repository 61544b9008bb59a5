"""INF-11: the range and the grain of 16-bit numbers, and the speed that their bytes allow."""

from __future__ import annotations

from typing import Any

from ridgeline.course.exercises import exercise
from ridgeline.profiling.machine import describe_device

LLAMA_8B_WEIGHTS = 8.03e9


@exercise(difficulty=1, importance=2, minutes=5)
def largest(answer: Any, lesson: Any) -> str | None:
    """The largest finite float16."""
    right = (2 - 2**-10) * 2**15
    if not isinstance(answer, int | float):
        return f"expected a number, given {type(answer).__name__}"
    if answer == right:
        return None
    if answer in (2**16, 2**16 - 1):
        return "that has more significant digits than 1 + 10 bits can hold; the next lower one that can"
    if answer == 2**15:
        return "the fraction is not used yet: all its ten bits may be 1"
    if answer > 1e30:
        return "that is the range of an exponent of 8 bits; float16 has 5"
    return "not that. Largest exponent (15), and all bits of the fraction set"


@exercise(difficulty=2, importance=3, minutes=6)
def stalls(answer: Any, lesson: Any) -> str | None:
    """Where a sum of ones stops to grow in bfloat16."""
    right = 2 ** (7 + 1)
    if not isinstance(answer, int | float):
        return f"expected a number, given {type(answer).__name__}"
    if answer == right:
        return None
    if answer == 2**11:
        return "that is float16, with ten bits of fraction; bfloat16 has seven"
    if answer == right // 2:
        return "there, neighbours are still 1 apart: one more can be told"
    if answer == 2 * right:
        return "it would have to get there first: how far apart are neighbours a factor of two below it?"
    return "not that. From which power of two on are neighbouring numbers 2 apart?"


@exercise(difficulty=2, importance=3, minutes=6)
def decode_bound(answer: Any, lesson: Any) -> str | None:
    """Tokens a second that the memory of an H100 allows for one request to an 8B model in bfloat16."""
    right = describe_device("h100").dram_gb_s * 1e9 / (2 * LLAMA_8B_WEIGHTS)
    if not isinstance(answer, int | float):
        return f"expected tokens a second, given {type(answer).__name__}"
    if abs(answer / right - 1) < 0.03:
        return None
    if abs(answer / right - 0.5) < 0.02:
        return "that is float32"
    if abs(answer / right - 2) < 0.06:
        return "that is one byte a weight"
    if abs(answer * right - 1) < 0.05:
        return "that is seconds a token"
    return "not that. Each token reads every weight once: bytes a second over bytes a token"
