"""How far a model's predictions are from a reference model's, on the same tokens.

Perplexity can hide a change: some tokens get better and others worse. The mean KL divergence from the
reference cannot, and needs far fewer tokens to show it, because every difference is paired. All models
compute the same chunk one after the other, so that the logits of one chunk are all that is ever stored.
Measures as in llama.cpp's `--kl-divergence` and in "Accuracy is not all you need" (Dutta et al. 2024, flips).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import RequestError
from ridgeline.llm import LLM
from ridgeline.quality.perplexity import exponential
from ridgeline.quality.text import engine_of
from ridgeline.quality.windows import (
    ROWS_AT_ONCE,
    FloatArray,
    Progress,
    Window,
    chunk_tokens,
    make_windows,
    mean_and_error,
    window_logits,
)

Logits = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class DivergenceResult:
    """Nats per token; every *_error is a standard error over windows, None with a single one."""

    kl_mean: float
    """KL(reference || model)"""
    kl_error: float | None
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    """share of tokens for which both models find the same token the likeliest"""
    top1_agreement_error: float | None
    num_right_to_wrong: int
    """flips: the reference's likeliest token is the one in the text, the model's is not"""
    num_wrong_to_right: int
    flip_rate: float
    """both kinds of flips over tokens"""
    probability_difference_rms: float
    """root of the mean of (p_model - p_reference)^2 of the tokens in the text"""
    reference_perplexity: float
    perplexity: float
    log_likelihood_difference: float
    """mean of ln p_model - ln p_reference of the tokens in the text; negative: the model is worse"""
    log_likelihood_difference_error: float | None
    perplexity_ratio: float
    """perplexity / reference_perplexity"""
    num_tokens: int
    num_windows: int
    context: int
    seconds: float
    kl_of_windows: tuple[float, ...]
    """mean of each window, in order"""

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return {name: getattr(self, name) for name in self.__slots__}


def divergence(
    reference_llm: LLM | LLMEngine,
    llm: LLM | LLMEngine,
    token_ids: Sequence[int],
    *,
    context: int = 1024,
    on_progress: Progress | None = None,
) -> DivergenceResult:
    """Compare two loaded models token by token, every position but the first of each window.

    Raises RequestError where their vocabularies differ, and for the texts and contexts that `perplexity`
    refuses.
    """
    return divergences(reference_llm, [llm], token_ids, context=context, on_progress=on_progress)[0]


def divergences(
    reference_llm: LLM | LLMEngine,
    llms: Sequence[LLM | LLMEngine],
    token_ids: Sequence[int],
    *,
    context: int = 1024,
    on_progress: Progress | None = None,
) -> list[DivergenceResult]:
    """The same for several models, for which the reference is computed only once; `seconds` are of all."""
    reference, engines = engine_of(reference_llm), [engine_of(llm) for llm in llms]
    for engine in engines:
        check_same_vocabulary(reference, engine)
    prefix_ids = reference.tokenizer.prefix_ids if reference.tokenizer is not None else ()
    windows = make_windows(token_ids, context=context, prefix_ids=prefix_ids)
    chunk = chunk_tokens(reference, *engines)
    compared: list[list[FloatArray]] = [[] for _ in engines]
    started = time.perf_counter()
    for done, window in enumerate(windows, 1):
        parts = list(_compare(reference, engines, window, chunk=chunk))
        for index, of_model in enumerate(compared):
            of_model.append(np.concatenate([part[index] for part in parts], axis=1))
        if on_progress is not None:
            on_progress(done, len(windows))
    seconds = time.perf_counter() - started
    return [_result(of_model, context=context, seconds=seconds) for of_model in compared]


def _result(compared: Sequence[FloatArray], *, context: int, seconds: float) -> DivergenceResult:
    """From the six rows of `compare_logits` for each window."""
    theirs, ours, kl, _, right_before, right_now = np.concatenate(compared, axis=1)
    lost = int((right_before > right_now).sum())
    gained = int((right_before < right_now).sum())
    kl_mean, kl_error = mean_and_error([c[2] for c in compared])
    agreement, agreement_error = mean_and_error([c[3] for c in compared])
    difference, difference_error = mean_and_error([c[1] - c[0] for c in compared])
    return DivergenceResult(
        kl_mean=kl_mean,
        kl_error=kl_error,
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=agreement,
        top1_agreement_error=agreement_error,
        num_right_to_wrong=lost,
        num_wrong_to_right=gained,
        flip_rate=(lost + gained) / len(kl),
        probability_difference_rms=float(np.sqrt(np.mean((np.exp(ours) - np.exp(theirs)) ** 2))),
        reference_perplexity=exponential(-float(theirs.mean())),
        perplexity=exponential(-float(ours.mean())),
        log_likelihood_difference=difference,
        log_likelihood_difference_error=difference_error,
        perplexity_ratio=exponential(-difference),
        num_tokens=len(kl),
        num_windows=len(compared),
        context=context,
        seconds=seconds,
        kl_of_windows=tuple(float(c[2].mean()) for c in compared),
    )


def check_same_vocabulary(reference: LLMEngine, engine: LLMEngine) -> None:
    """Raise RequestError unless the same token ids mean the same text to both."""
    sizes = reference.model.config.vocab_size, engine.model.config.vocab_size
    problem = f"{sizes[0]} and {sizes[1]} tokens" if sizes[0] != sizes[1] else None
    first, second = reference.tokenizer, engine.tokenizer
    if problem is None and first is not None and second is not None:
        for token_id in range(min(first.vocab_size, second.vocab_size, sizes[0])):
            bytes_of = [t.token_bytes(token_id, skip_special_tokens=False) for t in (first, second)]
            if bytes_of[0] != bytes_of[1]:
                problem = f"token {token_id} is {bytes_of[0]!r} in the one and {bytes_of[1]!r} in the other"
                break
        if problem is None and first.prefix_ids != second.prefix_ids:
            problem = f"prompts begin with {first.prefix_ids} in the one and {second.prefix_ids} in the other"
    if problem is not None:
        raise RequestError(
            f"the reference and the model do not share a vocabulary: {problem}. "
            "Compare two forms (format, executor, options) of the same model"
        )


def _compare(
    reference: LLMEngine, engines: Sequence[LLMEngine], window: Window, *, chunk: int
) -> Iterator[list[FloatArray]]:
    """For each chunk and model what `compare_logits` gives, a few rows at a time."""
    targets, done = window.targets, 0
    together = (window_logits(engine, window, chunk=chunk) for engine in (reference, *engines))
    for theirs, *others in zip(*together, strict=True):
        for start in range(0, len(theirs), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_p = _log_softmax(theirs[rows])
            wanted = targets[done + start : done + start + len(log_p)]
            yield [_compare_rows(log_p, _log_softmax(ours[rows]), wanted) for ours in others]
        done += len(theirs)


def compare_logits(theirs: Logits, ours: Logits, targets: npt.NDArray[np.int64]) -> FloatArray:
    """Reference logits [L, V], model logits [L, V], true tokens [L] -> [6, L]: ln p_reference, ln p_model,
    KL, same likeliest, reference right, model right.

    KL(p || q) = sum_v p_v (ln p_v - ln q_v), in float64; what rounding leaves below zero is cut off.
    """
    return _compare_rows(_log_softmax(theirs), _log_softmax(ours), targets)


def _compare_rows(log_p: FloatArray, log_q: FloatArray, targets: npt.NDArray[np.int64]) -> FloatArray:
    rows = np.arange(len(targets))
    best_p, best_q = log_p.argmax(-1), log_q.argmax(-1)
    kl = np.einsum("lv,lv->l", np.exp(log_p), log_p - log_q)
    return np.stack(
        (
            log_p[rows, targets],
            log_q[rows, targets],
            np.maximum(kl, 0.0),
            best_p == best_q,
            best_p == targets,
            best_q == targets,
        )
    )


def _log_softmax(logits: Logits) -> FloatArray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
