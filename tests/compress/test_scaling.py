"""Folding leaves the forward as it was, and searched scales are never worse than none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ridgeline.compress.grids import Grid, rtn
from ridgeline.compress.passes import GROUPS, CalibrationPass, float_values
from ridgeline.compress.scaling import (
    awq_scales,
    divide_producer,
    fake_quantize,
    producer_of,
    scaled_inputs,
    search_awq,
    search_smooth,
    smooth_scales,
)
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.groups import pack_groups, unpack_groups
from ridgeline.quant.weight import Weight
from tests.compress.models import eager_logits, make_calibration, make_model
from tests.compress.test_passes import Watch


def groups_of(model):
    for i in range(model.config.num_layers):
        for group in GROUPS:
            yield tuple(f"layers.{i}.{member}" for member in group)


def folded(model, seed=0):
    """Every input of the model divided by random scales from 1/4 to 4, its linears multiplied."""
    weights = dict(model.weights)
    rng = np.random.default_rng(seed)
    for names in groups_of(model):
        producer = producer_of(model.config, names)
        scales = torch.from_numpy(np.exp2(rng.uniform(-2, 2, producer.num_rows)).astype(np.float32))
        for name in names:
            values = float_values(weights[name]) * scales[producer.rows]
            weights[name] = Weight(name, FORMATS["F32"], weights[name].shape, {"data": values.numpy()})
        weights.update(divide_producer(producer, scales, weights))
    return replace(model, weights=weights)


@pytest.mark.parametrize("name", ["llama", "gemma3", "sinks"])
def test_folding_alone_changes_no_logit(name):
    """llama here has GQA and biases, gemma3 norms that multiply by 1 + w and norms after the blocks."""
    model = make_model(name)
    scaled = folded(model)
    assert not np.allclose(scaled.weights["layers.0.q_proj"].data, model.weights["layers.0.q_proj"].data)
    windows = make_calibration(num_samples=2).token_ids
    before, after = eager_logits(model, windows), eager_logits(scaled, windows)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_query_heads_of_one_kv_head_share_scales():
    config = make_model("llama").config  # 6 query heads of 16 read 2 KV heads
    producer = producer_of(config, ("layers.1.o_proj",))
    assert producer.name == "layers.1.v_proj" and producer.num_rows == 32
    rows = producer.rows.view(6, 16)
    assert torch.equal(rows[0], torch.arange(16))
    assert (
        torch.equal(rows[2], rows[0]) and torch.equal(rows[3], rows[0] + 16) and torch.equal(rows[5], rows[3])
    )
    assert producer_of(config, ("lm_head",)) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_codes_keep_their_codes(bits):
    model = make_model("llama")
    values = float_values(model.weights["layers.0.up_proj"])
    groups = rtn(values, Grid(bits, 32, symmetric=bits == 8))
    fmt, data = pack_groups(groups)
    weights = {"layers.0.up_proj": Weight("layers.0.up_proj", fmt, groups.q.shape, {"data": data})}
    scales = torch.linspace(0.1, 9.0, 128)
    producer = producer_of(model.config, ("layers.0.down_proj",))
    divided = divide_producer(producer, scales, weights)["layers.0.up_proj"]
    assert divided.format == fmt
    assert np.array_equal(unpack_groups(divided.data, fmt).q, groups.q)
    expected = groups.dequantize() / scales.numpy()[:, None]
    assert np.allclose(divided.dequantize(), expected, rtol=2**-11)


@pytest.fixture(scope="module")
def observed():
    """names -> statistics of a model some of whose inputs are far larger than others."""
    model = make_model("llama")
    watch = Watch()
    CalibrationPass(model, make_calibration(), watch).run()
    return model, watch.inputs


def test_smoothquant_formula(observed):
    """s_j = max|X_j|^a / max|W_j|^(1-a), up to a common factor; alpha 1 makes all inputs equally large."""
    model, inputs = observed
    names = ("layers.0.gate_proj", "layers.0.up_proj")
    values = [float_values(model.weights[n]) for n in names]
    producer = producer_of(model.config, names)
    scales = smooth_scales(inputs[names], values, producer, alpha=0.3)
    x = inputs[names].sample.abs().amax(0).numpy()
    w = torch.cat(values).abs().amax(0).numpy()
    expected = x**0.3 / w**0.7
    assert np.allclose(scales / scales[0], expected / expected[0], rtol=1e-4)
    assert float(scales.log().mean()) == pytest.approx(0, abs=1e-5)
    even = scaled_inputs(inputs[names], smooth_scales(inputs[names], values, producer, alpha=1.0))
    assert torch.allclose(even.max_abs, even.max_abs[0].expand(64), rtol=1e-4)


def test_awq_formula(observed):
    """s = mean|x|^a / (mean of |w| over its group's largest)^(1-a), reduced over the heads that share v."""
    model, inputs = observed
    names = ("layers.1.o_proj",)
    weight = float_values(model.weights[names[0]])
    producer = producer_of(model.config, names)
    scales = awq_scales(inputs[names], [weight], [Grid(4, 32)], producer, alpha=0.25)
    x = inputs[names].mean_abs.view(2, 3, 16).mean(1).flatten().numpy()
    groups = weight.abs().view(64, 3, 32)
    w = (groups / groups.amax(-1, keepdim=True)).view(64, 2, 3, 16).mean((0, 2)).flatten().numpy()
    expected = x**0.25 / (w**0.75 + 1e-4)
    assert np.allclose(scales, expected / np.sqrt(expected.max() * expected.min()), rtol=1e-4)


def output_error_of(weights, inputs, scales, grid, *, round_inputs):
    """Directly from the rows of x: what the products with rounded weights (and inputs) are off by."""
    total, exact_total = 0.0, 0.0
    for weight in weights:
        x = inputs.sample / scales
        if round_inputs:
            d = x.abs().amax(1, keepdim=True) / 127
            x = (x / d).round() * d
        exact = inputs.sample @ weight.T
        total += float((x @ fake_quantize(weight * scales, grid).T - exact).square().sum())
        exact_total += float(exact.square().sum())
    return total / exact_total


@pytest.mark.parametrize(
    "names", [("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"), ("layers.1.o_proj",)]
)
def test_searched_scales_lower_the_error_of_the_outputs(observed, names):
    model, inputs = observed
    values = [float_values(model.weights[n]) for n in names]
    producer = producer_of(model.config, names)
    for grid, round_inputs in ((Grid(4, 32), False), (Grid(8, None, symmetric=True), True)):
        grids = [grid] * len(names)
        if round_inputs:
            found = search_smooth(inputs[names], values, grids, producer, is_static=False)
        else:
            found = search_awq(inputs[names], values, grids, producer)
        assert 0 < found.error <= 1
        ones = torch.ones(64 if len(names) > 1 else 96)
        before = output_error_of(values, inputs[names], ones, grid, round_inputs=round_inputs)
        after = output_error_of(
            values, inputs[names], found.scales[producer.rows], grid, round_inputs=round_inputs
        )
        assert after <= before * 1.02  # each linear is weighed by its size, here their sum is taken
        if len(names) == 3:
            assert found.alpha is not None and after < 0.97 * before


def test_no_search_makes_a_model_of_even_inputs_worse():
    """Where nothing is to gain, ones stay: the baseline is among the candidates."""
    torch.manual_seed(0)
    model = make_model("llama")
    names = ("layers.0.down_proj",)
    producer = producer_of(model.config, names)
    watch = Watch()
    CalibrationPass(model, make_calibration(), watch).run()
    inputs = scaled_inputs(watch.inputs[names], watch.inputs[names].mean_abs)
    inputs = replace(inputs, hessian=torch.eye(128))
    found = search_awq(inputs, [torch.randn(64, 128)], [Grid(8, 64)], producer)
    assert found.error <= 1
