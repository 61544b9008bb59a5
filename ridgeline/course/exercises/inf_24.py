"""INF-24: what fits, what is on the front, what to choose."""

from __future__ import annotations

import json
from typing import Any

from ridgeline.course.exercises import exercise
from ridgeline.course.files import checkout

NUM_WEIGHTS, MEMORY, TOKENS, TOKEN_BYTES = 8.03e9, 16 * 2**30, 16 * 4096, 131_072
MAX_MIB = 100


def _points() -> list[Any]:
    from ridgeline.compress.pareto import points_of

    document = json.loads((checkout() / "docs/results/pareto.json").read_text())
    return list(points_of(document["details"]["rows"]))


@exercise(difficulty=1, importance=3, minutes=5)
def fits_in_16_gib(answer: Any, lesson: Any) -> str | None:
    """The most bits a weight beside a cache."""
    if answer not in (16, 8, 4):
        return f"{answer!r} is none of 16, 8 and 4"
    room = MEMORY - TOKENS * TOKEN_BYTES
    if NUM_WEIGHTS * answer / 8 > room:
        return f"weights of {answer} bits would leave too little for the cache. How large is it?"
    if NUM_WEIGHTS * 2 * answer / 8 <= room:
        return "that fits, and so does twice as much"
    return None


@exercise(difficulty=2, importance=3, minutes=8)
def dominated(answer: Any, lesson: Any) -> str | None:
    """A function: is a point not on the front?"""
    from ridgeline.compress.pareto import front

    if not callable(answer):
        return f"expected a function of p and points, given {type(answer).__name__}"
    points = [point for point in _points() if point.void is None]
    leading = front(points)
    for point in points:
        given = bool(answer(point, points))
        if given == (point.name not in leading):
            continue
        if given and all(answer(p, points) for p in points):
            return "by it, every point is dominated; a point does not dominate itself"
        if given:
            return f"{point.name} is on the front: nothing is both at most as large and at most as far"
        return f"{point.name} is not on the front, and it says it is"
    return None


@exercise(difficulty=1, importance=2, minutes=4)
def choose_format(answer: Any, lesson: Any) -> str | None:
    """The closest recipe within a size."""
    points = {point.name: point for point in _points() if point.void is None}
    if answer not in points:
        return f"{answer!r} is none of {', '.join(points)}"
    chosen = points[answer]
    if chosen.num_bytes > MAX_MIB * 2**20:
        return f"{answer} has {chosen.num_bytes / 2**20:.1f} MiB"
    closest = min((p for p in points.values() if p.num_bytes <= MAX_MIB * 2**20), key=lambda p: p.kl)
    return None if chosen.kl <= closest.kl else f"{answer} fits; something else that fits is closer"
