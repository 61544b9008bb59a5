"""Checkers of INF-31, PagedAttention."""

from __future__ import annotations

from typing import Any

from ridgeline.course.exercises import exercise
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.synth import preset_config

TABLE, POSITION, BLOCK_SIZE = (7, 3, 9), 70, 32
MEMORY_BYTES, LIMIT, MEAN_STORED, PAGE = 5_000_000_000, 4096, 800, 16
BUDGET, LONG_MEAN = 0.02, 1500


@exercise(difficulty=1, importance=3, minutes=5)
def slot(answer: Any, lesson: Any) -> str | None:
    """The slot of position 70 of a request whose table is (7, 3, 9)."""
    index, offset = divmod(POSITION, BLOCK_SIZE)
    if answer == TABLE[index] * BLOCK_SIZE + offset:
        return None
    if answer == POSITION:
        return (
            "that is where it would be if blocks lay in the order of the text; look its block up in the table"
        )
    if answer == TABLE[index] + offset:
        return "a block id counts blocks, a slot counts tokens: how many slots lie before the block?"
    if answer == TABLE[index] * BLOCK_SIZE + offset - 1:
        return "one too few: positions and offsets count from 0"
    if isinstance(answer, int) and answer % BLOCK_SIZE == offset:
        return "the offset is right, the block is not: which entry of the table holds this position?"
    return "first find the entry of the table that holds the position, then the place inside that block"


@exercise(difficulty=1, importance=2, minutes=5)
def unused(answer: Any, lesson: Any) -> str | None:
    """A function of (number of tokens, block size) -> slots that are held and store nothing."""
    if not callable(answer):
        return "a function is wanted: unused(num_tokens, block_size)"
    for num_tokens, block_size in ((1, 32), (31, 32), (33, 32), (100, 16), (5, 256)):
        if answer(num_tokens, block_size) != -(-num_tokens // block_size) * block_size - num_tokens:
            given = answer(num_tokens, block_size)
            return (
                f"{num_tokens} tokens in blocks of {block_size}: it says {given}; how many blocks are held, "
                "and how many slots is that?"
            )
    if answer(64, 32) != 0:
        return "64 tokens fill two blocks of 32 exactly, and none is empty; yours counts a block too many"
    return None


@exercise(difficulty=3, importance=3, minutes=10)
def requests_that_fit(answer: Any, lesson: Any) -> str | None:
    """(contiguous, paged) requests of the shape of Llama 3.1 8B in 5 GB of float16 cache."""
    token_bytes = CacheLayout.bytes_per_token(preset_config("llama-8b"), "float16")
    slots = MEMORY_BYTES // token_bytes
    right = _fit(slots)
    try:
        given = (int(answer[0]), int(answer[1]))
    except (TypeError, ValueError, IndexError):
        return "two numbers are wanted: (contiguous, paged)"
    if given[0] == right[0] and abs(given[1] - right[1]) <= 1:
        return None
    if given[0] == _fit(2 * slots)[0]:
        return "twice too many: a token keeps a key and a value"
    if given[0] == _fit(slots // 4)[0]:
        return "four times too few: the cache keeps KV heads, and this model has 8 of them for 32 query heads"
    if given[0] != right[0]:
        return (
            "the contiguous number is not right: how many slots are there, and what does a request reserve?"
        )
    if given[1] == slots // MEAN_STORED:
        return "nearly: the last block of each request is not full"
    return (
        "the contiguous number is right; for the paged one, a request holds what it stores and half a block"
    )


def _fit(slots: int) -> tuple[int, int]:
    return slots // LIMIT, int(slots / (MEAN_STORED + (PAGE - 1) / 2))


@exercise(difficulty=2, importance=2, minutes=5)
def block_size(answer: Any, lesson: Any) -> str | None:
    """The largest power of two whose blocks waste at most 2 % at 1,500 tokens a request."""

    def waste(size: int) -> float:
        return (size - 1) / 2 / (LONG_MEAN + (size - 1) / 2)

    right = max(2**power for power in range(12) if waste(2**power) <= BUDGET)
    if answer == right:
        return None
    if not isinstance(answer, int) or answer < 1 or answer & (answer - 1):
        return "a power of two is wanted, as a whole number"
    if answer > right:
        return f"blocks of {answer} waste {100 * waste(answer):.1f} % here: too much"
    return f"blocks of {answer} waste {100 * waste(answer):.1f} % here; there is room for larger ones"
