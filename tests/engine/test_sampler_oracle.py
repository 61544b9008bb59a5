"""Our processors and filters against those of transformers on the same logits: the same tokens stay, with the
same probabilities.

Everything is computed in float64, and parameters are drawn, not chosen, so that no border of a filter falls
between two roundings. Presence and frequency penalties have no counterpart there; the formula of the OpenAI
API stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ridgeline.engine.sampler import candidates, choose, process
from ridgeline.engine.scheduler import SamplingRow
from ridgeline.sampling_params import SamplingParams

EOS = (1, 3)
NUM_PROMPT = 6


def additive_penalties(params: SamplingParams) -> Any:
    def apply(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, NUM_PROMPT:], minlength=scores.shape[1]).to(scores.dtype)
        return scores - params.presence_penalty * counts.clamp(max=1) - params.frequency_penalty * counts

    return apply


def processors_of(params: SamplingParams) -> LogitsProcessorList:
    """In the order in which `generate` builds its list."""
    p = params
    biases: Any = {(i,): bias for i, bias in (p.logit_bias or {}).items()}
    table: list[tuple[Any, Callable[[], Any]]] = [
        (biases, lambda: SequenceBiasLogitsProcessor(biases)),
        (p.repetition_penalty != 1, lambda: RepetitionPenaltyLogitsProcessor(p.repetition_penalty)),
        (p.presence_penalty or p.frequency_penalty, lambda: additive_penalties(p)),
        (p.min_tokens, lambda: MinNewTokensLengthLogitsProcessor(NUM_PROMPT, p.min_tokens, list(EOS))),
        (p.temperature not in (0, 1), lambda: TemperatureLogitsWarper(p.temperature)),
        (p.top_k, lambda: TopKLogitsWarper(p.top_k)),
        (p.top_p < 1, lambda: TopPLogitsWarper(p.top_p)),
        (p.min_p, lambda: MinPLogitsWarper(p.min_p)),
        (p.typical_p < 1, lambda: TypicalLogitsWarper(p.typical_p)),
    ]
    return LogitsProcessorList(make() for is_on, make in table if is_on)


def processed_by_them(params: SamplingParams, history: list[int], logits: Any) -> torch.Tensor:
    input_ids: Any = torch.tensor([history])
    return processors_of(params)(input_ids, torch.from_numpy(logits.copy())[None])[0]


DRAWN: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "logit_bias": lambda rng, v: {int(i): rng.integers(-320, 320) / 64 for i in rng.integers(0, v, 3)},
    "repetition_penalty": lambda rng, v: rng.choice([rng.uniform(0.3, 0.9), rng.uniform(1.1, 3.0)]),
    "presence_penalty": lambda rng, v: rng.uniform(-2, 2),
    "frequency_penalty": lambda rng, v: rng.uniform(-2, 2),
    "min_tokens": lambda rng, v: rng.integers(1, 10),
    "temperature": lambda rng, v: np.exp(rng.uniform(-3, 2)),
    "top_k": lambda rng, v: rng.integers(1, v + 5),
    "top_p": lambda rng, v: rng.uniform(0.01, 0.999),
    "min_p": lambda rng, v: rng.uniform(0.001, 0.9),
    "typical_p": lambda rng, v: rng.uniform(0.01, 0.999),
}
"""Parameter -> a value, not the neutral one, for vocabulary v. Biases fit float32, as theirs must."""


def compare(seed: int, vocab_size: int, names: set[str], *, spread: float, ties: bool = False) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(vocab_size) * spread
    if ties:
        logits = np.round(logits)
    params = SamplingParams(**{name: DRAWN[name](rng, vocab_size) for name in sorted(names)})
    history = rng.integers(0, vocab_size, NUM_PROMPT + int(rng.integers(0, 9))).tolist()
    num_output = len(history) - NUM_PROMPT
    row = SamplingRow(
        params,
        seed,
        num_output,
        EOS if num_output < params.min_tokens else (),
        tuple(history[:NUM_PROMPT]),
        tuple(history[NUM_PROMPT:]),
    )
    scores = processed_by_them(params, history, logits)
    theirs = torch.softmax(scores, dim=-1).numpy()

    processed = process(logits, row)
    ids, _, weights = candidates(processed, params)
    ours = np.zeros(vocab_size)
    ours[ids] = weights / weights.sum()
    if ties and params.top_p < 1:  # which of the tied tokens stay is left open there: the lowest ids here
        ours, theirs = np.sort(ours), np.sort(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)
    assert np.array_equal(ours > 0, theirs > 0)
    assert choose(processed, row) in ids


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("vocab_size", [5, 64, 3000])
@pytest.mark.parametrize("spread", [0.1, 2.0, 12.0])
def test_each_parameter_does_what_it_does_in_transformers(name: str, vocab_size: int, spread: float) -> None:
    for seed in range(5):
        compare(seed, vocab_size, {name}, spread=spread)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.integers(5, 900),
    names=st.sets(st.sampled_from(list(DRAWN))),
    spread=st.floats(0.05, 15.0),
)
def test_any_combination_does_what_it_does_in_transformers(
    seed: int, vocab_size: int, names: set[str], spread: float
) -> None:
    compare(seed, vocab_size, names, spread=spread)


@pytest.mark.parametrize("names", [{"top_k"}, {"min_p"}, {"typical_p"}, {"top_p"}, {"top_k", "temperature"}])
def test_tied_tokens_stay_as_they_do_in_transformers(names: set[str]) -> None:
    for seed in range(40):
        compare(seed, 60, names, spread=2.0, ties=True)


def test_float32_logits_give_the_same_probabilities() -> None:
    logits = (np.random.default_rng(4).standard_normal(4000) * 3).astype(np.float32)
    params = SamplingParams(temperature=0.7, top_k=100, repetition_penalty=1.2)
    history = list(range(50))
    row = SamplingRow(params, 0, 0, (), tuple(history[:NUM_PROMPT]), tuple(history[NUM_PROMPT:]))
    scores = processed_by_them(params, history, logits)
    ids, _, weights = candidates(process(logits, row), params)
    assert ids.tolist() == torch.nonzero(torch.isfinite(scores))[:, 0].tolist()
    theirs = torch.softmax(scores, dim=-1).numpy()[ids]
    np.testing.assert_allclose(weights / weights.sum(), theirs, rtol=1e-5, atol=1e-7)


def test_greedy_is_the_argmax_of_the_processed_logits() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        logits = rng.standard_normal(200)
        params = SamplingParams(temperature=0.0, repetition_penalty=1.7, logit_bias={5: 2.0})
        history = rng.integers(0, 200, 40).tolist()
        row = SamplingRow(params, 0, 34, (), tuple(history[:NUM_PROMPT]), tuple(history[NUM_PROMPT:]))
        assert choose(process(logits, row), row) == int(processed_by_them(params, history, logits).argmax())
