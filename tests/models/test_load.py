"""From a file to weights by canonical name: the same model from every kind of file, and what is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.checkpoint.gguf_write import TensorSource, write_gguf
from ridgeline.checkpoint.safetensors import INDEX, read_hf, write_safetensors
from ridgeline.config import LoadConfig
from ridgeline.errors import CheckpointError, ModelNotFoundError, RidgelineError
from ridgeline.models.load import load_model
from ridgeline.models.locate import locate_model
from ridgeline.models.registry import expected_shapes
from ridgeline.models.rope import rope_frequencies
from ridgeline.models.synth import synthesize
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.gguf_blocks import quantize

VARIANTS = {
    "llama": ("tiny-llama", {}),
    "llama, biases": ("tiny-llama", {"qkv_bias": True, "o_bias": True, "tie_embeddings": True}),
    "gemma3": ("tiny-gemma3", {}),
    "gemma3, untied": ("tiny-gemma3", {"tie_embeddings": False}),
}


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return synthesize("tiny-llama", "Q4_0", path=tmp_path_factory.mktemp("gguf") / "m.gguf", qkv_bias=True)


@pytest.fixture
def directory(tmp_path):
    return synthesize("tiny-llama", "F32", path=tmp_path / "hf")


@pytest.mark.parametrize("name", VARIANTS)
def test_both_kinds_of_file_hold_the_same_model(tmp_path, name):
    like, overrides = VARIANTS[name]
    hf = load_model(synthesize(like, "F32", seed=3, path=tmp_path / "hf", **overrides))
    gguf = load_model(synthesize(like, "F32", seed=3, path=tmp_path / "m.gguf", **overrides))
    assert gguf.config.norm_eps == pytest.approx(hf.config.norm_eps)
    assert replace(gguf.config, norm_eps=hf.config.norm_eps, norm_offset=hf.config.norm_offset) == hf.config
    assert set(hf.weights) == set(gguf.weights) == {*expected_shapes(hf.config), "lm_head"}
    for weight_name, weight in hf.weights.items():
        offset = hf.config.norm_offset if "norm" in weight_name else 0.0
        np.testing.assert_array_equal(
            weight.dequantize() + np.float32(offset), gguf.weights[weight_name].dequantize()
        )
    for model in (hf, gguf):
        tied = model.weights["lm_head"] is model.weights["embed_tokens"]
        assert tied == model.config.tie_embeddings
        for weight_name, shape in expected_shapes(model.config).items():
            assert model.weights[weight_name].shape == shape
            assert model.weights[weight_name].name == weight_name


def test_bf16_and_shards(directory):
    """The same tensors in two files, one of them in bfloat16."""
    whole = load_model(directory)
    assert whole.checkpoint is not None
    tensors = [whole.checkpoint.weight(name) for name in whole.checkpoint.tensors]
    (directory / "model.safetensors").unlink()
    shards = {"1.safetensors": (tensors[::2], "F32"), "2.safetensors": (tensors[1::2], "BF16")}
    for file, (weights, fmt) in shards.items():
        declared = [(w.name, FORMATS[fmt], w.shape) for w in weights]
        chunks = [quantize(w.data, FORMATS[fmt]).tobytes() for w in weights]
        write_safetensors(directory / file, declared, chunks)
    weight_map = {w.name: file for file, (weights, _) in shards.items() for w in weights}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    found = load_model(directory)
    assert {w.format.name for w in found.weights.values()} == {"F32", "BF16"}
    for name, weight in whole.weights.items():
        np.testing.assert_allclose(found.weights[name].dequantize(), weight.dequantize(), rtol=2**-8)


def test_nothing_is_copied_but_permuted_rows(gguf_file):
    model = load_model(gguf_file)
    for name, weight in model.weights.items():
        assert weight.data.flags.writeable == any(part in name for part in (".q_proj", ".k_proj")), name


def test_permutation_on_quantized_rows(gguf_file):
    """Row 2i + j of a head in the file is row i + j * D/2 of ours, whole; also of the biases."""
    model, file = load_model(gguf_file), read_gguf(gguf_file)
    for canonical, stored, num_heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        for ours, theirs in (
            (model.weights[f"layers.1.{canonical}"], file.weight(f"blk.1.{stored}.weight")),
            (model.weights[f"layers.1.{canonical}.bias"], file.weight(f"blk.1.{stored}.bias")),
        ):
            assert ours.format is theirs.format and ours.shape == theirs.shape
            for head in range(num_heads):
                for i in range(8):
                    for j in (0, 1):
                        mine = ours.data[head * 16 + i + 8 * j]
                        np.testing.assert_array_equal(mine, theirs.data[head * 16 + 2 * i + j])
    v = model.weights["layers.1.v_proj"]
    np.testing.assert_array_equal(v.data, file.weight("blk.1.attn_v.weight").data)


@pytest.mark.parametrize(("alias", "num_layers"), [("smollm2", 30), ("gemma3-270m", 18)])
def test_real_files(alias, num_layers, caplog):
    try:
        path = locate_model(alias)
    except ModelNotFoundError:
        pytest.skip(f"{alias} is not installed")
    model = load_model(path)
    assert model.config.num_layers == num_layers
    assert model.weights["lm_head"] is model.weights["embed_tokens"]
    assert not caplog.records


def rewrite(path, change):
    """The GGUF file again with its tensors changed: name -> (name, format, shape, array) or None."""
    file = read_gguf(path)
    metadata = dict(file.metadata)
    sources = []
    for name in file.tensors:
        weight = file.weight(name)
        changed = change(name, weight.format, weight.shape, weight.data)
        if changed is not None:
            sources.append(TensorSource(*changed[:3], [np.array(changed[3])]))
    new = path.with_name("changed.gguf")
    write_gguf(new, metadata, sources)
    return new


def test_a_missing_tensor(gguf_file):
    path = rewrite(gguf_file, lambda *t: None if t[0] == "blk.1.ffn_up.weight" else t)
    with pytest.raises(
        CheckpointError, match=r"changed.gguf: expected a tensor 'blk.1.ffn_up.weight', found"
    ):
        load_model(path)


def test_a_wrong_shape(gguf_file):
    def shorten(name, fmt, shape, data):
        return (
            (name, fmt, (shape[0] - 1, *shape[1:]), data[:-1])
            if name == "blk.0.ffn_up.weight"
            else (
                name,
                fmt,
                shape,
                data,
            )
        )

    path = rewrite(gguf_file, shorten)
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert "changed.gguf: tensor 'blk.0.ffn_up.weight' has shape (95, 64); the config says (96, 64)" in str(
        caught.value
    )


def add(directory, *extra):
    checkpoint = read_hf(directory)
    weights = [checkpoint.weight(name) for name in checkpoint.tensors]
    declared = [(w.name, w.format, w.shape) for w in weights] + [
        (n, FORMATS["F32"], a.shape) for n, a in extra
    ]
    content = [w.data.tobytes() for w in weights] + [np.float32(a).tobytes() for _, a in extra]
    write_safetensors(directory / "model.safetensors", declared, content)


def test_unknown_tensors_are_one_warning(directory, caplog):
    add(directory, ("extra.weight", np.ones(3)), ("more.weight", np.ones(3)))
    with caplog.at_level(logging.WARNING, logger="ridgeline"):
        load_model(directory)
    assert len(caplog.records) == 1
    assert "2 tensors are not used, such as extra.weight, more.weight" in caplog.text


def test_a_bias_that_would_be_ignored(directory, caplog):
    add(directory, ("model.layers.0.self_attn.o_proj.bias", np.zeros(64)))
    load_model(directory)
    assert not caplog.records
    add(directory, ("model.layers.0.mlp.up_proj.bias", np.ones(96)))
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.up_proj.bias' is a bias"):
        load_model(directory)


def test_multimodal_directories_keep_the_text_model_deeper(tmp_path):
    directory = synthesize("tiny-gemma3", "F32", path=tmp_path / "hf")
    plain = load_model(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    checkpoint = read_hf(directory)
    weights = [checkpoint.weight(name) for name in checkpoint.tensors]
    for prefix in ("language_model.model.", "model.language_model."):
        declared = [(prefix + w.name.removeprefix("model."), w.format, w.shape) for w in weights]
        write_safetensors(directory / "model.safetensors", declared, [w.data.tobytes() for w in weights])
        found = load_model(directory)
        assert found.config == plain.config
        for name, weight in plain.weights.items():
            np.testing.assert_array_equal(found.weights[name].data, weight.data)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_key_value_heads": 3}, "4 query heads are not a multiple of 3 KV heads"),
        ({"partial_rotary_factor": 0.2}, "RoPE rotates 3 of 16 features"),
        ({"num_hidden_layers": 4000}, "expected a tensor 'model.layers.2.input_layernorm.weight'"),
        ({"vocab_size": 511}, "has shape (512, 64); the config says (511, 64)"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
    ],
)
def test_configs_that_do_not_fit(directory, change, expected):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    assert expected in str(caught.value) and str(directory) in str(caught.value)


ODD = st.sampled_from(
    [None, True, 0, -1, 1, 3, 2**31, 10**30, 1.5, -0.0, float("nan"), float("inf"), "", "yarn", "linear"]
    + [[], [1], {}, {"a": 1}, ["full_attention"] * 7]
)
ROPE_KEYS = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "attention_factor",
    "truncate",
    "partial_rotary_factor",
]


@pytest.mark.parametrize("like", ["tiny-llama", "tiny-gemma3"])
def test_odd_configs_end_in_an_error_or_in_a_model(tmp_path_factory, like):
    """Nothing but RidgelineError, no warning of numpy, and no time lost on absurd sizes."""
    directory = synthesize(like, "F32", path=tmp_path_factory.mktemp("odd") / "hf")
    file = directory / "config.json"
    config = json.loads(file.read_text())

    @given(st.dictionaries(st.sampled_from(sorted(config)), ODD, max_size=2), st.data())
    @settings(max_examples=200)
    def check(changes, data):
        rope = dict(data.draw(st.lists(st.tuples(st.sampled_from(ROPE_KEYS), ODD), max_size=3)))
        file.write_text(json.dumps(config | {"rope_parameters": config["rope_parameters"] | rope} | changes))
        try:
            found = load_model(directory).config
        except RidgelineError:
            return
        for kind in (found.rope, found.rope_local or found.rope):
            frequencies, factor = rope_frequencies(kind, max_position=found.max_position, max_model_len=4096)
            assert np.isfinite(frequencies).all() and np.isfinite(factor)

    check()


def test_baked_rope_factors(tmp_path):
    rope = {"rope_type": "llama3", "theta": 1e4, "factor": 8.0, "original_max_position": 256}
    path = synthesize("tiny-llama", "F32", path=tmp_path / "m.gguf", rope=rope)
    found = load_model(path).config.rope
    assert found.rope_type == "default" and found.freq_divisors is not None
    assert found.freq_divisors[0] == 1.0 and found.freq_divisors[-1] == 8.0
    # An option replaces what the file says, the tensor included.
    option = LoadConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})
    changed = load_model(path, option).config.rope
    assert (changed.freq_divisors, changed.rope_type, changed.factor, changed.theta) == (
        None,
        "linear",
        2.0,
        1e4,
    )

    broken = rewrite(path, lambda n, f, s, d: (n, f, s, d * (n != "rope_freqs.weight")))
    with pytest.raises(CheckpointError, match=r"tensor 'rope_freqs.weight' of shape \(8,\): expected \(8,\)"):
        load_model(broken)


def test_no_such_file(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"nothing.gguf"):
        load_model(tmp_path / "nothing.gguf")
