"""Checkers of INF-23, Long Context Inference."""

from __future__ import annotations

import math
from typing import Any

from ridgeline.config import RopeConfig
from ridgeline.course.exercises import exercise
from ridgeline.errors import ConfigError
from ridgeline.models.rope import rope_from_hf

TRAINED, SERVED = 8192, 32768


@exercise(difficulty=2, importance=2, minutes=6)
def unfinished_pairs(answer: Any, lesson: Any) -> str | None:
    """Pairs whose wavelength is beyond the trained length."""
    turns = [2048 * 10000.0 ** (-2 * i / 64) / (2 * math.pi) for i in range(32)]
    right = sum(t < 1 for t in turns)
    if answer == right:
        return None
    if answer == 32 - right:
        return "those are the pairs that did finish a turn"
    if answer == sum(2 * math.pi * t < 1 for t in turns):
        return "a turn is 2 pi, not 1"
    return "pair i turns by p * theta^(-2i/64) up to position p; how far does each get at p = 2,048?"


@exercise(difficulty=2, importance=3, minutes=5)
def choose_scaling(answer: Any, lesson: Any) -> str | None:
    """YaRN with the factor of the two lengths."""
    if not isinstance(answer, dict):
        return 'expected a dictionary, as {"rope_type": ..., "factor": ...}'
    try:
        rope = rope_from_hf(answer, RopeConfig(theta=100000.0, rotary_dim=64))
    except ConfigError as error:
        return f"the engine refuses it: {error}"
    if rope.rope_type != "yarn":
        return "most requests are short: which of the four costs least inside the trained length?"
    needed = SERVED / (rope.original_max_position or TRAINED)
    if rope.factor < needed:
        return f"that reaches {rope.factor * TRAINED:,.0f} tokens"
    if rope.factor > 1.5 * needed:
        return "that stretches further than you serve, and every stretch costs quality"
    return None


@exercise(difficulty=2, importance=2, minutes=5)
def window_blocks(answer: Any, lesson: Any) -> str | None:
    """One for the sinks, and what 1,024 tokens can touch that do not begin at a block's edge."""
    window, size = 1024, 32
    right = 1 + window // size + 1
    if answer == right:
        return None
    if answer == window // size:
        return "the sinks need room as well, and a window seldom begins at the edge of a block"
    if answer == right - 1:
        return "nearly: do sinks and a window that begins in the middle of a block both have room?"
    if answer == window // size + 4:
        return "four sinks are four tokens, not four blocks"
    return "count the block of the sinks, and the blocks that 1,024 tokens in a row can touch at most"
