"""Profiling Inference: Amdahl's law, a rate from sums, and the op that is worth the work."""

from __future__ import annotations

from typing import Any

from ridgeline.course.exercises import exercise


@exercise(difficulty=1, importance=3, minutes=4)
def amdahl(answer: Any, lesson: Any) -> str | None:
    share = lesson.values["attention_share"]
    right = 1 / (1 - share)
    if abs(answer / right - 1) <= 0.01:
        return None
    if abs(answer * share - 1) <= 0.01:
        return "that would be right if attention were all that is left"
    if answer < 1:
        return "a factor of less than 1 would make it slower"
    return "what is left of the step when attention takes no time?"


@exercise(difficulty=1, importance=2, minutes=4)
def achieved(answer: Any, lesson: Any) -> str | None:
    rows = [row for row in lesson.tables["native"] if row["op"].startswith("linear")]
    right = sum(row["MB"] for row in rows) / sum(row["ms"] for row in rows)
    factor = answer / right
    if abs(factor - 1) <= 0.005:
        return None
    if any(abs(factor / wrong - 1) <= 0.005 for wrong in (1000, 1 / 1000)):
        return "mind the units: how many GB/s is one MB in a millisecond?"
    if abs(answer - sum(row["GB/s"] for row in rows)) <= 0.005 * answer:
        return "the ops run one after the other, so their rates do not add up"
    if abs(answer - sum(row["GB/s"] for row in rows) / len(rows)) <= 0.005 * answer:
        return "a mean of rates counts a short op as much as a long one; add up bytes and times instead"
    return "all bytes of these rows over all their time"


@exercise(difficulty=2, importance=3, minutes=5)
def work_on(answer: Any, lesson: Any) -> str | None:
    rows = {row["op"]: row for row in lesson.tables["native"]}
    if answer not in rows:
        return "give the text of a row's column `op`"
    gain = {op: row["ms"] * (1 - row["of the limit"]) for op, row in rows.items()}
    if gain[answer] >= max(gain.values()):
        return None
    if rows[answer]["ms"] >= max(row["ms"] for row in rows.values()):
        return "it takes the most time, but it is near its limit; what could be saved elsewhere?"
    return "another op has more time to give: its time times the share of the limit that it does not reach"
