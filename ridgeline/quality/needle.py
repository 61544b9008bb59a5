"""A needle in a long context: is a number that was said once, far back, still found?

A prompt of exactly `length` tokens hides one sentence with a five-digit number at `depth` (0: the beginning,
1: the end) of plain filler and then asks for it. Small models often know the number without answering well,
so the answer is a choice: the number's log-probability against that of nine others (chance is 0.1). Whether
greedy decoding would have said the number is read from the same logits. After the passkey test of Mohtashami
and Jaggi, "Landmark Attention" (2023).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import RequestError
from ridgeline.llm import LLM
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.quality.text import engine_of
from ridgeline.quality.windows import Progress, check_fits, chunk_tokens, log_likelihoods

NUM_CHOICES = 10
INTRODUCTION = "A secret number is hidden in the text below. Find it and remember it.\n\n"
NEEDLE = " The secret number is {}. Remember it: {} is the secret number."
QUESTION = "\n\nWhat is the secret number? The secret number is"
FILLER = (
    " The boats came back before the rain and the nets were hung along the wall."
    " Someone had left a lamp in the window, though nobody was expected."
    " In the kitchen bread was rising under a cloth, and the cat slept beside the stove."
    " By evening the wind had turned, and the street was quiet again."
)
"""Repeated as often as needed; without any number."""


@dataclass(frozen=True, slots=True)
class NeedleCell:
    """All trials of one length and depth."""

    length: int
    depth: float
    accuracy: float
    """share of trials in which the number is likelier than each of the others"""
    greedy_accuracy: float
    """share in which greedy decoding would answer with the number"""
    margin: float
    """mean of ln p(number) - ln p(the likeliest other)"""


@dataclass(frozen=True, slots=True)
class NeedleResult:
    cells: tuple[NeedleCell, ...]
    """lengths in order, and the depths of each in order"""
    accuracy: float
    greedy_accuracy: float
    num_trials: int
    """of each cell"""
    num_choices: int
    seed: int

    def document(self) -> dict[str, Any]:
        """As plain data."""
        cells = [{name: getattr(c, name) for name in c.__slots__} for c in self.cells]
        return {name: getattr(self, name) for name in self.__slots__} | {"cells": cells}


def needle(
    llm: LLM | LLMEngine,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    num_trials: int = 5,
    seed: int = 0,
    filler: str = FILLER,
    on_progress: Progress | None = None,
) -> NeedleResult:
    """Test every length (tokens of the prompt) at every depth, with other numbers in each trial.

    Raises RequestError for a length that is too short for needle and question or too long for the engine, a
    depth outside 0 to 1, and a model without a tokenizer.
    """
    engine = engine_of(llm)
    if not lengths or not depths or num_trials < 1:
        raise RequestError(
            f"needle: expected lengths, depths and at least 1 trial; given {len(lengths)} lengths, "
            f"{len(depths)} depths, num_trials={num_trials}"
        )
    if bad := [depth for depth in depths if not 0 <= depth <= 1]:
        raise RequestError(f"depths={bad}: expected numbers from 0 (the beginning) to 1 (the end)")
    check_fits(engine, max(lengths) + 32)  # and the tokens of an answer
    rng = random.Random(seed)
    total, done = len(lengths) * len(depths) * num_trials, 0
    cells = []
    for length in lengths:
        for depth in depths:
            hits = greedy_hits = 0
            margins = []
            for _ in range(num_trials):
                numbers = [str(n) for n in rng.sample(range(10000, 100000), NUM_CHOICES)]
                prompt = make_prompt(engine, numbers[0], length=length, depth=depth, filler=filler)
                scores, greedy = _score_answers(engine, prompt, [" " + number for number in numbers])
                margins.append(scores[0] - max(scores[1:]))
                hits += margins[-1] > 0
                greedy_hits += greedy
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
            margin = sum(margins) / num_trials
            cells.append(NeedleCell(length, depth, hits / num_trials, greedy_hits / num_trials, margin))
    return NeedleResult(
        cells=tuple(cells),
        accuracy=sum(c.accuracy for c in cells) / len(cells),
        greedy_accuracy=sum(c.greedy_accuracy for c in cells) / len(cells),
        num_trials=num_trials,
        num_choices=NUM_CHOICES,
        seed=seed,
    )


def make_prompt(
    engine: LLMEngine, number: str, *, length: int, depth: float, filler: str = FILLER
) -> list[int]:
    """Token ids, exactly `length` of them, with the needle after the share `depth` of the filler."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise RequestError("needle: this model has no tokenizer; use a model that can read text")

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    before = [*tokenizer.prefix_ids, *ids(INTRODUCTION)]
    hidden, question, once = ids(NEEDLE.format(number, number)), ids(QUESTION), ids(filler)
    room = length - len(before) - len(hidden) - len(question)
    if room < 0 or not once:
        raise RequestError(
            f"needle: a prompt of {length} tokens is too short, since introduction, needle and question take "
            f"{length - room}; ask for a greater length"
        )
    straw = (once * (room // len(once) + 1))[:room]
    cut = round(depth * room)
    return [*before, *straw[:cut], *hidden, *straw[cut:], *question]


def _score_answers(engine: LLMEngine, prompt: list[int], answers: Sequence[str]) -> tuple[list[float], bool]:
    """ln p of each answer after the prompt, and whether greedy decoding gives the first one.

    The prompt is computed once; each answer's tokens then take the same places behind it in the cache.
    """
    assert engine.tokenizer is not None
    last = _forward(engine, prompt, 0, num_logits=1)[-1:].copy()
    scores: list[float] = []
    greedy = False
    for answer in answers:
        token_ids = engine.tokenizer.encode(answer, add_special_tokens=False)
        logits = last
        if len(token_ids) > 1:
            rest = _forward(engine, token_ids[:-1], len(prompt), num_logits=len(token_ids) - 1)
            logits = np.concatenate((last, rest))
        if not scores:
            greedy = logits.argmax(-1).tolist() == token_ids
        scores.append(float(log_likelihoods(logits, np.array(token_ids, np.int64)).sum()))
    return scores, greedy


def _forward(engine: LLMEngine, token_ids: list[int], start: int, *, num_logits: int) -> Any:
    """Compute tokens at `start` of the one sequence -> logits [num_logits, V] of the last ones."""
    size, chunk = engine.layout.block_size, chunk_tokens(engine)
    for first in range(0, len(token_ids), chunk):
        tokens = tuple(token_ids[first : first + chunk])
        end = start + first + len(tokens)
        row = Row(
            tokens, start + first, range(-(-end // size)), num_logits if end - start == len(token_ids) else 0
        )
        logits = engine.executor.forward(ForwardBatch.from_rows([row], block_size=size))
    return logits
