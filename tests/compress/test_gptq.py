"""GPTQ against a slow reading of the paper in float64, and what must hold of its results."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from ridgeline.compress.gptq import GptqConfig, factorize, gptq, gptq_stacked
from ridgeline.compress.grids import Grid, dequantized, output_error, rtn
from ridgeline.errors import ConfigError


def layer(n=7, k=96, tokens=400, rank=None, seed=0, dtype=torch.float64):
    """A weight, and the Hessian of inputs that hang together as those of real layers do."""
    rng = np.random.default_rng(seed)
    rank = rank or k
    mix = rng.standard_normal((rank, k)) * np.geomspace(3, 0.05, rank)[:, None]
    x = rng.standard_normal((tokens, rank)) @ mix
    return (
        torch.from_numpy(rng.standard_normal((n, k)) * 0.1).to(dtype),
        torch.from_numpy(2 / tokens * x.T @ x).to(dtype),
    )


def grid_of(values, bits, symmetric):
    top = 2**bits - 1
    if symmetric:
        return max(np.float16(2 * np.abs(values).max() / top), np.float16(2**-24)).astype(float), 2 ** (
            bits - 1
        )
    low, high = min(values.min(), 0), max(values.max(), 0)
    d = max(np.float16((high - low) / top), np.float16(2**-24)).astype(float)
    return d, np.clip(np.rint(-low / d), 0, top)


def by_the_paper(w, h, grid, damp, act_order):
    """Optimal Brain Quantization in a fixed order: explicit inverse, one column after the other, no blocks.

    Row by row: round w_p, add -(w_p - quant(w_p)) / [H⁻¹]_pp · [H⁻¹]_p to the rest (eq. 2 of the paper), and
    take p out of H⁻¹ by one step of Gaussian elimination (eq. 3). Returns Ŵ by input feature.
    """
    w, h = w.numpy().copy(), h.numpy().copy()
    n, k = w.shape
    size = grid.group_size or k
    top = 2**grid.bits - 1
    dead = np.diag(h) == 0
    alive_mean = np.diag(h)[~dead].mean()
    h[dead, dead] = alive_mean
    order = np.arange(k) if act_order == "none" else np.argsort(-np.where(dead, 0, np.diag(h)), kind="stable")
    inverse = np.linalg.inv(h + damp * alive_mean * np.eye(k))
    fixed = [[grid_of(row[g : g + size], grid.bits, grid.symmetric) for g in range(0, k, size)] for row in w]
    result = np.empty_like(w)
    for place, p in enumerate(order):
        for i in range(n):
            if act_order == "static":
                d, z = fixed[i][p // size]
            else:
                if place % size == 0:
                    fixed[i][place // size] = grid_of(
                        w[i, order[place : place + size]], grid.bits, grid.symmetric
                    )
                d, z = fixed[i][place // size]
            result[i, p] = d * (np.clip(np.rint(w[i, p] / d) + z, 0, top) - z)
            w[i] -= (w[i, p] - result[i, p]) / inverse[p, p] * inverse[p]
        inverse -= np.outer(inverse[:, p], inverse[p]) / inverse[p, p]
    return result


def values_of(result, like):
    values = dequantized(result.groups, like)
    return values if result.order is None else values[:, np.argsort(result.order)]


@pytest.mark.parametrize("act_order", ["none", "static", "full"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "block_size"),
    [(4, 32, 128), (4, 48, 64), (3, 24, 40), (2, 96, 20), (4, None, 36), (8, 16, 1), (4, 32, 96)],
)
def test_gptq_is_the_papers_algorithm(act_order, symmetric, bits, group_size, block_size):
    w, h = layer()
    grid = Grid(bits, group_size, symmetric)
    result = gptq(w, h, grid, GptqConfig(0.01, block_size, act_order))
    expected = by_the_paper(w, h, grid, 0.01, act_order)
    assert np.allclose(values_of(result, w).numpy(), expected, rtol=0, atol=1e-9)
    assert (result.order is not None) == (act_order == "full")
    assert result.damp == 0.01 and result.num_dead == 0
    assert result.error == pytest.approx(output_error(w, torch.from_numpy(expected), h))


@pytest.mark.parametrize("act_order", ["none", "static", "full"])
def test_dead_columns_are_rounded_to_nearest_and_disturb_nobody(act_order):
    w, h = layer(k=64)
    dead = [3, 31, 32, 60]
    h[dead] = 0
    h[:, dead] = 0
    grid = Grid(4, 32)
    result = gptq(w, h, grid, GptqConfig(act_order=act_order))
    assert result.num_dead == 4
    expected = by_the_paper(w, h, grid, 0.01, act_order)
    assert np.allclose(values_of(result, w).numpy(), expected, rtol=0, atol=1e-9)
    if act_order == "static":
        assert torch.equal(values_of(result, w)[:, dead], dequantized(rtn(w, grid), w)[:, dead])


def test_all_dead_is_round_to_nearest():
    w, h = layer(k=64)
    result = gptq(w, torch.zeros_like(h), Grid(4, 32))
    assert result.num_dead == 64 and result.error == 0
    assert np.array_equal(result.groups.q, rtn(w, Grid(4, 32)).q)


@pytest.mark.parametrize("act_order", ["none", "static", "full"])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_is_always_below_rounding_to_nearest(act_order, seed, bits):
    w, h = layer(24, 192, rank=150, seed=seed, dtype=torch.float32)
    grid = Grid(bits, 64)
    nearest = output_error(w, dequantized(rtn(w, grid), w), h)
    assert gptq(w, h, grid, GptqConfig(act_order=act_order)).error < nearest


def test_float32_differs_from_float64_in_few_codes_and_not_in_error():
    w, h = layer(64, 192, tokens=3000)
    exact = gptq(w, h, Grid(4, 64))
    quick = gptq(w.float(), h.float(), Grid(4, 64))
    assert quick.error == pytest.approx(exact.error, rel=0.02)


@pytest.mark.parametrize("act_order", ["none", "static", "full"])
def test_weights_of_one_input_can_be_solved_together(act_order):
    (w1, h), (w2, _) = layer(5), layer(9, seed=1)
    config = GptqConfig(act_order=act_order)
    factor = factorize(h, config)
    together = gptq_stacked([w1, w2], h, Grid(4, 32), config, factor=factor)
    for w, result in zip((w1, w2), together, strict=True):
        alone = gptq(w, h, Grid(4, 32), config)
        assert np.array_equal(result.groups.q, alone.groups.q)
        assert np.array_equal(result.groups.scales, alone.groups.scales)
        assert np.array_equal(result.groups.zeros, alone.groups.zeros)
        assert result.error == pytest.approx(alone.error)


def test_per_tensor_weights_keep_their_own_scale():
    (w1, h), (w2, _) = layer(5), layer(9, seed=1)
    grid = Grid(8, None, True, per_tensor=True)
    results = gptq_stacked([w1, 10 * w2], h, grid)
    assert [len(np.unique(r.groups.scales)) for r in results] == [1, 1]
    assert results[1].groups.scales[0, 0] > 5 * results[0].groups.scales[0, 0]


def test_factor_is_the_triangular_root_of_the_inverse():
    _, h = layer()
    factor = factorize(h, GptqConfig(0.02))
    damped = h + 0.02 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    inverse = torch.linalg.inv(damped[factor.order][:, factor.order])
    assert torch.allclose(factor.upper, torch.linalg.cholesky(inverse, upper=True), rtol=1e-7, atol=1e-9)
    assert torch.equal(factor.order, h.diagonal().argsort(descending=True))


def test_singular_hessian_raises_the_damping_and_says_so(caplog):
    w, h = layer(rank=10)
    # Not quite positive semi-definite, as sums in float32 are not.
    h -= 1e-4 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    with caplog.at_level(logging.WARNING, "ridgeline"):
        result = gptq(w, h, Grid(4, 32), GptqConfig(damp=0))
    assert result.damp == 1e-3
    assert "singular; damping raised from 0 to 0.001" in caplog.text


@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_one_token_of_calibration_is_enough_to_factorise(damp):
    w, h = layer(tokens=1)
    result = gptq(w, h, Grid(4, 32), GptqConfig(damp))
    assert result.damp == damp
    assert result.error < output_error(w, dequantized(rtn(w, Grid(4, 32)), w), h)


def test_hopeless_hessian_is_round_to_nearest_with_a_message(caplog):
    w, h = layer()
    h[0, 1] = h[1, 0] = 1e6
    with caplog.at_level(logging.WARNING, "ridgeline"):
        result = gptq(w, h, Grid(4, 32))
    assert np.isinf(result.damp)
    assert "cannot be factorised even with damping 1; its weights are rounded to nearest" in caplog.text
    assert np.array_equal(result.groups.q, rtn(w, Grid(4, 32)).q)


def test_what_does_not_fit_is_refused():
    w, h = layer()
    with pytest.raises(ConfigError, match="do not fit"):
        gptq(w[:, :64], h, Grid(4, 32))
    with pytest.raises(ConfigError, match="group_size 64 does not divide the 96"):
        gptq(w, h, Grid(4, 64))
    with pytest.raises(ConfigError, match="NaN"):
        gptq(w, h * torch.nan, Grid(4, 32))
    with pytest.raises(ConfigError, match="damp 2"):
        GptqConfig(damp=2)
