"""Perplexity: exp of the mean negative log-likelihood of a text, and how it depends on the position.

The mean is over tokens of all windows together, its standard error over windows (`windows.mean_and_error`).
Buckets are positions from a power of two to the next: they show at which context a changed RoPE, a sliding
window or a coarser cache begins to cost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ridgeline.engine.engine import LLMEngine
from ridgeline.llm import LLM
from ridgeline.quality.text import engine_of
from ridgeline.quality.windows import (
    FloatArray,
    Progress,
    Window,
    chunk_tokens,
    log_likelihoods,
    make_windows,
    mean_and_error,
    window_logits,
)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Scored tokens with at least `start` and fewer than `end` tokens before them in their window."""

    start: int
    end: int
    num_tokens: int
    nll_mean: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """Natural logarithms throughout; errors are standard errors over windows, None with a single one."""

    perplexity: float
    perplexity_error: float | None
    """perplexity * nll_error: the delta method"""
    nll_mean: float
    nll_error: float | None
    num_tokens: int
    """that were scored"""
    num_windows: int
    context: int
    stride: int | None
    score_from: int
    buckets: tuple[Bucket, ...]
    seconds: float
    tokens_per_s: float
    """tokens computed, scored or not, over all the time that was needed, softmax included"""
    log_likelihoods: tuple[FloatArray, ...] = field(repr=False, compare=False)
    """one array for each window: what paired comparisons are made of"""

    def document(self) -> dict[str, Any]:
        """All but the single log-likelihoods, as plain data."""
        names = [name for name in self.__slots__ if name not in ("log_likelihoods", "buckets")]
        buckets = [{name: getattr(b, name) for name in b.__slots__} for b in self.buckets]
        return {name: getattr(self, name) for name in names} | {"buckets": buckets}


def perplexity(
    llm: LLM | LLMEngine,
    token_ids: Sequence[int],
    *,
    context: int = 1024,
    stride: int | None = None,
    score_from: int = 1,
    on_progress: Progress | None = None,
) -> PerplexityResult:
    """Score a text by a model that is loaded with max_model_len >= context.

    What is scored, and BOS: see `quality.windows`. Raises RequestError for a text shorter than a window, a
    context beyond what the engine holds, or a stride that makes no sense.
    """
    engine = engine_of(llm)
    prefix_ids = engine.tokenizer.prefix_ids if engine.tokenizer is not None else ()
    windows = make_windows(
        token_ids, context=context, stride=stride, score_from=score_from, prefix_ids=prefix_ids
    )
    chunk = chunk_tokens(engine)
    scores: list[FloatArray] = []
    started = time.perf_counter()
    for window in windows:
        scores.append(_score(engine, window, chunk=chunk))
        if on_progress is not None:
            on_progress(len(scores), len(windows))
    seconds = time.perf_counter() - started
    nll, error = mean_and_error([-s for s in scores])
    return PerplexityResult(
        perplexity=exponential(nll),
        perplexity_error=None if error is None else exponential(nll) * error,
        nll_mean=nll,
        nll_error=error,
        num_tokens=sum(map(len, scores)),
        num_windows=len(windows),
        context=context,
        stride=stride,
        score_from=score_from,
        buckets=_buckets(windows, scores),
        seconds=seconds,
        tokens_per_s=sum(len(w.token_ids) - 1 for w in windows) / seconds,
        log_likelihoods=tuple(scores),
    )


def _score(engine: LLMEngine, window: Window, *, chunk: int) -> FloatArray:
    targets, parts, done = window.targets, [], 0
    for logits in window_logits(engine, window, chunk=chunk):
        parts.append(log_likelihoods(logits, targets[done : done + len(logits)]))
        done += len(logits)
    return np.concatenate(parts)


def _buckets(windows: Sequence[Window], scores: Sequence[FloatArray]) -> tuple[Bucket, ...]:
    positions = np.concatenate([np.arange(w.score_from, len(w.token_ids)) for w in windows])
    losses = -np.concatenate(scores)
    buckets = []
    for power in range(int(positions.max()).bit_length()):
        inside = losses[(positions >= 1 << power) & (positions < 2 << power)]
        if len(inside):
            nll = float(inside.mean())
            buckets.append(Bucket(1 << power, 2 << power, len(inside), nll, exponential(nll)))
    return tuple(buckets)


def exponential(nll: float) -> float:
    """exp, and the largest float where that overflows: random models can be that surprised."""
    return math.exp(min(nll, 700.0))
