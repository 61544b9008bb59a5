"""INF-12: where batching stops to be free, what padding wastes, and an order that wastes less."""

from __future__ import annotations

import random
from typing import Any

from ridgeline.course.exercises import exercise
from ridgeline.profiling.machine import describe_device

LENGTHS = (12, 90, 15, 88, 14, 96, 10, 85, 11, 92, 13, 94)
BATCH = 4


@exercise(difficulty=2, importance=3, minutes=8)
def turning_point(answer: Any, lesson: Any) -> str | None:
    """Batch size at which decode of a 16-bit model turns compute bound on an H100."""
    device = describe_device("h100")
    right = device.fp32_gflop_s / device.dram_gb_s  # 2 bytes a weight, 2 operations a weight
    if not isinstance(answer, int | float):
        return f"expected a number of requests, given {type(answer).__name__}"
    if abs(answer / right - 1) < 0.03:
        return None
    if abs(answer / right - 2) < 0.05:
        return "twice of it. How many operations is one weight for one token?"
    if abs(answer / right - 0.5) < 0.03:
        return "half of it. How many bytes is one weight?"
    if abs(answer * right - 1) < 0.05:
        return "upside down: the batch grows with the arithmetic that the machine can do while it reads"
    return "not that. Set the time of reading W bytes equal to that of B tokens' arithmetic"


@exercise(difficulty=2, importance=2, minutes=8)
def padding_share(answer: Any, lesson: Any) -> str | None:
    """Share of a padded batch that is padding, from the lengths of its members."""
    if not callable(answer):
        return f"expected a function of a list of lengths, given {type(answer).__name__}"
    rng = random.Random(12)
    for lengths in (
        [7],
        [2, 4],
        *([rng.randint(1, 99) for _ in range(rng.randint(1, 9))] for _ in range(20)),
    ):
        total, longest = sum(lengths), max(lengths) * len(lengths)
        found = answer(list(lengths))
        if abs(found - (1 - total / longest)) < 1e-9:
            continue
        if abs(found - total / longest) < 1e-9:
            return "that is the useful share"
        if abs(found - (longest - total)) < 1e-9:
            return "that is the number of padded places; as a share of all that are computed, please"
        if abs(found - (longest / total - 1)) < 1e-9:
            return "that is padding over useful work; of all work, useful and padding, please"
        return f"for {lengths} it gives {found}. Draw the rectangle: as wide as the longest"
    return None


@exercise(difficulty=1, importance=3, minutes=6)
def order(answer: Any, lesson: Any) -> str | None:
    """The answers' lengths in an order that takes the fewest decode steps in static batches of four."""
    if not isinstance(answer, list | tuple):
        return f"expected a list of lengths, given {type(answer).__name__}"
    if sorted(answer) != sorted(LENGTHS):
        return "that is not the same twelve requests: each length must be there, once"

    def steps(lengths: Any) -> int:
        return sum(max(lengths[i : i + BATCH]) for i in range(0, len(lengths), BATCH))

    best = steps(sorted(LENGTHS))
    if steps(answer) == best:
        return None
    return f"takes {steps(answer)} steps, as given it was {steps(LENGTHS)}; it can be done in fewer"
