"""From logits to tokens: the numpy reference of sampling, in the order of transformers' processors.

Logit bias, penalties and forbidden tokens change the logits; temperature, top-k, top-p, min-p and typical-p
leave a set of tokens; one random number chooses from it. That number is a counter hash of (seed, output
position), so a token never depends on what else is in the batch or on how often a request was preempted.
Log-probabilities are the model's own, from the raw logits.

Letters: L logit rows, V vocabulary, N tokens that stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ridgeline.request import Sampled
from ridgeline.sampling_params import SamplingParams

Logits = npt.NDArray[np.floating[Any]]
"""float32 or float64."""
TokenIds = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NUM_BINS = 512
_NEAR = 8.0
_FEW, _TIES = 256, 8
"""Up to this top_k, candidates come from a heap; so many more are fetched to see ties with the k-th."""


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


class Reducer(Protocol):
    """Reductions over rows of logits in faster code than numpy (`ops.native.NativeProgram`)."""

    def greedy(
        self, logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Of each row [V]: the first largest token or -1, its logit, and log(sum(exp(logits)))."""
        ...

    def top_k(
        self, logits: npt.NDArray[np.float32], count: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Ids and values of the largest of one row, largest first, ties by id."""
        ...


def sample_plan(
    logits: Logits, rows: Sequence[LogitRow], reducer: Reducer | None = None
) -> dict[str, Sampled]:
    """What each row of a plan that has logits asks for, by request id.

    logits [L, V]: the rows' logits one after the other. A row that does not sample yet (a chunk of a prompt
    with prompt_logprobs) gives token id -1. A reducer takes over what needs no more than its reductions.
    """
    sampled: dict[str, Sampled] = {}
    start = 0
    if reducer is not None and len(logits):
        best, largest, log_total = (values.tolist() for values in reducer.greedy(logits))
        assert min(best) >= 0, "the model gave logits that are not finite"
    for row in rows:
        end = start + row.num_logits
        if row.num_logits and row.sampling is not None:
            fast = None
            if reducer is not None and row.samples:
                last = end - 1
                fast = _sample_reduced(
                    logits[last], row.sampling, best[last], largest[last], log_total[last], reducer
                )
            sampled[row.request_id] = fast or sample(logits[start:end], row.sampling, samples=row.samples)
        start = end
    assert start == len(logits), f"{len(logits)} rows of logits, but the plan has {start}"
    return sampled


def _sample_reduced(
    logits: Logits, row: SamplingInput, best: int, largest: float, log_total: float, reducer: Reducer
) -> Sampled | None:
    """A token from reductions alone, or None where the whole row [V] is needed.

    That is so with a changed distribution, with logprobs, and when sampling from more than a few candidates.
    """
    params = row.params
    if params.prompt_logprobs is not None or params.logprobs or row.forbidden_token_ids:
        return None
    if params.logit_bias or params.needs_history:
        return None
    if params.is_greedy:
        return Sampled(best, largest - log_total, 1, (), ())
    if not 0 < params.top_k <= _FEW:
        return None
    ids, values = reducer.top_k(logits, params.top_k + _TIES)
    if len(ids) > params.top_k:
        if values[params.top_k - 1] == values[-1]:
            return None  # more tokens than were fetched tie with the k-th
        kept = values >= values[params.top_k - 1]
        ids, values = ids[kept], values[kept]
    order = np.argsort(ids)
    ids, values = ids[order], values[order]
    at = choose(values, row)
    rank = 1 + int(np.count_nonzero(values > values[at]))
    return Sampled(int(ids[at]), float(values[at]) - log_total, rank, (), ())


def sample(logits: Logits, row: SamplingInput, *, samples: bool = True) -> Sampled:
    """One request's logits [L, V]: its prompt targets from the first rows, its token from the last."""
    count = row.params.prompt_logprobs
    targets = () if count is None else row.prompt_targets
    assert len(targets) + samples <= len(logits), f"{len(targets)} targets, {len(logits)} rows of logits"
    prompt_logprobs = tuple(
        _target_logprobs(at, target, count or 0)
        for at, target in zip(logits[: len(targets)], targets, strict=True)
    )
    if not samples:
        return Sampled(-1, 0.0, prompt_logprobs=prompt_logprobs)
    raw = logits[-1]
    log_total = _log_sum_exp(raw)
    token_id = choose(process(raw, row), row)
    top = tuple((i, float(raw[i]) - log_total) for i in _largest(raw, row.params.logprobs or 0))
    return Sampled(token_id, float(raw[token_id]) - log_total, _rank(raw, token_id), top, prompt_logprobs)


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
        score, penalty = logits[seen], params.repetition_penalty
        logits[seen] = np.where(score < 0, score * penalty, score / penalty)
        generated, times = np.unique(np.array(row.output_token_ids, np.int64), return_counts=True)
        logits[generated] -= (params.presence_penalty + params.frequency_penalty * times).astype(logits.dtype)
    # A tokenizer may name an end-of-sequence token that the model has no logit for.
    logits[[i for i in row.forbidden_token_ids if i < len(logits)]] = -np.inf
    return logits


def choose(logits: Logits, row: SamplingInput) -> int:
    """One token from processed logits [V]: at temperature 0 the most probable one, ties by id.

    Otherwise by inversion: of the tokens by descending probability, ties by id, the one at which the sum of
    the probabilities reaches the row's random number.
    """
    if row.params.is_greedy:
        return int(np.argmax(logits))
    ids, gaps, weights = candidates(logits, row.params)
    return int(ids[_reach(gaps, weights, uniform(row.seed, row.num_output) * float(weights.sum()))])


