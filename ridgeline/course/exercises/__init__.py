"""Checkers of the exercises, one module a notebook: `inf_10.kv_bytes(answer, lesson)`.

A checker returns None for a right answer, or a sentence that says what is wrong with it, without giving the
answer away. It computes what it compares with; it gets the lesson for what was measured in this run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal[1, 2, 3]
Check = Callable[[Any, Any], "str | None"]
"""(answer, lesson) -> what is wrong, or None."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """A checker and what the reader is told before starting."""

    check: Check
    difficulty: Level
    importance: Level
    minutes: int


def exercise(*, difficulty: Level, importance: Level, minutes: int) -> Callable[[Check], Exercise]:
    """Makes an Exercise of a checker. Levels go from 1 to 3; minutes is the time box."""
    return lambda check: Exercise(check, difficulty, importance, minutes)


def exercises_of(code: str) -> dict[str, Exercise]:
    """By name ("kv-bytes" is the function kv_bytes), in the order of the file; {} without a module."""
    try:
        module = importlib.import_module(f"{__name__}.{code.lower().replace('-', '_')}")
    except ModuleNotFoundError:
        return {}
    found = vars(module).items()
    return {name.replace("_", "-"): value for name, value in found if isinstance(value, Exercise)}
