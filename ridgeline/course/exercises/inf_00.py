"""Inference Basics: steps of a request, the limit of a larger model, readers under a promise."""

from __future__ import annotations

from typing import Any

from ridgeline.course.exercises import exercise

PROMPT, OUTPUT, BUDGET = 1200, 50, 512
NUM_WEIGHTS, BITS = 7e9, 4.5


@exercise(difficulty=1, importance=3, minutes=4)
def steps(answer: Any, lesson: Any) -> str | None:
    chunks = -(-PROMPT // BUDGET)
    right = chunks + OUTPUT - 1
    if answer == right:
        return None
    if answer == right + 1:
        return "one too many: which step gives the first output token?"
    if answer in (OUTPUT, OUTPUT - 1, OUTPUT + 1):
        return "the prompt does not fit into one step; how many does it take?"
    if answer in (PROMPT + OUTPUT, PROMPT + OUTPUT - 1):
        return "tokens of a prompt are known in advance, so they need no step each"
    return "count the steps of the prompt first, then those of the output tokens that are still missing"


@exercise(difficulty=2, importance=3, minutes=5)
def seven_billion(answer: Any, lesson: Any) -> str | None:
    right = lesson.values["dram_gb_s"] * 1e9 / (NUM_WEIGHTS * BITS / 8)
    factor = answer / right
    if 0.98 <= factor <= 1.02:
        return None
    for wrong, why in (
        (1 / 8, "that is the limit if a weight had so many *bytes*; a byte has 8 bits"),
        (BITS / 4, "the four bits are not all: 4.5 bits per weight counts the scales too"),
        (BITS / 8, "that is one byte for a weight; it is 4.5 bits"),
        (1 / right**2, "that is seconds for a token; tokens per second were asked for"),
    ):
        if 0.98 <= factor / wrong <= 1.02:
            return why
    return "how many bytes does a token read, and how many come in a second?"


@exercise(difficulty=1, importance=2, minutes=3)
def most_readers(answer: Any, lesson: Any) -> str | None:
    rows = lesson.tables["landscape"]
    by_readers = {row["readers"]: row["tok/s of one"] for row in rows}
    promised = by_readers[1] / 2
    if answer not in by_readers:
        return "give a number of readers that was measured: the first column"
    if by_readers[answer] < promised:
        return "with so many each reader gets less than half of what one alone gets"
    if answer != max(readers for readers, rate in by_readers.items() if rate >= promised):
        return "the promise holds, but there is a larger number for which it holds too"
    return None
