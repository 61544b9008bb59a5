"""Rounded inputs in torch, by hand; and which linears `fuse` merges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ridgeline.kvcache.layout import CacheLayout
from ridgeline.ops.emulate import make_weight
from ridgeline.ops.fuse import fuse
from ridgeline.ops.program import Opcode
from ridgeline.ops.recorder import Recorder
from ridgeline.ops.torch_ops import TorchOps, round_input
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import ActivationQuant, Weight

LAYOUT = CacheLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=32, num_blocks=1)


def test_each_token_has_its_scale_and_its_outliers():
    x = torch.tensor([[1.0, -2.54, 0.5, 0.01], [8.0, 1.27, -7.0, 0.005], [0.0, 0.0, 0.0, 0.0]])
    q, d, outliers = round_input(x, ActivationQuant(outlier_threshold=7.0))
    np.testing.assert_allclose(d[:, 0], [0.02, 0.01, 0.0], rtol=1e-6)
    assert q.tolist() == [[50, -127, 25, 0], [0, 127, 0, 0], [0, 0, 0, 0]]  # 0.5 rounds to even
    assert outliers is not None and outliers.tolist() == [[0, 0, 0, 0], [8, 0, -7, 0], [0, 0, 0, 0]]


def test_a_static_scale_clips():
    q, d, outliers = round_input(torch.tensor([[1.0, 0.25, -0.75, 200.0]]), ActivationQuant(static_scale=0.5))
    assert (q.tolist(), d.tolist(), outliers) == ([[2, 0, -2, 127]], [[0.5]], None)


@pytest.mark.parametrize("how", [ActivationQuant(), ActivationQuant(outlier_threshold=1.5)])
def test_linear_is_integers_times_scales_and_floats_for_outliers(how):
    rng = np.random.default_rng(0)
    w = make_weight("w", 7, 64, format="INT8_G64_SYM", rng=rng, activation=how)
    bias = Weight("b", FORMATS["F32"], (7,), {"data": rng.standard_normal(7).astype(np.float32)})
    x = rng.standard_normal((5, 64))
    ops = TorchOps(LAYOUT, dtype="float64", device="cpu", attention="naive")
    found = ops.linear(torch.from_numpy(x), ops.bind(w), ops.bind(bias)).numpy()
    for row, values in zip(found, x, strict=True):
        is_outlier = np.abs(values) >= (how.outlier_threshold or np.inf)
        d = np.abs(values[~is_outlier]).max() / 127
        codes = np.where(is_outlier, 0, np.rint(values / d))
        expected = w.dequantize() @ (codes * d + np.where(is_outlier, values, 0)) + bias.data
        np.testing.assert_allclose(row, expected, rtol=1e-9, atol=1e-9)


def merged(*weights: Weight) -> list[int]:
    """How many matrices each linear has after fusion."""
    recorder = Recorder()
    table = Weight("x", FORMATS["F32"], (1, 64), {"data": np.zeros((1, 64), np.float32)})
    x = recorder.embed(recorder.bind(table), None)
    ys = [recorder.linear(x, recorder.bind(w)) for w in weights]
    total = ys[0]
    for y in ys[1:]:
        total = recorder.add(total, y)
    program = fuse(recorder.program(total), ("merged_linears",))
    return [len(i.matrices) for i in program.instructions if i.opcode is Opcode.LINEAR]


def test_only_linears_that_read_their_input_alike_are_merged():
    rng = np.random.default_rng(0)

    def weight(activation=None, order=None):
        w = make_weight("w", 8, 64, format="INT4_G64", rng=rng, activation=activation)
        return w if order is None else Weight("w", w.format, w.shape, w.buffers | {"order": order})

    order = rng.permutation(64).astype(np.int32)
    assert merged(weight(), weight(), weight()) == [3]
    assert merged(weight(ActivationQuant()), weight(), weight(ActivationQuant())) == [2, 1]
    assert merged(weight(), weight(ActivationQuant()), weight(ActivationQuant(static_scale=1.0))) == [1, 1, 1]
    assert merged(weight(order=order), weight(order=order.copy()), weight()) == [2, 1]
    assert merged(weight(order=order), weight(order=order[::-1].copy())) == [1, 1]
