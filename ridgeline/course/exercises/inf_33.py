"""Checkers of INF-33, prefix caching."""

from __future__ import annotations

from typing import Any

from ridgeline.bench.simulate import Simulation, simulate
from ridgeline.bench.workload import Fixed, Listed, Workload, WorkloadRequest
from ridgeline.config import EngineConfig
from ridgeline.course.exercises import exercise
from ridgeline.models.synth import preset_config

BLOCK_SIZE = 32
SIZES = (4096, 6144, 7168, 12_288)


def _one_at_a_time(requests: list[WorkloadRequest], *, kv_cache_tokens: int = 16_384) -> Simulation:
    model = preset_config("smollm2-135m")
    options: dict[str, Any] = {"max_model_len": 2304, "max_num_seqs": 16, "kv_cache_tokens": kv_cache_tokens}
    config = EngineConfig.from_options("smollm2", executor="native", **options)
    return simulate(config, model, requests, lambda rows, logits, shared: 0.01, max_concurrency=1)


def _requests(**description: Any) -> list[WorkloadRequest]:
    return Workload(name="exercise", **description).requests(vocab_size=49_152, seed=0)


@exercise(difficulty=1, importance=3, minutes=5)
def hits(answer: Any, lesson: Any) -> str | None:
    """Hits of a second request after 500 shared tokens, and of a prompt of 512 tokens sent again."""
    first = _requests(num_requests=2, shared_prefix_len=500, prompt_lens=Fixed(40), output_lens=Fixed(1))
    same = _requests(num_requests=1, prompt_lens=Listed((512,)), output_lens=Fixed(1))
    right = tuple(_one_at_a_time(asked).requests[1].num_cached_tokens for asked in (first, same * 2))
    try:
        given = (int(answer[0]), int(answer[1]))
    except (TypeError, ValueError, IndexError):
        return "two numbers are wanted: (a, b)"
    if given == right:
        return None
    if given[0] == 500:
        return (
            "(a): only whole blocks are kept; the last of the system prompt also holds some of the question"
        )
    if given[0] == 512:
        return "(a): the sixteenth block also holds the beginning of a question, and that differs"
    if given[0] != right[0]:
        return "(a) is not right: how many whole blocks do both prompts begin with?"
    if given[1] == 512:
        return "(b): the first token needs the logits of the last prompt token, and logits are not kept"
    return "(b) is not right: whole blocks, and at least one token is left to compute"


@exercise(difficulty=3, importance=2, minutes=10)
def talk_rate(answer: Any, lesson: Any) -> str | None:
    """Hit rate of four turns with questions of 50 and answers of 100 tokens, in per cent."""
    found = _one_at_a_time(_requests(num_requests=4, turns=4, prompt_lens=Fixed(50), output_lens=Fixed(100)))
    right = 100 * found.num_prefix_hits / found.num_prefix_queries
    if not isinstance(answer, int | float):
        return "a number is wanted"
    if abs(answer - right) <= 1:
        return None
    if abs(100 * answer - right) <= 1:
        return "in per cent, please"
    if abs(answer - 100 * 900 / 1100) <= 1:
        return "nearly: only whole blocks are found again, and the last token of an answer was never computed"
    if answer < right - 10:
        return (
            "too low: are the answers in it? Their keys and values were computed too, while they were written"
        )
    return (
        "add up, for each turn, the prompt tokens and those that the turns before have left in whole blocks"
    )


@exercise(difficulty=2, importance=2, minutes=5)
def cache_size(answer: Any, lesson: Any) -> str | None:
    """The smallest cache in which the prefixes of six customers stay, by running them through it."""

    def num_found(slots: int) -> int:
        asked = _requests(
            num_requests=36,
            num_prefixes=6,
            shared_prefix_len=1024,
            prompt_lens=Fixed(64),
            output_lens=Fixed(32),
        )
        found = _one_at_a_time(asked, kv_cache_tokens=slots)
        return sum(request.num_cached_tokens == 1024 for request in found.requests)

    if answer not in SIZES:
        return f"one of {', '.join(map(str, SIZES))} is wanted"
    if num_found(answer) < 30:
        return (
            f"with {answer} slots {num_found(answer)} of the 30 later requests find their whole prefix; what "
            "else has to be in the cache between two visits?"
        )
    if any(num_found(smaller) == 30 for smaller in SIZES if smaller < answer):
        return f"{answer} slots are enough, and so are fewer"
    return None
