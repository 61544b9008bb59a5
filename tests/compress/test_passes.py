"""The calibration pass against the eager executor, and against itself in other chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ridgeline.compress import passes
from ridgeline.compress.calibration import calibration_tokens
from ridgeline.compress.inputs import inputs_of
from ridgeline.compress.passes import CalibrationPass, float_values
from ridgeline.errors import ConfigError, RequestError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import bind_decoder, decoder
from ridgeline.models.load import load_model
from ridgeline.models.synth import synthesize
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.torch_ops import TorchBatch, TorchOps
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight
from ridgeline.tokenizer import load_tokenizer
from tests.compress.models import eager_logits, make_calibration, make_model

ARCHITECTURES = ("llama", "gemma3", "sinks")


class Watch:
    """Keeps everything that it is shown, and replaces what `replace` says."""

    def __init__(self, replace=None, wants_hessian=True):
        self.wants_hessian = wants_hessian
        self.inputs, self.residuals = {}, {}
        self._replace = replace or (lambda names, weights: {})

    def visit(self, names, inputs, weights):
        self.inputs[names] = inputs
        return self._replace(names, weights)

    def finish_layer(self, index, residual):
        self.residuals[index] = residual()


def run(model, calibration, watch=None, **options):
    watch = watch or Watch()
    pass_ = CalibrationPass(model, calibration, watch)
    pass_.run(**options)
    return watch, pass_


class Spy(TorchOps):
    """Sees the input of every linear."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = {}

    def linear(self, x, weight, bias=None):
        self.seen[id(weight)] = x
        return super().linear(x, weight, bias)


