"""A text as windows of a stated context, and their logits a chunk at a time.

A window is computed as the engine would compute a prompt: chunk after chunk through the KV cache. Only rows
that are scored go through the head, and the logits of one chunk are all that is in memory, so the length of a
window does not matter. Two recipes:

- without a stride, windows do not overlap, a partial last one is dropped, and positions from `score_from` on
  are scored. The default 1 scores all but the first; llama.cpp's own tool starts at context / 2 + 1;
- with a stride, a window starts every `stride` tokens and only tokens that no earlier window had are scored,
  the rest of the text in a shorter last window (the recipe of the Hugging Face documentation).

Where the tokenizer starts prompts with BOS, BOS replaces the first token of every window, as in llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import RequestError
from ridgeline.ops.batch import ForwardBatch, Row

MAX_CHUNK_TOKENS = 512
MAX_LOGITS_BYTES = 128 << 20
"""Of one chunk, in float32: what keeps the chunk short where the vocabulary is large."""
ROWS_AT_ONCE = 16
"""Rows of logits turned into probabilities together; float64 copies of them stay small."""

FloatArray = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]
"""Called with how many windows, or trials, are done and how many there are."""


@dataclass(frozen=True, slots=True)
class Window:
    token_ids: tuple[int, ...]
    score_from: int
    """First position whose token is scored; at least 1, since nothing predicts the first."""

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """The tokens that are scored."""
        return np.array(self.token_ids[self.score_from :], np.int64)


def make_windows(
    token_ids: Sequence[int],
    *,
    context: int,
    stride: int | None = None,
    score_from: int = 1,
    prefix_ids: Sequence[int] = (),
) -> list[Window]:
    """Cut a text into windows of `context` tokens, each beginning with `prefix_ids` in place of its own.

    Raises RequestError for a text that does not fill one window and for numbers that contradict each other.
    """
    first = max(1, len(prefix_ids))
    if not first < context:
        raise RequestError(f"context={context}: expected at least {first + 1} tokens, one of them to score")
    if not 1 <= score_from < context:
        raise RequestError(f"score_from={score_from}: expected a position from 1 to {context - 1}")
    if stride is not None and (score_from != 1 or not 1 <= stride <= context):
        raise RequestError(
            f"stride={stride}: expected 1 to {context} (context), and no score_from beside it; "
            f"given score_from={score_from}"
        )
    if len(token_ids) < context:
        raise RequestError(
            f"the text has {len(token_ids)} tokens and a window needs {context}; "
            "give a longer text or a shorter context"
        )
    windows = []
    start, done = 0, 0
    while start + context <= len(token_ids) or (stride is not None and done < len(token_ids)):
        end = min(start + context, len(token_ids))
        window = (*prefix_ids, *token_ids[start + len(prefix_ids) : end])
        scored = score_from if stride is None else done - start
        if max(first, scored) < len(window):
            windows.append(Window(window, max(first, scored)))
        start, done = start + (stride or context), end
    return windows


def chunk_tokens(*engines: LLMEngine) -> int:
    """Tokens of a chunk that all of these engines can compute in one step."""
    sizes = [MAX_CHUNK_TOKENS]
    for engine in engines:
        sizes.append(engine.config.scheduler.max_num_batched_tokens or MAX_CHUNK_TOKENS)
        sizes.append(max(1, MAX_LOGITS_BYTES // (4 * engine.model.config.vocab_size)))
    return min(sizes)


def window_logits(
    engine: LLMEngine, window: Window, *, chunk: int
) -> Iterator[npt.NDArray[np.floating[Any]]]:
    """Logits [L, V] that predict the scored tokens, in order; each array lives until the next is asked for.

    The window starts at the first block of the cache, whatever was there. Raises RequestError where the cache
    is too small.
    """
    layout = engine.layout
    inputs = window.token_ids[:-1]  # the last one predicts nothing that is scored
    check_fits(engine, len(inputs))
    for start in range(0, len(inputs), chunk):
        tokens = inputs[start : start + chunk]
        end = start + len(tokens)
        num_logits = max(0, end - max(start, window.score_from - 1))
        blocks = range(-(-end // layout.block_size))
        batch = ForwardBatch.from_rows([Row(tokens, start, blocks, num_logits)], block_size=layout.block_size)
        logits = engine.executor.forward(batch)
        if num_logits:
            yield logits


def check_fits(engine: LLMEngine, num_tokens: int) -> None:
    """Raise RequestError for a window longer than the model's length limit or its cache."""
    limit = min(engine.layout.num_slots, engine.config.max_model_len or 0)
    if num_tokens > limit:
        raise RequestError(
            f"a window of {num_tokens} tokens does not fit in this engine, which holds {limit}; "
            "raise max_model_len (and the size of the KV cache, if you set it) or lower the context"
        )
    if engine.has_unfinished:
        raise RequestError("this engine is serving requests, and measuring overwrites their cache; wait")


def log_likelihoods(logits: npt.NDArray[np.floating[Any]], targets: npt.NDArray[np.int64]) -> FloatArray:
    """Natural logarithm of the probability of each target: logits [L, V], targets [L] -> [L].

    Exponentials are taken in the type of the logits (float32 is exact to 1e-7 of each) and summed in float64.
    """
    chosen = logits[np.arange(len(logits)), targets].astype(np.float64)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        block = logits[start : start + ROWS_AT_ONCE]
        largest = block.max(-1, keepdims=True)
        totals = np.exp(block - largest).sum(-1, dtype=np.float64)
        chosen[start : start + ROWS_AT_ONCE] -= largest[:, 0] + np.log(totals)
    return chosen


def mean_and_error(values_of_windows: Sequence[FloatArray]) -> tuple[float, float | None]:
    """Mean over all tokens and its standard error; None with fewer than two windows.

    Tokens of one window are not independent, so the error is that of a ratio of sums over windows:
    sqrt(W / (W - 1) * sum_w (sum_w x - n_w * mean)^2) / N.
    """
    sums = np.array([values.sum() for values in values_of_windows], np.float64)
    counts = np.array([len(values) for values in values_of_windows], np.float64)
    mean = float(sums.sum() / counts.sum())
    num = len(sums)
    if num < 2:
        return mean, None
    spread = float(((sums - counts * mean) ** 2).sum())
    return mean, math.sqrt(num / (num - 1) * spread) / float(counts.sum())
