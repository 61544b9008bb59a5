"""Grids against hand formulas, numpy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.compress.grids import (
    Grid,
    dequantize_codes,
    dequantized,
    find_scales,
    output_error,
    quantize_to,
    rtn,
    tensors_of,
)
from ridgeline.errors import ConfigError
from ridgeline.quant.groups import pack_groups, unpack_groups

BITS = (2, 3, 4, 8)
OBSERVERS = ("minmax", "percentile", "mse", "kl")


def weights(n=6, k=128, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32) * 0.05)


def by_hand(row, bits, symmetric):
    """Codes of one group by the formulas of the paper, in numpy float32."""
    top = 2**bits - 1
    row = row.astype(np.float32)
    if symmetric:
        d = np.float32(np.float16(np.float32(2) * np.abs(row).max() / np.float32(top)))
        z = 2 ** (bits - 1)
    else:
        low, high = min(row.min(), 0), max(row.max(), 0)
        d = np.float32(np.float16(np.float32(high - low) / np.float32(top)))
        z = int(np.clip(np.rint(-low / d), 0, top))
    return np.clip(np.rint(row / d) + z, 0, top).astype(int), d, z


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, None])
def test_rtn_is_the_formula(bits, symmetric, group_size):
    w = weights()
    groups = rtn(w, Grid(bits, group_size, symmetric))
    size = group_size or w.shape[1]
    assert groups.group_size == size and groups.bits == bits
    assert (groups.zeros is None) == symmetric
    for n in range(len(w)):
        for r in range(w.shape[1] // size):
            part = slice(r * size, (r + 1) * size)
            q, d, z = by_hand(w[n, part].numpy(), bits, symmetric)
            assert np.array_equal(groups.q[n, part], q)
            assert groups.scales[n, r] == d
            assert symmetric or groups.zeros[n, r] == z


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_every_observer_gives_a_grid_that_packs_without_loss(observer, symmetric, bits):
    w = weights(seed=bits)
    groups = rtn(w, Grid(bits, 64, symmetric, observer))
    fmt, rows = pack_groups(groups)
    assert fmt.codes.scale == "F16"
    again = unpack_groups(rows, fmt)
    assert np.array_equal(again.dequantize(), groups.dequantize())
    assert np.array_equal(groups.dequantize(), dequantized(groups, w).numpy())
    codes, scales, zeros = tensors_of(groups, w)
    assert torch.equal(quantize_to(w, scales, zeros, bits), codes), "codes are the nearest on the stored grid"


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_on_the_grid_of_one_sided_groups(sign):
    w = sign * (weights().abs() + 0.2)
    w[0, :64] = 0
    groups = rtn(w, Grid(4, 64))
    assert np.all(groups.zeros[1:] == (0 if sign > 0 else 15))
    assert np.all(dequantized(groups, w).numpy()[0, :64] == 0)
    assert np.abs(groups.dequantize() - w.numpy()).max() <= groups.scales.max() / 2 * 1.01


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_beats_minmax_in_every_group_and_brute_force_is_near(symmetric):
    w = weights(4, 64, seed=3)
    importance = torch.linspace(0.1, 3, 64)

    def error(grid, **how):
        rest = w - dequantized(rtn(w, grid, **how), w)
        return (rest.square() * importance).view(4, -1, 32).sum(-1)

    found = error(Grid(4, 32, symmetric, "mse"), importance=importance)
    assert (found <= error(Grid(4, 32, symmetric)) * (1 + 1e-5)).all()
    low, high = torch.aminmax(w.view(4, 2, 32), dim=-1)
    best = torch.full_like(low, torch.inf)
    for d in np.geomspace(0.2, 1.2, 400) * float((high - low).max()) / 15:
        for z in [8] if symmetric else range(16):
            scales = torch.full_like(low, float(np.float16(d)))
            zeros = torch.full_like(low, z)
            values = dequantize_codes(quantize_to(w, scales, zeros, 4), scales, zeros)
            best = torch.minimum(best, ((w - values).square() * importance).view(4, 2, 32).sum(-1))
    assert found.sum() <= best.sum() * 1.1


def test_clip_search_under_a_hessian_finds_the_best_shrunken_range_of_each_group():
    w = weights(8, 64)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(6, 64)
    h = x.T @ x
    grid = Grid(3, 32, observer="mse")

    def errors(groups):
        rest = (w - dequantized(groups, w)).view(8, 2, 32)
        return torch.stack(
            [((rest[:, r] @ h[i : i + 32, i : i + 32]) * rest[:, r]).sum(1) for r, i in enumerate((0, 32))]
        )

    found = errors(rtn(w, grid, importance=h))
    best = torch.full_like(found, torch.inf)
    for shrink in np.linspace(1, 0.5, 9):
        low, high = (v * shrink for v in torch.aminmax(w.view(8, 2, 32), dim=-1))
        scales = ((high - low) / 7).half().float()
        zeros = (-low / scales).round()
        values = dequantize_codes(quantize_to(w, scales, zeros, 3), scales, zeros)
        rest = (w - values).view(8, 2, 32)
        costs = [
            ((rest[:, r] @ h[i : i + 32, i : i + 32]) * rest[:, r]).sum(1) for r, i in enumerate((0, 32))
        ]
        best = torch.minimum(best, torch.stack(costs))
    assert torch.allclose(found, best, rtol=0.02)
    assert found.sum() < 0.9 * errors(rtn(w, Grid(3, 32))).sum()


def test_percentile_is_numpys():
    w = weights(3, 1000)
    scales, zeros = find_scales(w, Grid(8, None, observer="percentile", percentile=98))
    low, high = np.quantile(w.numpy(), [0.01, 0.99], axis=1)
    assert np.allclose(scales[:, 0].numpy(), (high - low) / 255, rtol=1e-3)
    assert np.allclose(zeros[:, 0].numpy(), np.rint(-low / scales[:, 0].numpy()), atol=1)
    scales, _ = find_scales(w, Grid(8, None, symmetric=True, observer="percentile", percentile=98))
    assert np.allclose(
        scales[:, 0].numpy(), 2 * np.quantile(np.abs(w.numpy()), 0.98, axis=1) / 255, rtol=1e-3
    )


def tensorrt_threshold(values, num_bins=4096, levels=256):
    """Migacz 2017, one row and one width at a time, on -max..max."""
    bound = np.abs(values).max()
    counts = np.histogram(values, num_bins, (-bound, bound))[0].astype(np.float64)
    best = (np.inf, 1.0)
    for shrink in np.linspace(1, 0.1, 91):
        width = round(shrink * num_bins)
        first = round(num_bins / 2 * (1 - width / num_bins))
        inside = counts[first : first + width]
        p = inside.copy()
        p[0] += counts[:first].sum()
        p[-1] += counts[first + width :].sum()
        q = np.zeros(width)
        for code in range(levels):
            mine = np.arange(width) * levels // width == code
            if inside[mine].any():
                q[mine] = np.where(inside[mine] > 0, inside[mine].sum() / (inside[mine] > 0).sum(), 0)
        p, q = p / p.sum(), q / q.sum()
        kl = (p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-9))).sum()
        best = min(best, (kl, shrink))
    return best[1] * bound


def test_kl_is_the_direct_search_and_cuts_outliers_off():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((2, 20000))
    values[:, :3] = [[30, -28, 25], [60, 1, -1]]
    scales, zeros = find_scales(torch.from_numpy(values), Grid(8, None, symmetric=True, observer="kl"))
    expected = [tensorrt_threshold(row) for row in values]
    assert np.allclose(scales[:, 0].numpy() * 255 / 2, expected, rtol=0.02)
    assert expected[0] < 20 and expected[1] < 30 and (zeros == 128).all()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_per_tensor_is_one_row_as_long_as_the_matrix(observer):
    w = weights(4, 96)
    grid = Grid(8, None, True, observer, per_tensor=True)
    scales, _ = find_scales(w, grid)
    whole, _ = find_scales(w.reshape(1, -1), Grid(8, None, True, observer))
    assert scales.shape == (4, 1) and (scales == whole).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(BITS), st.booleans(), st.floats(1e-9, 1e9))
def test_error_is_at_most_half_a_step_at_any_magnitude(seed, bits, symmetric, magnitude):
    w = weights(3, 32, seed) * magnitude
    groups = rtn(w, Grid(bits, 32, symmetric))
    rest = np.abs(groups.dequantize().astype(np.float64) - w.numpy())
    assert np.isfinite(rest).all()
    if 1e-3 < magnitude < 1e4:
        # A symmetric grid ends half a step below max|w|; float16 moves the ends by 2^-11 of the range.
        steps = 0.5 + 2**bits * 2**-11
        assert (rest <= groups.scales.repeat(32, 1) * steps * 1.001).all()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Grid(5), "bits 5"),
        (lambda: Grid(4, 0), "group_size 0"),
        (lambda: Grid(4, 64, per_tensor=True), "per_tensor"),
        (lambda: Grid(4, percentile=10), "percentile 10"),
        (lambda: rtn(weights(2, 576), Grid(4, 128)), "group_size 128 does not divide the 576 inputs.*96, 64"),
        (lambda: rtn(torch.full((2, 64), torch.nan), Grid(4)), "NaN"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


def test_output_error_is_that_of_the_outputs():
    w, q = weights(5, 40, 1), weights(5, 40, 1) * 1.1
    x = torch.randn(99, 40, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.norm(x @ (w - q).T) / torch.linalg.norm(x @ w.T)
    assert output_error(w, q, x.T @ x) == pytest.approx(float(expected), rel=1e-5)
    assert output_error(w, q, torch.zeros(40, 40)) == 0
