"""Checkers of INF-21, MQA & GQA."""

from __future__ import annotations

from typing import Any

from ridgeline.course.exercises import exercise


@exercise(difficulty=1, importance=3, minutes=3)
def kv_bytes_70b(answer: Any, lesson: Any) -> str | None:
    """2 * layers * KV heads * head_dim * 2 bytes."""
    right = 2 * 80 * 8 * 128 * 2
    if answer == right:
        return None
    if answer == right // 2:
        return "half of it is missing: a key *and* a value, of two bytes a number"
    if answer == right * 8:
        return "only KV heads are cached; query heads are not"
    if answer == right // 80:
        return "that is one layer"
    if answer == right * 8 * 8 or answer == right * 16:
        return "bytes, not bits"
    return "multiply: key and value, layers, KV heads, numbers a head, bytes a number"


@exercise(difficulty=2, importance=3, minutes=5)
def break_even(answer: Any, lesson: Any) -> str | None:
    """weights / (batch * bytes per token)."""
    right = 98e6 / (16 * 2 * 30 * 3 * 64 * 2)
    value = float(answer)
    for factor, hint in (
        (16, "that is the context of one sequence alone; here 16 read their caches in the same step"),
        (1 / 3, "that is a model with 9 KV heads"),
        (2, "a key *and* a value are read, and each number has two bytes"),
        (0.5, "a number of a float16 cache has two bytes"),
    ):
        if abs(value / (right * factor) - 1) <= 0.05:
            return hint
    if abs(value / right - 1) <= 0.05:
        return None
    return "bytes of all weights, over the bytes that one more token of context adds to the step"


@exercise(difficulty=2, importance=2, minutes=5)
def choose_heads(answer: Any, lesson: Any) -> str | None:
    """The largest divisor of 32 whose cache fits in 10 GB."""
    if answer not in (1, 2, 4, 8, 16, 32):
        return "expected a divisor of the 32 query heads, so that the groups are equal"
    per_head = 64 * 2048 * 2 * 32 * 128 * 2
    if 14e9 + answer * per_head > 24e9:
        return f"its cache takes {answer * per_head / 1e9:.1f} GB"
    if 14e9 + 2 * answer * per_head <= 24e9:
        return "that fits, but so do more heads"
    return None
