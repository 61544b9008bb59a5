"""Scales of keys: no logit changes, and an int8 cache holds keys of unequal channels better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ridgeline.compress.keys import key_scales, smooth_keys
from ridgeline.compress.passes import CalibrationPass, float_values
from ridgeline.compress.quantize import quantize_model
from ridgeline.compress.recipe import recipe_named
from ridgeline.config import EngineConfig
from ridgeline.engine.executors.eager import EagerExecutor
from ridgeline.engine.memory import plan_cache
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight
from tests.compress.models import eager_logits, make_calibration, make_model
from tests.compress.test_passes import Watch


def with_uneven_keys(model):
    """Two channels of every key head forty times as large as the others, which is what real models have."""
    weights = dict(model.weights)
    d, half = model.config.head_dim, model.config.rope.rotary_dim // 2
    factors = torch.ones(d)
    factors[[1, 1 + half]] = 40.0
    for name, weight in model.weights.items():
        values = float_values(weight)
        if name.endswith((".k_proj", ".k_proj.bias")):
            scaled = values * factors.repeat(model.config.num_kv_heads).view(-1, *[1] * (values.dim() - 1))
        elif name.endswith((".q_proj", ".q_proj.bias")):
            scaled = values / factors.repeat(model.config.num_heads).view(-1, *[1] * (values.dim() - 1))
        elif name.endswith((".k_norm", ".q_norm")):
            offset = model.config.norm_offset
            by = factors if name.endswith("k_norm") else 1 / factors
            scaled = (values + offset) * by - offset
        else:
            continue
        weights[name] = Weight(name, FORMATS["F32"], weight.shape, {"data": scaled.contiguous().numpy()})
    return replace(model, weights=weights)


def smoothed(model, calibration):
    watch = Watch()
    CalibrationPass(model, calibration, watch).run()
    weights = dict(model.weights)
    for names, inputs in watch.inputs.items():
        if names[0].endswith("q_proj"):
            weights.update(smooth_keys(model.config, names[0].rpartition(".")[0], inputs, model.weights))
    return replace(model, weights=weights)


def int8_cache_logits(model, window, dtype):
    config = EngineConfig.from_options(
        "m", executor="eager", dtype="float32", max_model_len=64, kv_cache_tokens=64, kv_cache_dtype=dtype
    ).resolve(model.config, unavailable={})
    executor = EagerExecutor(config, model, plan_cache(config, model.config))
    blocks = tuple(range(64 // config.cache.block_size))
    first = Row(tuple(window[:-8]), 0, blocks, 1)
    executor.forward(ForwardBatch.from_rows([first], block_size=config.cache.block_size))
    rest = Row(tuple(window[-8:]), len(window) - 8, blocks, 8)
    return executor.forward(ForwardBatch.from_rows([rest], block_size=config.cache.block_size))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_stay_and_int8_keys_gain(name):
    """llama here has GQA and biases, gemma3 QK-norms, which multiply by 1 + w."""
    model = with_uneven_keys(make_model(name))
    calibration = make_calibration()
    smooth = smoothed(model, calibration)
    windows = [w[:40] for w in calibration.token_ids[:2]]
    before, after = eager_logits(model, windows), eager_logits(smooth, windows)
    assert np.abs(after - before).max() <= 2e-5 * np.abs(before).max()
    exact = int8_cache_logits(model, windows[0], "float32")
    errors = [np.abs(int8_cache_logits(m, windows[0], "int8") - exact).mean() for m in (model, smooth)]
    assert errors[1] < 0.6 * errors[0]


def test_scales_are_those_of_pairs_and_balance_large_channels():
    rng = np.random.default_rng(0)
    q, k = (torch.from_numpy(rng.standard_normal((200, 16)).astype(np.float32)) for _ in range(2))
    k[:, 3] *= 100.0
    scales = key_scales(q, k, rotary_dim=12)
    assert torch.equal(scales[:6], scales[6:12]), "RoPE mixes i and i + R/2"
    assert float(scales.log().mean()) == pytest.approx(0.0, abs=1e-5)
    assert scales[3] > 5 * scales[4] and scales[3] == scales.max()
    assert torch.allclose(key_scales(q, torch.zeros(5, 16), rotary_dim=12), torch.ones(16))


def test_a_recipe_takes_them_along():
    model = make_model("llama")
    recipe = recipe_named("int8").with_options(smooth_keys=True)
    assert recipe.needs_calibration
    plain = quantize_model(model, recipe_named("int8"), calibration=make_calibration()).model
    smooth = quantize_model(model, recipe, calibration=make_calibration()).model
    assert smooth.weights["layers.0.k_proj"].format is plain.weights["layers.0.k_proj"].format
    windows = [w[:40] for w in make_calibration().token_ids[:2]]
    base, one, other = (eager_logits(m, windows) for m in (model, plain, smooth))
    assert np.abs(other - base).mean() < 2 * np.abs(one - base).mean()
    assert not np.array_equal(smooth.weights["layers.0.q_proj"].data, plain.weights["layers.0.q_proj"].data)
