"""Checkers of INF-43, GGUF & CPU Inference."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from ridgeline.course.exercises import exercise
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.gguf_blocks import dequantize, random_blocks

ROOM_GIB, OTHER_GIB = 6, 0.3
CACHE_BYTES = 4096 * 2 * 32 * 32 * 128 * 2
NUM_WEIGHTS = 6.74e9
CHOICES = ("Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q3_K")


@exercise(difficulty=1, importance=3, minutes=4)
def matrix_bytes(answer: Any, lesson: Any) -> str | None:
    """By the format's own table."""
    num_weights = 11008 * 4096
    right = FORMATS["Q4_K"].num_bytes((11008, 4096))
    if answer == right:
        return None
    if answer == num_weights // 2:
        return "that is four bits a weight; the scales and minima of a super-block have bytes too"
    if answer == 8 * right:
        return "that is the number of bits"
    if answer == num_weights // 32 * 144:
        return "a K-quant block does not hold 32 weights"
    return "count the super-blocks of 256 weights, then multiply by the bytes of one"


@exercise(difficulty=2, importance=2, minutes=8)
def nibble(answer: Any, lesson: Any) -> str | None:
    """Against the engine on random blocks."""
    if not callable(answer):
        return "expected a function of a block and an index"
    fmt = FORMATS["Q4_0"]
    for raw in random_blocks(fmt, 4, np.random.default_rng(3)).reshape(4, -1):
        block = raw.tobytes()
        right = dequantize(raw, fmt, (1, 32))[0]
        given = np.array([float(answer(block, j)) for j in range(32)])
        if np.allclose(given, right, rtol=1e-3, atol=1e-7):
            continue
        scale = struct.unpack_from("<e", block)[0]
        if np.allclose(given - right, given[0] - right[0], rtol=1e-3) and abs(given[0] - right[0]) > 4 * abs(
            scale
        ):
            return "all weights are off by the same amount: which code means zero?"
        if np.allclose(np.sort(given), np.sort(right), rtol=1e-3, atol=1e-7):
            return "these are the right numbers in another order: which half of a byte has weight 16?"
        return f"weight 1 of a block is {right[1]:.4f}, yours is {given[1]:.4f}"
    return None


@exercise(difficulty=2, importance=3, minutes=6)
def choose_format(answer: Any, lesson: Any) -> str | None:
    """The first of CHOICES that fits beside the cache."""
    if answer not in CHOICES:
        return f"expected one of {', '.join(CHOICES)}"
    room = (ROOM_GIB - OTHER_GIB) * 2**30 - CACHE_BYTES
    weights = {name: NUM_WEIGHTS / 8 * FORMATS[name].bits_per_weight for name in CHOICES}
    if weights[answer] > room:
        if weights[answer] <= room + CACHE_BYTES:
            return "the weights alone would fit; the cache of 4,096 tokens does not fit beside them"
        return "these weights do not fit, even without a cache"
    better = CHOICES[CHOICES.index(answer) - 1] if answer != CHOICES[0] else None
    if better is not None and weights[better] <= room:
        return "that fits, but so does one with more bits"
    return None
