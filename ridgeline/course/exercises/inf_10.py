"""INF-10: bytes of a cache, the work that it saves, the requests that it holds."""

from __future__ import annotations

import random
from typing import Any

from ridgeline.course.exercises import exercise
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.synth import preset_config

MODEL = "llama-8b"
CACHE_BYTES, REQUEST_TOKENS, BLOCK_SIZE = 256 * 2**20, 300, 32


@exercise(difficulty=1, importance=3, minutes=5)
def kv_bytes(answer: Any, lesson: Any) -> str | None:
    """Bytes of K and V of one token of Llama 3.1 8B in float16."""
    model = preset_config(MODEL)
    right = CacheLayout.bytes_per_token(model, "float16")
    hints = {
        right
        // 2: "half of it. A layer keeps two vectors a head: which ones? And how many bytes has float16?",
        right // 4: "a quarter of it. K and V, and two bytes an element",
        right // model.num_layers: "that is one layer; every layer has keys and values of its own",
        right * model.num_q_per_kv: "the heads that keep K and V are not the heads that ask",
        8 * right: "that is in bits",
        2 * right: "twice of it. float16 has 16 bits",
    }
    if not isinstance(answer, int | float):
        return f"expected a number of bytes, given {type(answer).__name__}"
    return None if answer == right else hints.get(int(answer), "not that. Write down the four factors first")


@exercise(difficulty=2, importance=2, minutes=8)
def tokens_computed(answer: Any, lesson: Any) -> str | None:
    """Tokens that are computed for an answer of n tokens to a prompt of p, without a cache."""
    if not callable(answer):
        return f"expected a function of p and n, given {type(answer).__name__}"
    rng = random.Random(10)
    for p, n in ((5, 1), (5, 3), *((rng.randint(1, 500), rng.randint(1, 500)) for _ in range(20))):
        found, right = answer(p, n), sum(range(p, p + n))
        if found == right:
            continue
        if found == p + n - 1:
            return "that is the work with a cache: every token once, the last one never"
        if found == n * (p + n):
            return "early steps are cheaper: a step computes the text so far, not the final one"
        if found == sum(range(p + 1, p + n + 1)):
            return "one token too many a step: the token that a step finds is not computed in that step"
        if found == n * p:
            return "the text grows: the second step computes the first token of the answer, too"
        return f"for p={p}, n={n} it gives {found}. Try p=5, n=3 by hand: three steps"
    return None


@exercise(difficulty=2, importance=3, minutes=8)
def requests_that_fit(answer: Any, lesson: Any) -> str | None:
    """Requests of 300 tokens that a cache of 256 MiB in blocks of 32 tokens holds at once."""
    token_bytes = int(lesson.values["kv_token_bytes"])

    def requests(cache_bytes: int, one_token_bytes: int) -> int:
        return cache_bytes // (one_token_bytes * BLOCK_SIZE) // -(-REQUEST_TOKENS // BLOCK_SIZE)

    right = requests(CACHE_BYTES, token_bytes)
    if not isinstance(answer, int | float):
        return f"expected a number of requests, given {type(answer).__name__}"
    if answer == right:
        return None
    if answer == CACHE_BYTES // (token_bytes * REQUEST_TOKENS):
        return "a block belongs to one request: what is left over in its last block serves nobody else"
    if answer == requests(256 * 10**6, token_bytes):
        return "1 MiB is 2**20 bytes, not 10**6"
    if answer == requests(CACHE_BYTES, token_bytes // 2):
        return "a token has K and V"
    return "not that. Bytes of a block first, then blocks in the cache, then blocks of one request"


@exercise(difficulty=2, importance=2, minutes=5)
def equal_context(answer: Any, lesson: Any) -> str | None:
    """Tokens in the text at which a decode step reads as many bytes of cache as of weights."""
    right = lesson.values["weight_bytes"] / lesson.values["kv_token_bytes"]
    if not isinstance(answer, int | float):
        return f"expected a number of tokens, given {type(answer).__name__}"
    if abs(answer / right - 1) < 0.02:
        return None
    if abs(answer / right - 2) < 0.05 or abs(answer / right - 0.5) < 0.02:
        return (
            "off by a factor of two. One step reads K and V of every token of the text, and each weight once"
        )
    if abs(answer / right * lesson.values["num_layers"] - 1) < 0.02 or answer > 10 * right:
        return "are both numbers for the whole model, all layers?"
    return "not that. Two numbers of this notebook, divided by each other"
