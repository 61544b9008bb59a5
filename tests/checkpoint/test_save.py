"""What is saved is loaded back bit for bit, or refused, or told; and nothing is ever left half written."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from ridgeline.checkpoint.safetensors import INDEX, read_hf
from ridgeline.config import LoadConfig
from ridgeline.errors import CheckpointError, ConfigError
from ridgeline.models import save
from ridgeline.models.load import describe_model, load_model
from ridgeline.models.save import save_model
from ridgeline.models.synth import synthesize
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import ActivationQuant
from ridgeline.tokenizer import load_tokenizer
from tests.checkpoint.linears import assert_same_weights, quantized_model

DYNAMIC, STATIC = ActivationQuant(), ActivationQuant(static_scale=0.125)
OUTLIERS = ActivationQuant(outlier_threshold=6.0)
MIXED = {"v_proj": {"bits": 8, "group_size": 64}, "down_proj": {"bits": 3}, "1.up_proj": {"symmetric": False}}

HELD = {
    "gptq 4": ("gptq", {}),
    "gptq 4 asymmetric": ("gptq", {"symmetric": False}),
    "gptq 4 with zero points of 0": ("gptq", {"symmetric": False, "least_zero": 0}),
    "gptq act-order": ("gptq", {"with_order": True}),
    "gptq 3": ("gptq", {"bits": 3, "symmetric": False}),
    "gptq 2 rows": ("gptq", {"bits": 2, "group_size": None}),
    "gptq 8": ("gptq", {"bits": 8}),
    "gptq mixed": ("gptq", {"others": MIXED}),
    "awq": ("awq", {"symmetric": False, "least_zero": 0}),
    "awq symmetric": ("awq", {}),
    "awq rows": ("awq", {"group_size": None}),
    "ct 4": ("compressed-tensors", {}),
    "ct 4 asymmetric, int8 embedding": ("compressed-tensors", {"symmetric": False, "head_bits": 8}),
    "ct 3, 4-bit embedding": ("compressed-tensors", {"bits": 3, "head_bits": 4}),
    "ct mixed": ("compressed-tensors", {"others": MIXED, "head_bits": 8}),
    "ct W8A8": ("compressed-tensors", {"bits": 8, "group_size": None, "activation": DYNAMIC}),
    "ct W8A8 static": (
        "compressed-tensors",
        {"bits": 8, "group_size": None, "activation": STATIC, "symmetric": False},
    ),
    "ct W4A8": ("compressed-tensors", {"activation": DYNAMIC, "head_bits": 8}),
    "bitsandbytes": ("bitsandbytes", {"bits": 8, "group_size": None, "activation": OUTLIERS}),
    "bitsandbytes without outliers": (
        "bitsandbytes",
        {"bits": 8, "group_size": None, "activation": DYNAMIC},
    ),
}


@pytest.fixture(scope="module", params=["untied", "tied", "biased"])
def model(request, tmp_path_factory):
    options = {"tied": {"tie_embeddings": True}, "biased": {"qkv_bias": True, "o_bias": True}}
    path = tmp_path_factory.mktemp("source") / "hf"
    return load_model(synthesize("tiny-llama", "F32", path=path, **options.get(request.param, {})))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load_model(synthesize("tiny-llama", "F16", path=tmp_path_factory.mktemp("source") / "hf"))


@pytest.mark.parametrize("name", HELD)
def test_round_trip(model, name, tmp_path, caplog):
    kind, grid = HELD[name]
    wanted = quantized_model(model, **grid)
    with caplog.at_level(logging.INFO, logger="ridgeline"):
        directory = save_model(wanted, tmp_path / "out", kind=kind)
        found = load_model(directory)
    assert not caplog.records
    assert_same_weights(wanted, found)
    assert found.config == wanted.config
    assert (found.weights["lm_head"] is found.weights["embed_tokens"]) == wanted.config.tie_embeddings
    described = describe_model(directory)
    for weight_name, weight in found.weights.items():
        other = described.weights[weight_name]
        assert (other.format, other.shape, other.activation) == (
            weight.format,
            weight.shape,
            weight.activation,
        )
        assert not other.buffers
    assert load_tokenizer(found.checkpoint).encode("the day") == load_tokenizer(model.checkpoint).encode(
        "the day"
    )


def test_scales_of_32_bits(model, tmp_path):
    wanted = quantized_model(model, others={"proj": {"f16": False}})
    assert wanted.weights["layers.0.q_proj"].format.name == "INT4_G32_SYM_F32"
    for kind in ("gptq", "awq", "compressed-tensors"):
        assert_same_weights(wanted, load_model(save_model(wanted, tmp_path / kind, kind=kind)))


def test_versions_of_gptq(plain, tmp_path):
    def stored(wanted, version=None):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        save_model(wanted, path, kind="gptq", gptq_version=version)
        assert_same_weights(wanted, load_model(path))
        config = json.loads((path / "config.json").read_text())["quantization_config"]
        zeros = read_hf(path).array("model.layers.0.mlp.up_proj.qzeros").view(np.uint32)
        return config["checkpoint_format"], int(zeros[0, 0])

    symmetric = quantized_model(plain)
    assert stored(symmetric) == ("gptq", 0x77777777)
    assert stored(symmetric, 1) == ("gptq", 0x77777777)
    assert stored(symmetric, 2) == ("gptq_v2", 0x88888888)
    with_zero = quantized_model(plain, symmetric=False, least_zero=0)
    assert stored(with_zero)[0] == "gptq_v2"
    with pytest.raises(CheckpointError, match="zero points of 0"):
        stored(with_zero, 1)


@pytest.mark.parametrize(
    ("kind", "grid", "name", "expected"),
    [
        ("gptq", {"head_bits": 8}, "embed_tokens", "gptq has no quantized embedding"),
        ("awq", {"head_bits": 8, "symmetric": False}, "lm_head", "readers take the head for a plain one"),
        ("awq", {"others": {"v_proj": {"bits": 8}}}, "layers.0.v_proj", "it is not of 4 bits"),
        ("awq", {"others": {"v_proj": {"group_size": 16}}}, "layers.0.v_proj", "another size than most"),
        ("compressed-tensors", {"others": {}}, None, None),
        ("hf", {}, "layers.0.v_proj", "INT4_G32_SYM has no form in hf"),
    ],
)
def test_what_a_kind_cannot_hold_becomes_floats(plain, tmp_path, caplog, kind, grid, name, expected):
    wanted = quantized_model(plain, **grid)
    with caplog.at_level(logging.INFO, logger="ridgeline"):
        found = load_model(save_model(wanted, tmp_path / "out", kind=kind))
    if name is None:
        assert not caplog.records
        return
    assert expected in caplog.text
    weight = found.weights[name]
    assert weight.format.name == ("F32" if kind == "hf" else "F16")
    values = wanted.weights[name].dequantize()
    np.testing.assert_array_equal(
        weight.dequantize(), values.astype(np.float16 if kind != "hf" else np.float32)
    )
    if kind != "hf":
        np.testing.assert_array_equal(
            found.weights["layers.0.up_proj"].data, wanted.weights["layers.0.up_proj"].data
        )


def test_block_formats_of_gguf(tmp_path):
    """Q8_0 and Q4_0 are integers with a scale, exactly; Q4_1 is not."""
    for fmt, held in (("Q8_0", True), ("Q4_0", True), ("Q4_1", False)):
        source = load_model(synthesize("tiny-llama", fmt, path=tmp_path / f"{fmt}.gguf"))
        if not held:
            with pytest.raises(
                CheckpointError, match="no matrix of this model can be stored.*Q4_1 has no form"
            ):
                save_model(source, tmp_path / fmt, kind="compressed-tensors")
            continue
        found = load_model(save_model(source, tmp_path / fmt, kind="compressed-tensors"))
        for name, weight in source.weights.items():
            np.testing.assert_array_equal(found.weights[name].dequantize(), weight.dequantize(), err_msg=name)
        assert found.weights["layers.1.q_proj"].format.name == f"INT{fmt[1]}_G32_SYM"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", None])
def test_plain_directories(plain, tmp_path, dtype):
    found = load_model(save_model(plain, tmp_path / "out", kind="hf", dtype=dtype))
    for name, weight in plain.weights.items():
        is_matrix = len(weight.shape) == 2
        assert found.weights[name].format.name == (dtype if dtype and is_matrix else "F16")
        tolerance = 2**-8 if dtype == "BF16" else 0
        np.testing.assert_allclose(found.weights[name].dequantize(), weight.dequantize(), rtol=tolerance)
    stated = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stated["dtype"] == "float16" and "quantization_config" not in stated


@pytest.mark.parametrize(
    ("kind", "grid", "expected"),
    [
        ("gptq", {"activation": DYNAMIC}, "its inputs are rounded, which gptq cannot state"),
        ("awq", {"activation": DYNAMIC}, "its inputs are rounded, which awq cannot state"),
        ("hf", {"activation": STATIC}, "its inputs are rounded, which hf cannot state"),
        ("compressed-tensors", {"activation": OUTLIERS}, "cannot state outliers"),
        ("compressed-tensors", {"with_order": True}, "no matrix of this model can be stored.*act-order"),
        ("awq", {"with_order": True}, "no matrix of this model can be stored.*act-order"),
        ("awq", {"bits": 8}, "no matrix of this model can be stored.*not of 4 bits"),
        ("bitsandbytes", {}, "one outlier threshold"),
        ("bitsandbytes", {"bits": 8, "group_size": None, "activation": STATIC}, "inputs are rounded"),
        ("bitsandbytes", {"activation": OUTLIERS}, "inputs are rounded, which bitsandbytes cannot state"),
    ],
)
def test_what_would_change_the_model_is_refused(plain, tmp_path, kind, grid, expected):
    with pytest.raises(CheckpointError, match=expected):
        save_model(quantized_model(plain, **grid), tmp_path / "out", kind=kind)
    assert not list(tmp_path.iterdir())


def test_a_plain_model_is_not_quantized_by_saving(plain, tmp_path):
    for kind in ("gptq", "awq", "compressed-tensors"):
        with pytest.raises(CheckpointError, match="none of them is in integers: quantize first"):
            save_model(plain, tmp_path / "out", kind=kind)
    assert not list(tmp_path.iterdir())


def test_options_that_a_config_cannot_state(tmp_path):
    path = synthesize("tiny-llama", "F32", path=tmp_path / "hf")
    changed = load_model(path, LoadConfig(sliding_window=16))
    with pytest.raises(CheckpointError, match="cannot state this model's .*sliding_window"):
        save_model(changed, tmp_path / "out", kind="hf")
    fewer = load_model(path, LoadConfig(num_kv_heads=1))
    assert load_model(save_model(fewer, tmp_path / "out", kind="hf")).config.num_kv_heads == 1


def test_gemma_from_gguf_has_norms_without_their_offset(tmp_path):
    """GGUF stores 1 + w, Hugging Face w: what is multiplied stays the same."""
    source = load_model(synthesize("tiny-gemma3", "F32", path=tmp_path / "m.gguf"))
    expected = load_model(synthesize("tiny-gemma3", "F32", path=tmp_path / "hf"))
    found = load_model(save_model(source, tmp_path / "out", kind="hf"))
    assert replace(found.config, norm_eps=1.0) == replace(expected.config, norm_eps=1.0)
    for name, weight in expected.weights.items():
        np.testing.assert_allclose(found.weights[name].dequantize(), weight.dequantize(), atol=1e-7)


def test_llama3_scaling_from_gguf(tmp_path):
    rope = {"rope_type": "llama3", "theta": 500000.0, "factor": 8.0, "original_max_position": 8192}
    source = load_model(synthesize("tiny-llama", "F32", path=tmp_path / "m.gguf", rope=rope))
    assert source.config.rope.freq_divisors is not None
    found = load_model(save_model(source, tmp_path / "out", kind="hf")).config.rope
    assert (found.rope_type, found.factor, found.original_max_position) == ("llama3", 8.0, 8192)
    odd = replace(source.config.rope, freq_divisors=tuple(range(1, 9)))
    with pytest.raises(CheckpointError, match="follow no scaling"):
        save_model(replace(source, config=replace(source.config, rope=odd)), tmp_path / "odd", kind="hf")


def test_shards(model, tmp_path, monkeypatch):
    wanted = quantized_model(model, head_bits=8)
    monkeypatch.setattr(save, "SHARD_BYTES", 20_000)
    directory = save_model(wanted, tmp_path / "out", kind="compressed-tensors")
    files = sorted(file.name for file in directory.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((directory / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert_same_weights(wanted, load_model(directory))


def test_a_path_in_use(plain, tmp_path):
    wanted = quantized_model(plain)
    path = tmp_path / "out"
    path.mkdir()
    save_model(wanted, path, kind="gptq")  # an empty directory is no obstacle
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for attempt in ("gptq", "hf"):
        with pytest.raises(ConfigError, match="is there already"):
            save_model(wanted, path, kind=attempt)
    with pytest.raises(ConfigError, match="is a directory; a GGUF model is one file"):
        save_model(plain, path, kind="gguf")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    (path / "stale.safetensors").write_bytes(b"")
    save_model(wanted, path, kind="awq", overwrite=True)
    assert not (path / "stale.safetensors").exists()
    assert_same_weights(wanted, load_model(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_new(plain, tmp_path, monkeypatch):
    wanted = quantized_model(plain)
    save_model(wanted, tmp_path / "out", kind="gptq")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(save, "export_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(wanted, tmp_path / "out", kind="awq", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert_same_weights(wanted, load_model(tmp_path / "out"))


def test_gguf_is_a_kind_too(plain, tmp_path):
    found = load_model(save_model(plain, tmp_path / "m.gguf", kind="gguf"))
    for name, weight in plain.weights.items():
        np.testing.assert_array_equal(found.weights[name].dequantize(), weight.dequantize())


def test_a_head_quantized_apart_from_the_embedding(tmp_path):
    """Files that say tied and hold a quantized head (GPTQ's lm_head): two matrices."""
    source = load_model(synthesize("tiny-llama", "F16", path=tmp_path / "hf", tie_embeddings=False))
    wanted = quantized_model(source, head_bits=8)
    wanted = replace(wanted, weights={**wanted.weights, "embed_tokens": source.weights["embed_tokens"]})
    directory = save_model(wanted, tmp_path / "out", kind="gptq")
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"]["lm_head"] is True
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for found in (load_model(directory), describe_model(directory)):
        assert not found.config.tie_embeddings
        assert found.weights["lm_head"].format.name == "INT8_G32_SYM"
        assert found.weights["embed_tokens"].format is FORMATS["F16"]