def candidates(logits: Logits, params: SamplingParams) -> tuple[TokenIds, Floats, Floats]:
    """What temperature and filters leave of processed logits [V]: ids, gaps and weights, each [N], N > 0.

    Ids ascend. A gap is how far a scaled logit lies below the largest; a weight is exp(-gap), the probability
    before it is normalised.
    """
    best = float(logits.max())
    assert np.isfinite(best), f"no token can be chosen: the largest logit is {best}"
    ids = np.arange(len(logits))
    if 0 < params.top_k < len(logits):  # Fan et al. 2018; tokens tied with the k-th stay, as in transformers
        ids = np.flatnonzero(logits >= np.partition(logits, -params.top_k)[-params.top_k])
        logits = logits[ids]
    gaps = np.subtract(best, logits, dtype=np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to infinity, as it should
        gaps /= params.temperature
    weights = np.negative(gaps)
    np.exp(weights, out=weights)
    if params.top_p < 1.0:  # Holtzman et al. 2020: the fewest tokens that hold top_p
        last = _reach(gaps, weights, params.top_p * float(weights.sum()))
        keep = np.flatnonzero(gaps <= gaps[last])
        keep = keep[(gaps[keep] < gaps[last]) | (keep <= last)]
        ids, gaps, weights = ids[keep], gaps[keep], weights[keep]
    if params.min_p > 0.0:
        keep = np.flatnonzero(weights >= params.min_p)
        ids, gaps, weights = ids[keep], gaps[keep], weights[keep]
    if params.typical_p < 1.0:  # Meister et al. 2022: |-log p - entropy|, where the log of the total cancels
        total = float(weights.sum())
        surprise = weights * np.where(weights > 0.0, gaps, 0.0)
        distances = np.abs(gaps - surprise.sum() / total)
        last = _reach(distances, weights, params.typical_p * total)
        keep = np.flatnonzero(distances <= distances[last])
        ids, gaps, weights = ids[keep], gaps[keep], weights[keep]
    return ids, gaps, weights


def _reach(keys: Floats, weights: Floats, mass: float) -> int:
    """Where the sum of the weights, taken by ascending key and ties by position, reaches `mass`.

    Sorting a whole vocabulary takes longer than a step should. If the keys near 0 suffice, as with most text,
    the rest is left alone; otherwise keys are spread over bins, the bin in which it happens is spread again,
    and only a last few are sorted. Keys: nats below the best token or away from the entropy.
    """
    places = np.flatnonzero(keys < _NEAR)
    if weights[places].sum() <= mass:
        places = np.flatnonzero(weights)
    keys, weights = keys[places], weights[places]
    while len(places) > _NUM_BINS and (width := keys.max() - keys.min()) > 0.0:
        spread = keys - keys.min()
        spread /= width
        spread *= _NUM_BINS
        bins = spread.astype(np.intp)
        sums = np.cumsum(np.bincount(bins, weights))
        chosen = min(int(np.searchsorted(sums, mass)), len(sums) - 1)
        mass -= float(sums[chosen - 1]) if chosen else 0.0
        inside = np.flatnonzero(bins == chosen)
        places, keys, weights = places[inside], keys[inside], weights[inside]
    order = np.argsort(keys, kind="stable")
    at = int(np.searchsorted(np.cumsum(weights[order]), mass))
    return int(places[order[min(at, len(order) - 1)]])  # the two ways to add differ in the last bits


def _target_logprobs(logits: Logits, target: int, count: int) -> tuple[tuple[int, float, int], ...]:
    """(token id, logprob, rank) of the actual prompt token, then of the `count` most probable ones."""
    log_total = _log_sum_exp(logits)
    top = _largest(logits, count)
    ranks = 1 + np.searchsorted(-logits[top], -logits[top])  # tied tokens share a rank
    return (
        (target, float(logits[target]) - log_total, _rank(logits, target)),
        *((i, float(logits[i]) - log_total, int(rank)) for i, rank in zip(top, ranks, strict=True)),
    )


def _rank(logits: Logits, token_id: int) -> int:
    return 1 + int(np.count_nonzero(logits > logits[token_id]))


def _log_sum_exp(logits: Logits) -> float:
    """Also the gate for what the model gives: NaN anywhere, or no finite logit at all, stops here."""
    best = float(logits.max())
    assert np.isfinite(best), f"the model gave logits whose largest is {best}"
    return best + float(np.log(np.exp(logits - logits.dtype.type(best)).sum(dtype=np.float64)))


def _largest(logits: Logits, count: int) -> list[int]:
    """Ids of the `count` largest, largest first, ties by id."""
    if count == 0:
        return []
    above = np.arange(len(logits))
    if count < len(logits):
        above = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    order: list[int] = above[np.argsort(-logits[above], kind="stable")][:count].tolist()
    return order


def uniform(seed: int, counter: int) -> float:
    """The random number in [0, 1) of an output position: 53 bits from integers alone, modulo 2**64.

    g = 0x9E3779B97F4A7C15; state = mix(seed + g); (mix(state + g * (counter + 1)) >> 11) / 2**53:
    number `counter` of a splitmix64 generator whose start is the hashed seed.
    """
    state = _mix(seed + _GOLDEN & _MASK)
    return (_mix(state + _GOLDEN * (counter + 1) & _MASK) >> 11) / 2**53


def _mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea & Flood 2014): each of 64 bits reaches all of them."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def derive_seed(seed: int, request: int | str, choice: int) -> int:
    """A seed of 64 bits for one choice of one request; the same in every process.

    `seed` is the engine's where the request brings none. Where it brings one, choice 0 uses that as it is, so
    that n=1 has the tokens of the first of n=4, and the others derive theirs from it and request 0.
    """
    key = f"{seed}/{choice}/{request}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
