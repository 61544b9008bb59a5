"""Prefill vs Decode: where a step turns compute bound, where requests spend time, what context costs."""

from __future__ import annotations

from typing import Any

from ridgeline.course.exercises import exercise

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, ELEMENT_BYTES = 30, 3, 64, 2
SUMMARY, STORY = (1024, 30), (64, 600)


@exercise(difficulty=2, importance=3, minutes=5)
def critical_tokens(answer: Any, lesson: Any) -> str | None:
    right = lesson.values["fp32_gflop_s"] / lesson.values["gb_s"]
    factor = answer / right
    if 0.98 <= factor <= 1.02:
        return None
    if 0.98 <= 8 * factor <= 1.02:
        return "mind bits and bytes: 16 bits are two bytes"
    if 0.98 <= factor / 2 <= 1.02 or 0.98 <= factor * 2 <= 1.02:
        return "a factor of two: a multiply-add is two FLOPs, and a weight of 16 bits is two bytes"
    if abs(answer - lesson.values["critical"]) < 0.02 * answer:
        return "that is for the weights of the file; here a weight has 16 bits, and the peak is another"
    return "set the FLOPs of n tokens over the peak equal to the bytes of the weights over the bandwidth"


@exercise(difficulty=1, importance=3, minutes=6)
def prefill_share(answer: Any, lesson: Any) -> str | None:
    first = {row["prompt"]: row["TTFT ms"] for row in lesson.tables["ttft"]}
    gap = next(
        row["TPOT ms"] for row in lesson.tables["tpot"] if row["requests"] == 1 and row["context"] == 512
    )
    right = [first[n] / (first[n] + (m - 1) * gap) for n, m in (SUMMARY, STORY)]
    if len(answer) != 2:
        return "a pair was asked for: the summary's share and the story's"
    if all(abs(a - r) <= 0.02 for a, r in zip(answer, right, strict=True)):
        return None
    if all(abs(a - r) <= 0.02 for a, r in zip(answer, right[::-1], strict=True)):
        return "the two are the wrong way round"
    if all(abs(1 - a - r) <= 0.02 for a, r in zip(answer, right, strict=True)):
        return "that is the share of decode"
    if all(abs(a - n / (n + m)) <= 0.02 for a, (n, m) in zip(answer, (SUMMARY, STORY), strict=True)):
        return "that is the share of the *tokens*; a prompt token and an output token take different times"
    return "time of a request: TTFT, then one TPOT for each output token but the first"


@exercise(difficulty=2, importance=2, minutes=5)
def half_more(answer: Any, lesson: Any) -> str | None:
    token_bytes = NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * ELEMENT_BYTES
    factor = answer / (0.5 * lesson.values["weight_bytes"] / token_bytes)
    if 0.98 <= factor <= 1.02:
        return None
    for wrong, why in (
        (2.0, "twice too many: either keys *and* values, or that only a half was asked for"),
        (3.0, "the cache has more than one key/value head"),
        (30.0, "every layer has a cache of its own"),
        (1 / 3, "heads of the queries are not in the cache: count key/value heads"),
    ):
        if 0.98 <= factor / wrong <= 1.02:
            return why
    return "how many bytes does the cache keep for one token, and how many are half of the weights?"