def exact_inputs(model, calibration):
    """name -> x [tokens, K] in float64, every window by itself through paged attention with small blocks."""
    config = model.config
    layout = CacheLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype="float64",
        block_size=32,
        num_blocks=8,
    )
    parts = {}
    for window in calibration.token_ids:
        spy = Spy(layout, dtype="float64", device="cpu", attention="naive")
        handles = bind_decoder(spy, config, model.weights, max_model_len=calibration.length)
        batch = ForwardBatch.from_rows(
            [Row(window, 0, range(3, 3 + -(-len(window) // 32)), 1)], block_size=32
        )
        decoder(spy, config, handles, TorchBatch.from_host(batch, "cpu"))
        for name, weight in model.weights.items():
            if id(spy.bind(weight)) in spy.seen and name.startswith("layers."):
                parts.setdefault(name, []).append(spy.seen[id(spy.bind(weight))])
    return {name: torch.cat(x) for name, x in parts.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inputs_are_those_of_the_decoder(name):
    model, calibration = make_model(name), make_calibration(length=45)
    watch, _ = run(model, calibration)
    exact = exact_inputs(model, calibration)
    assert sum(len(names) for names in watch.inputs) == 7 * model.config.num_layers + 1
    for names, inputs in watch.inputs.items():
        if names == ("lm_head",):
            continue
        for linear in names:
            x = exact[linear]
            hessian = 2 / len(x) * x.T @ x
            assert torch.allclose(
                inputs.hessian.double(), hessian, atol=1e-5 * float(hessian.diagonal().max())
            )
            assert torch.allclose(inputs.mean_abs.double(), x.abs().mean(0), rtol=1e-4)
            assert torch.allclose(inputs.max_abs.double(), x.abs().amax(0), rtol=1e-4)
            assert torch.allclose(inputs.mean_square.double(), x.square().mean(0), rtol=1e-4)
            assert torch.allclose(inputs.sample.double(), x, atol=1e-4)  # all rows: they are few
            assert inputs.num_tokens == len(x)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_last_residual_gives_the_logits(name):
    model, calibration = make_model(name), make_calibration()
    watch, _ = run(model, calibration)
    config = model.config
    x = torch.from_numpy(watch.residuals[config.num_layers - 1])
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
    x = x * (float_values(model.weights["norm"]) + config.norm_offset)
    logits = x @ float_values(model.weights["lm_head"]).T
    expected = eager_logits(model, calibration.token_ids).reshape(logits.shape)
    assert np.allclose(logits.numpy(), expected, atol=2e-4)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_chunks_and_keeping_change_nothing(monkeypatch, kept_bytes):
    model, calibration = make_model("llama"), make_calibration(num_samples=5)
    whole, _ = run(model, calibration)
    monkeypatch.setattr(passes, "CHUNK_TOKENS", 128)  # 2, 2 and 1 windows
    monkeypatch.setattr(passes, "KEPT_BYTES", kept_bytes)
    chunked, _ = run(model, calibration)
    for names, inputs in whole.inputs.items():
        assert torch.allclose(inputs.hessian, chunked.inputs[names].hessian, rtol=1e-4, atol=1e-5)
        assert torch.equal(inputs.max_abs, chunked.inputs[names].max_abs)


def test_statistics_without_hessian():
    model, calibration = make_model("llama"), make_calibration()
    full, _ = run(model, calibration)
    light, _ = run(model, calibration, Watch(wants_hessian=False))
    for names, inputs in light.inputs.items():
        assert inputs.hessian is None
        assert torch.allclose(inputs.mean_square, full.inputs[names].mean_square, rtol=1e-5)


def zeroed(weight):
    return Weight(weight.name, FORMATS["F32"], weight.shape, {"data": np.zeros(weight.shape, np.float32)})


def test_later_linears_see_what_earlier_ones_became():
    """True-sequential: with v zeroed on the way, o of the same layer sees its bias alone."""
    model, calibration = make_model("llama"), make_calibration()

    def replace(names, weights):
        return {n: zeroed(weights[n]) for n in names if n == "layers.0.v_proj"}

    watch, pass_ = run(model, calibration, Watch(replace))
    bias = float_values(model.weights["layers.0.v_proj.bias"]).view(2, 1, 16).expand(2, 3, 16).flatten()
    assert torch.allclose(watch.inputs["layers.0.o_proj",].max_abs, bias.abs(), atol=1e-6)
    assert not pass_.weights["layers.0.v_proj"].data.any()


def test_a_changed_producer_is_used_for_its_readers():
    """Halving the norm's gain while q, k, v are visited halves what o's Hessian is made of, but for biases."""
    model, calibration = make_model("gemma3"), make_calibration()

    def replace(names, weights):
        if names[0] != "layers.0.gate_proj":
            return {}
        norm = weights["layers.0.mlp_norm"]
        return {
            norm.name: Weight(
                norm.name, norm.format, norm.shape, {"data": np.full(norm.shape, -1.0, np.float32)}
            )
        }

    # offset 1 + weight -1: the input of gate and up, and so of down, is nothing.
    watch, _ = run(model, calibration, Watch(replace))
    assert watch.inputs["layers.0.gate_proj", "layers.0.up_proj"].max_abs.any()
    assert not watch.inputs["layers.0.down_proj",].max_abs.any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pass_continues_from_a_residual_to_the_same_bits(name):
    model, calibration = make_model(name), make_calibration()
    whole, _ = run(model, calibration)
    rest, _ = run(model, calibration, first_layer=1, state=whole.residuals[0])
    assert ("layers.0.o_proj",) not in rest.inputs
    for names, inputs in rest.inputs.items():
        assert torch.equal(inputs.hessian, whole.inputs[names].hessian)


def test_progress_counts_every_input_once():
    seen = []
    model = make_model("llama")
    CalibrationPass(
        model,
        make_calibration(),
        Watch(),
        on_progress=lambda done, total, message: seen.append((done, total)),
    ).run()
    assert seen == [(i, 9) for i in range(10)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = synthesize("tiny-llama", "F32", path=tmp_path_factory.mktemp("hf") / "m")
    return load_tokenizer(load_model(path).checkpoint)


def test_windows_are_full_and_a_function_of_the_seed(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word {i} of the long harbour story" for i in range(2000)))
    first = calibration_tokens(tokenizer, num_samples=5, length=40, seed=3, text=text)
    again = calibration_tokens(tokenizer, num_samples=5, length=40, seed=3, text=text)
    other = calibration_tokens(tokenizer, num_samples=5, length=40, seed=4, text=text)
    assert first.token_ids == again.token_ids and first.fingerprint() == again.fingerprint()
    assert first.token_ids != other.token_ids and first.fingerprint() != other.fingerprint()
    assert [len(window) for window in first.token_ids] == [40] * 5
    assert first.num_tokens == 200


def test_a_short_text_is_used_whole_or_refused(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a short story about the harbour at night")
    num_tokens = len(tokenizer.encode(text.read_text(), add_special_tokens=False, parse_special=False))
    calibration = calibration_tokens(tokenizer, num_samples=3, length=num_tokens - 2, text=text)
    assert all(len(window) == num_tokens - 2 for window in calibration.token_ids)
    with pytest.raises(RequestError, match=f"has {num_tokens} tokens"):
        calibration_tokens(tokenizer, num_samples=1, length=num_tokens + 1, text=text)
    with pytest.raises(RequestError, match="at least one"):
        calibration_tokens(tokenizer, num_samples=0, length=8, text=text)


def test_a_pass_that_ends_early_saw_what_the_whole_one_sees():
    model, calibration = make_model("llama"), make_calibration()
    whole, _ = run(model, calibration)
    first, pass_ = run(model, calibration, num_layers=1)
    assert {names[0].split(".")[1] for names in first.inputs} == {"0"}
    assert sorted(first.residuals) == [0]
    for names, inputs in first.inputs.items():
        assert torch.equal(inputs.hessian, whole.inputs[names].hessian)

    found = inputs_of(model, calibration, ["layers.0.up_proj", "layers.0.gate_proj"])
    assert list(found) == ["layers.0.up_proj", "layers.0.gate_proj"]
    assert found["layers.0.up_proj"] is found["layers.0.gate_proj"]
    expected = whole.inputs["layers.0.gate_proj", "layers.0.up_proj"]
    assert torch.equal(found["layers.0.up_proj"].hessian, expected.hessian)
    assert inputs_of(model, calibration, []) == {}
    for wrong in ("lm_head", "layers.9.q_proj", "layers.0.input_norm"):
        with pytest.raises(ConfigError, match="no linear of this model"):
            inputs_of(model, calibration, [wrong])
