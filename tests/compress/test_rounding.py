"""Coordinate descent, refitted scales and learned rounding against brute force; never worse, in any row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ridgeline.compress.gptq import GptqConfig, gptq
from ridgeline.compress.grids import Grid, dequantized, rtn
from ridgeline.compress.rounding import learned_rounding, refine
from ridgeline.quant.groups import Groups, pack_groups
from tests.compress.test_gptq import layer


def row_costs(w, h, groups, damp=0.01, order=None):
    values = dequantized(groups, w)
    if order is not None:
        values = values[:, np.argsort(order)]
    rest = w - values
    damped = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    return ((rest @ damped) * rest).sum(1)


@pytest.mark.parametrize("method", [refine, learned_rounding])
@pytest.mark.parametrize("act_order", ["none", "static", "full"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (8, False)])
def test_no_row_gets_worse_and_the_whole_gets_better(method, act_order, bits, symmetric):
    w, h = layer(16, 96, seed=bits)
    grid = Grid(bits, 32, symmetric)
    for start in (gptq(w, h, grid, GptqConfig(act_order=act_order)), None):
        groups = rtn(w, grid) if start is None else start.groups
        order = None if start is None else start.order
        before = row_costs(w, h, groups, order=order)
        better = method(w, h, groups, order=order)
        after = row_costs(w, h, better, order=order)
        assert (after <= before * (1 + 1e-9)).all()
        assert after.sum() < before.sum() * 0.98
        assert pack_groups(better)[0] == pack_groups(groups)[0], "same format, scales still float16"
        assert (better.zeros is None) == symmetric


def test_refined_codes_are_optimal_one_by_one():
    w, h = layer(6, 32)
    groups = refine(w, h, rtn(w, Grid(3, 16)), sweeps=20)
    cost = row_costs(w, h, groups)
    for column in range(32):
        for change in (-1, 1):
            q = groups.q.astype(int)
            q[:, column] = np.clip(q[:, column] + change, 0, 7)
            other = Groups(3, q.astype(np.uint8), groups.scales, groups.zeros)
            assert (row_costs(w, h, other) >= cost * (1 - 1e-9)).all()


def test_refitted_scales_are_those_of_least_squares():
    w, h = layer(3, 32)
    start = rtn(w, Grid(8, 16))
    groups = Groups(
        8, start.q, (start.scales * np.float32(1.3)).astype(np.float16).astype(np.float32), start.zeros
    )
    # No sweep can repair scales of 8 bits by codes alone as well as least squares does in one solve.
    root = torch.linalg.cholesky(h + 0.01 * h.diagonal().mean() * torch.eye(32, dtype=h.dtype)).T
    refined = refine(w, h, groups, sweeps=1)
    levels = (
        torch.from_numpy(refined.q.astype(float)).view(3, 2, 16)
        - torch.from_numpy(refined.zeros.astype(float))[..., None]
    )
    for i in range(3):
        columns = torch.zeros(32, 2, dtype=torch.float64)
        columns[:16, 0], columns[16:, 1] = levels[i]
        expected = torch.linalg.lstsq(root @ columns, root @ w[i]).solution
        assert np.allclose(refined.scales[i], expected, rtol=2e-3)


def brute_force(w, h, groups):
    """The best codes of all, for these scales."""
    n, k = w.shape
    zeros = np.repeat(groups.zeros.astype(float), groups.group_size, 1)
    scales = np.repeat(groups.scales.astype(float), groups.group_size, 1)
    codes = np.array(list(itertools.product(range(4), repeat=k)), float)
    best = []
    for i in range(n):
        rest = w[i].numpy() - scales[i] * (codes - zeros[i])
        best.append(np.einsum("ck,kl,cl->c", rest, h.numpy(), rest).min())
    return np.array(best)


def test_small_layers_come_near_the_global_optimum():
    w, h = layer(12, 6, seed=5)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(6, dtype=h.dtype)
    start = rtn(w, Grid(2, 6))
    optimum = brute_force(w, damped, start)
    fixed_scales = row_costs(w, h, start).numpy()
    refined = row_costs(w, h, refine(w, h, start)).numpy()
    assert fixed_scales.sum() > 1.2 * optimum.sum()
    assert refined.sum() < 1.15 * optimum.sum()


def test_dead_columns_stay_at_their_nearest_codes():
    w, h = layer(8, 64)
    h[[5, 40]] = 0
    h[:, [5, 40]] = 0
    for method in (refine, learned_rounding):
        groups = method(w, h, gptq(w, h, Grid(4, 32)).groups)
        rest = (w - dequantized(groups, w)).abs()[:, [5, 40]]
        assert (rest <= torch.from_numpy(groups.scales) * 0.5001).all()


def test_learned_rounding_is_deterministic_with_and_without_grad():
    w, h = layer(8, 64, dtype=torch.float32)
    start = gptq(w, h, Grid(3, 32)).groups
    one = learned_rounding(w, h, start, steps=50)
    with torch.no_grad():
        two = learned_rounding(w, h, start, steps=50)
    assert np.array_equal(one.q, two.q) and np.array_equal(one.scales, two.scales)
