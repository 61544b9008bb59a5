"""From logits to tokens: the numpy reference of sampling, in the order of transformers' processors.

logit bias, penalties and forbidden tokens first; then temperature, top-k, top-p, min-p and typical-p on the
candidates; then one draw. Random numbers are a counter hash of (seed, output position): a token never depends
on what else is in the batch. Log-probabilities are the model's own, from the raw logits.

Letters: L logit rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ridgeline.request import Sampled
from ridgeline.sampling_params import SamplingParams

Logits = npt.NDArray[np.floating]
_MASK = 2**64 - 1


class SamplingInput(Protocol):
    """The part of `engine.scheduler.SamplingRow` that sampling reads."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...
    @property
    def num_output(self) -> int: ...
    @property
    def forbidden_token_ids(self) -> Sequence[int]: ...
    @property
    def prompt_token_ids(self) -> Sequence[int]: ...
    @property
    def output_token_ids(self) -> Sequence[int]: ...
    @property
    def prompt_targets(self) -> Sequence[int]: ...


class LogitRow(Protocol):
    """The part of `engine.scheduler.PlanRow` that sampling reads."""

    @property
    def request_id(self) -> str: ...
    @property
    def num_logits(self) -> int: ...
    @property
    def samples(self) -> bool: ...
    @property
    def sampling(self) -> SamplingInput | None: ...


def _mix(x: int) -> int:
    """Finalizer of splitmix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) with 53 random bits: mix(mix(seed + golden) + golden·(counter + 1)) >> 11."""
    golden = 0x9E3779B97F4A7C15
    return (_mix(_mix(seed + golden & _MASK) + golden * (counter + 1) & _MASK) >> 11) / 2**53


def derive_seed(seed: int, request_index: int, choice: int) -> int:
    """Seed of choice `choice` of request number `request_index`; the same in every process."""
    key = f"{seed}/{request_index}/{choice}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def sample_plan(logits: Logits, rows: Sequence[LogitRow]) -> dict[str, Sampled]:
    """Choose a token for every row that samples, from its last logits [L, V] -> by request id."""
    sampled: dict[str, Sampled] = {}
    start = 0
    for row in rows:
        if row.num_logits and row.sampling is not None:
            mine = logits[start : start + row.num_logits]
            sampled[row.request_id] = _sample_row(mine, row.sampling, samples=row.samples)
        start += row.num_logits
    assert start == len(logits), f"{len(logits)} logit rows, the plan has {start}"
    return sampled


def _sample_row(logits: Logits, row: SamplingInput, *, samples: bool) -> Sampled:
    prompt_logprobs: tuple[tuple[tuple[int, float, int], ...], ...] = ()
    if row.params.prompt_logprobs is not None:
        prompt_logprobs = tuple(
            _target_logprobs(logits[i], target, row.params.prompt_logprobs)
            for i, target in enumerate(row.prompt_targets)
        )
    if not samples:
        return Sampled(-1, 0.0, prompt_logprobs=prompt_logprobs)
    last = logits[-1]
    token_id = choose(process(last, row), row)
    log_total = _log_sum_exp(last)
    top: tuple[tuple[int, float], ...] = ()
    if row.params.logprobs:
        top = tuple((i, float(last[i]) - log_total) for i in _largest(last, row.params.logprobs))
    return Sampled(
        token_id,
        float(last[token_id]) - log_total,
        1 + int(np.count_nonzero(last > last[token_id])),
        top,
        prompt_logprobs,
    )


def _target_logprobs(logits: Logits, target: int, count: int) -> tuple[tuple[int, float, int], ...]:
    """(token, logprob, rank) of the actual prompt token, then of the most probable ones."""
    log_total = _log_sum_exp(logits)
    rank = 1 + int(np.count_nonzero(logits > logits[target]))
    entries = [(target, float(logits[target]) - log_total, rank)]
    entries += [(i, float(logits[i]) - log_total, n + 1) for n, i in enumerate(_largest(logits, count))]
    return tuple(entries)


def _log_sum_exp(logits: Logits) -> float:
    best = float(logits.max())
    assert np.isfinite(best), "the model gave no finite logit"
    return best + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))


def _largest(logits: Logits, count: int) -> list[int]:
    """Ids of the `count` largest, best first, ties by id."""
    if count <= 0:
        return []
    if count < len(logits):
        threshold = np.partition(logits, -count)[-count]
        candidates = np.flatnonzero(logits >= threshold)
    else:
        candidates = np.arange(len(logits))
    order = np.lexsort((candidates, -logits[candidates]))
    return [int(i) for i in candidates[order[:count]]]


def process(logits: Logits, row: SamplingInput) -> Logits:
    """Bias, penalties and forbidden tokens on one row [V]; the row itself when nothing applies."""
    params = row.params
    if not (params.logit_bias or params.needs_history or row.forbidden_token_ids):
        return logits
    logits = logits.copy()
    for token_id, bias in (params.logit_bias or {}).items():
        logits[token_id] += bias
    if params.needs_history:
        seen = np.unique(np.array([*row.prompt_token_ids, *row.output_token_ids], np.int64))
        score = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = np.where(score < 0, score * penalty, score / penalty)
        generated, counts = np.unique(np.array(row.output_token_ids, np.int64), return_counts=True)
        logits[generated] -= params.presence_penalty + params.frequency_penalty * counts
    logits[list(row.forbidden_token_ids)] = -np.inf
    return logits


def choose(logits: Logits, row: SamplingInput) -> int:
    """Draw one token from processed logits [V]; the most probable one at temperature 0, ties by id."""
    params = row.params
    best = int(np.argmax(logits))
    if params.is_greedy or params.top_k == 1:
        return best
    scaled = (logits.astype(np.float64) - float(logits[best])) / params.temperature
    ids, probabilities = _candidates(scaled, params)
    total = np.cumsum(probabilities)
    return int(ids[min(int(np.searchsorted(total, uniform(row.seed, row.num_output) * total[-1], side="right")), len(ids) - 1)])


def _candidates(
    scaled: npt.NDArray[np.float64], params: SamplingParams
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Ids and probabilities that survive the filters, most probable first, ties by id."""
    if 0 < params.top_k < len(scaled):
        ids = np.flatnonzero(scaled >= np.partition(scaled, -params.top_k)[-params.top_k])
    else:
        ids = np.flatnonzero(np.isfinite(scaled))
    ids = ids[np.lexsort((ids, -scaled[ids]))]
    weights = np.exp(scaled[ids])
    probabilities = weights / weights.sum()
    if params.top_p < 1.0:  # Holtzman et al. 2019: the smallest set that holds at least top_p
        before = np.cumsum(probabilities) - probabilities
        keep = before < params.top_p
        keep[0] = True
        ids, probabilities = ids[keep], probabilities[keep] / probabilities[keep].sum()
    if params.min_p > 0.0:
        keep = probabilities >= params.min_p * probabilities[0]
        ids, probabilities = ids[keep], probabilities[keep] / probabilities[keep].sum()
    if params.typical_p < 1.0:  # Meister et al. 2022: closest to the entropy first
        information = -np.log(probabilities)
        distance = np.abs(information - (probabilities * information).sum())
        order = np.argsort(distance, kind="stable")
        last = int((np.cumsum(probabilities[order]) < params.typical_p).sum())
        keep = np.sort(order[: last + 1])
        ids, probabilities = ids[keep], probabilities[keep] / probabilities[keep].sum()
    return ids, probabilities
