"""End-to-end training: it lowers the divergence on other text, within the same formats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ridgeline.compress.quantize import linear_names, quantize_model
from ridgeline.compress.tuning import _Teacher, _Trained, tune
from ridgeline.quant.groups import unpack_groups
from tests.compress.models import eager_logits, make_calibration, make_model
from tests.compress.test_quantize import kl, same_bits, small


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_training_lowers_the_divergence_on_other_text(name):
    model, calibration = make_model(name), make_calibration(64)
    quantized = quantize_model(model, small("gptq-int3-g64"), calibration=calibration).model
    messages = []
    tuned = tune(
        model,
        quantized,
        calibration,
        steps=160,
        on_progress=lambda done, total, message: messages.append(done),
    )
    assert messages == list(range(1, 161))
    windows = make_calibration(4, seed=7).token_ids
    base = eager_logits(model, windows)
    before, after = kl(base, eager_logits(quantized, windows)), kl(base, eager_logits(tuned, windows))
    assert after < 0.9 * before
    moved = 0
    for linear in linear_names(model):
        old, new = quantized.weights[linear], tuned.weights[linear]
        assert new.format is old.format and new.shape == old.shape
        moved += int((unpack_groups(old.data, old.format).q != unpack_groups(new.data, new.format).q).sum())
    assert moved > 0
    assert tuned.weights["embed_tokens"] is quantized.weights["embed_tokens"]
    assert (tuned.weights["lm_head"] is tuned.weights["embed_tokens"]) == model.config.tie_embeddings


def test_no_steps_change_no_bit():
    model, calibration = make_model("llama"), make_calibration(2)
    quantized = quantize_model(model, small("gptq-int4-g64"), calibration=calibration).model
    assert same_bits(quantized, tune(model, quantized, calibration, steps=0))


def test_the_teacher_is_the_original():
    model, calibration = make_model("gemma3"), make_calibration(3)
    expected = torch.from_numpy(eager_logits(model, calibration.token_ids)).log_softmax(-1)
    found = _Teacher(model, calibration)([2, 0])
    assert np.allclose(found, expected[[2, 0]].flatten(0, 1), atol=2e-4)


def test_gradients_pass_through_the_rounding():
    """d values / d position is the scale, d values / d change the value itself."""
    model = make_model("llama")
    weight = quantize_model(model, small("rtn-int4-g64")).model.weights["layers.0.k_proj"]
    trained = _Trained(weight)
    values = trained()
    assert np.allclose(values.detach(), weight.dequantize(), rtol=1e-6)
    upstream = torch.randn(values.shape)
    values.backward(upstream)
    groups = unpack_groups(weight.data, weight.format)
    grouped = upstream.view(*groups.scales.shape, -1)
    assert torch.allclose(trained.positions.grad, grouped * torch.from_numpy(groups.scales)[:, :, None])
    per_group = (grouped * torch.from_numpy(weight.dequantize()).view_as(grouped)).sum(-1)
    assert torch.allclose(trained.change.grad, per_group, rtol=1e-4, atol=1e-5)


def test_codes_stay_in_range():
    model = make_model("llama")
    weight = quantize_model(model, small("rtn-int2-g64")).model.weights["layers.0.k_proj"]
    trained = _Trained(weight)
    for sign in (1.0, -1.0):
        trained.positions.grad = torch.full_like(trained.positions, sign)
        trained.move(5.0)
        q = unpack_groups(trained.trained().data, weight.format).q
        assert (q == (0 if sign > 0 else 3)).all()
