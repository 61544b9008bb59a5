"""Mixed precision: the choice against brute force, the Fisher information against all labels, limits kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ridgeline.compress.allocate import (
    Choice,
    allocate,
    measured_divergence,
    output_fisher,
    sensitivities,
    upgrade,
)
from ridgeline.compress.differentiable import window_logits
from ridgeline.compress.grids import Grid
from ridgeline.compress.passes import float_values
from ridgeline.compress.quantize import linear_names, quantize_model
from ridgeline.errors import ConfigError
from tests.compress.models import eager_logits, make_calibration, make_model
from tests.compress.test_quantize import small


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_differentiable_forward_is_the_decoder(name):
    model, windows = make_model(name), make_calibration(3, length=50).token_ids
    logits = window_logits(model, lambda w: lambda t=float_values(w): t, max_model_len=50)
    expected = eager_logits(model, windows)
    with torch.no_grad():
        found = logits(windows).numpy().reshape(expected.shape)
    assert np.allclose(found, expected, atol=2e-4)


def test_fisher_is_the_mean_over_all_labels():
    """E[g²] over drawn tokens against the sum over all of them, weighed by their probability."""
    model = make_model("llama")
    few = make_calibration(4, length=6)
    # Many passes over few tokens: the mean over draws.
    repeated = make_calibration(4, length=6)
    repeated = type(repeated)(repeated.token_ids * 40, 0)
    sampled = output_fisher(model, repeated)

    outputs = {}

    def watch(weight, output):
        if not output.requires_grad:
            output.requires_grad_()
        outputs[weight.name] = output

    logits = window_logits(model, lambda w: lambda t=float_values(w): t, max_model_len=6, watch=watch)
    name, total = "layers.1.down_proj", 0.0
    for window in few.token_ids:
        log_p = logits([window]).log_softmax(-1)
        for t, label in itertools.product(range(6), range(97)):
            (g,) = torch.autograd.grad(log_p[t, label], outputs[name], retain_graph=True)
            total = total + log_p[t, label].detach().exp() * g.square().sum(0)
    exact = total / few.num_tokens
    assert torch.allclose(sampled[name], exact, rtol=0.5)
    assert float(sampled[name].sum()) == pytest.approx(float(exact.sum()), rel=0.15)


def random_choices(rng, num_linears):
    """Divergences that fall with bits as they do, times a random sensitivity."""
    return {
        f"linear{i}": [
            Choice(
                Grid(bits, 32), 100.0 * bits * size, float(sensitivity * 4.0**-bits * rng.uniform(0.8, 1.2))
            )
            for bits in (2, 3, 4, 8)
        ]
        for i, (size, sensitivity) in enumerate(
            zip(rng.integers(1, 4, num_linears), rng.lognormal(0, 2, num_linears), strict=True)
        )
    }


@pytest.mark.parametrize("seed", range(6))
def test_upgrades_are_nearly_the_best_of_all_mixtures(seed):
    choices = random_choices(np.random.default_rng(seed), 6)
    smallest = sum(c[0].bits for c in choices.values())
    largest = sum(c[-1].bits for c in choices.values())
    for share in (0.2, 0.5, 0.8):
        max_bits = smallest + share * (largest - smallest)
        grids = upgrade(choices, max_bits=max_bits)
        found = [next(c for c in choices[n] if c.grid == g) for n, g in grids.items()]
        assert sum(c.bits for c in found) <= max_bits
        allowed = [m for m in itertools.product(*choices.values()) if sum(c.bits for c in m) <= max_bits]
        best = min(sum(c.divergence for c in mixture) for mixture in allowed)
        # The hull loses at most what its last step would have saved.
        step = max(a.divergence - b.divergence for m in choices.values() for a, b in itertools.pairwise(m))
        assert best <= sum(c.divergence for c in found) <= min(best + step, 2 * best)


def test_a_divergence_limit_is_reached_with_few_bits():
    choices = random_choices(np.random.default_rng(1), 5)
    coarse = sum(c[0].divergence for c in choices.values())
    grids = upgrade(choices, max_divergence=coarse / 10)
    found = [next(c for c in choices[n] if c.grid == g) for n, g in grids.items()]
    assert sum(c.divergence for c in found) <= coarse / 10
    mixtures = [
        m for m in itertools.product(*choices.values()) if sum(c.divergence for c in m) <= coarse / 10
    ]
    assert sum(c.bits for c in found) <= 1.3 * min(sum(c.bits for c in m) for m in mixtures)


def test_limits_that_cannot_be_kept():
    choices = random_choices(np.random.default_rng(2), 3)
    with pytest.raises(ConfigError, match="times the allowed bits"):
        upgrade(choices, max_bits=10.0)
    with pytest.raises(ConfigError, match="allow more"):
        upgrade(choices, max_divergence=1e-12)


def test_predictions_are_of_the_size_of_what_is_measured():
    """The sum over linears against the divergence of the model rounded that way, fine and coarse."""
    model, calibration = make_model("llama"), make_calibration(8)
    for grid, factor in ((Grid(8, 32, symmetric=True), 2.0), (Grid(4, 32), 2.0)):
        choices = sensitivities(model, [grid], calibration)
        assert set(choices) == set(linear_names(model))
        predicted = sum(found[0].divergence for found in choices.values())
        measured = measured_divergence(model, dict.fromkeys(choices, grid), calibration)
        assert 1 / factor < predicted / measured < factor


def test_target_of_bits_is_kept_and_used_well():
    model, calibration = make_model("llama"), make_calibration(8)
    recipe = small("rtn-int4-g64", target_bpw=5.4)
    mixed = quantize_model(model, recipe, calibration=calibration).model
    bits = weights = 0.0
    for name in linear_names(model):
        bits += 8 * mixed.weights[name].num_bytes
        weights += mixed.weights[name].num_elements
    assert 5.0 < bits / weights <= 5.4
    assert len({mixed.weights[name].format.name for name in linear_names(model)}) > 1


def test_target_of_divergence_is_kept():
    model, calibration = make_model("llama"), make_calibration(8)
    recipe = small("rtn-int4-g64")
    own = measured_divergence(model, {n: recipe.grid(n) for n in linear_names(model)}, calibration)
    grids = allocate(model, small("rtn-int4-g64", max_kl=own / 3), calibration)
    assert measured_divergence(model, grids, calibration) < 1.3 * own / 3
    assert len({grid.bits for grid in grids.values()}) > 1
