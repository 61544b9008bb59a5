"""Checkers of INF-20, Flash Attention Explained."""

from __future__ import annotations

from typing import Any

import numpy as np

from ridgeline.course.exercises import exercise


@exercise(difficulty=3, importance=3, minutes=10)
def merge(answer: Any, lesson: Any) -> str | None:
    """Against softmax over all keys at once, with small and with large scores."""
    if not callable(answer):
        return "expected a function of six arguments"
    rng = np.random.default_rng(7)
    for offset, spread in ((0.0, 0.1), (0.0, 3.0), (900.0, 3.0), (-900.0, 3.0)):
        scores = offset + spread * rng.standard_normal(24)
        scores[4] += 2.0  # the first part has the larger maximum, then the second
        values = rng.standard_normal((24, 5))
        weights = np.exp(scores - scores.max())
        right = weights @ values / weights.sum()
        parts = []
        for part in (slice(0, 10), slice(10, 24)):
            m = scores[part].max()
            w = np.exp(scores[part] - m)
            parts.append((m, w.sum(), w @ values[part]))
        for order in (parts, parts[::-1]):
            with np.errstate(all="ignore"):
                given = np.asarray(answer(*order[0], *order[1]), np.float64)
            if given.shape != right.shape:
                return f"expected an output of shape {right.shape}, this has {given.shape}"
            if not np.isfinite(given).all():
                return "with scores near 900 it is not a finite number; measure both sums from one maximum"
            if not np.allclose(given, right, rtol=1e-6, atol=1e-9):
                return (
                    "the two sums are measured from different maxima: before they are added, both `l` and "
                    "`a` of each part must be scaled to the same one"
                )
    return None


@exercise(difficulty=1, importance=2, minutes=4)
def score_bytes(answer: Any, lesson: Any) -> str | None:
    """H * N^2 * 2 bytes."""
    right = 32 * 8192**2 * 2
    if answer == right:
        return None
    if answer == right // 4:
        return "that counts the KV heads; every query head has scores of its own"
    if answer == right // 32:
        return "that is one head"
    if answer == 2 * right:
        return "a float16 has 2 bytes"
    if answer in (right / 2, right // 2):
        return (
            "the naive form keeps the whole square, masked scores too (or did you count one byte a number?)"
        )
    return "every query head has one score for each pair of tokens: how many pairs are there?"


@exercise(difficulty=2, importance=2, minutes=5)
def largest_chunk(answer: Any, lesson: Any) -> str | None:
    """chunk * context * 4 bytes * 2 threads <= 32 MiB."""
    limit, context, threads = 32 * 2**20, 8192, 2
    if not isinstance(answer, int) or answer < 1 or answer & (answer - 1):
        return "expected a power of two"
    taken = threads * 4 * answer * context
    if taken <= limit < 2 * taken:
        return None
    if taken == 2 * limit:
        return "that would do for one thread; each of the two has scores of its own"
    if taken > limit:
        return f"its scores take {taken / 2**20:.0f} MiB (a float32 has 4 bytes)"
    return "that fits, but so does twice as much"
