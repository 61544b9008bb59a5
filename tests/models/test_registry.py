"""Configs from both kinds of file: every field, the older spellings, the real files, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import transformers

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.config import ModelConfig, RopeConfig
from ridgeline.errors import CheckpointError, ModelNotFoundError
from ridgeline.models.locate import locate_model
from ridgeline.models.registry import HF_MODEL_TYPES, SPECS, spec_for
from ridgeline.models.synth import preset_config

LLAMA = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 300,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [7, 8],
    "attention_bias": True,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 300,
    "query_pre_attn_scalar": 16,
    "sliding_window": 21,
    "eos_token_id": 3,
}


def from_hf(config, **metadata) -> ModelConfig:
    metadata = json.loads(json.dumps(config)) | metadata
    return spec_for("hf", metadata, file="config.json").config_from_hf(metadata, file="config.json")


def test_llama_from_transformers():
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    found = from_hf(transformers.LlamaConfig(**LLAMA, rope_parameters=rope).to_dict())
    assert found == ModelConfig(
        arch="llama",
        num_layers=3,
        hidden_size=32,
        intermediate_size=50,
        vocab_size=99,
        max_position=300,
        num_heads=4,
        num_kv_heads=2,
        head_dim=10,
        norm_eps=1e-5,
        activation="silu",
        tie_embeddings=True,
        rope=RopeConfig(theta=5e5, rotary_dim=10, rope_type="linear", factor=2.0),
        qkv_bias=True,
        o_bias=True,
        eos_token_ids=(7, 8),
    )


def test_llama_of_older_files():
    old = LLAMA | {
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "bfloat16",
    }
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert from_hf(old) == from_hf(transformers.LlamaConfig(**LLAMA, rope_parameters=rope).to_dict())
    for key in ("num_key_value_heads", "head_dim", "attention_bias", "tie_word_embeddings", "eos_token_id"):
        del old[key]
    found = from_hf(old)
    assert (found.num_kv_heads, found.head_dim, found.qkv_bias, found.tie_embeddings) == (4, 8, False, False)
    assert found.eos_token_ids == ()


def test_gemma3_from_transformers():
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    found = from_hf(transformers.Gemma3TextConfig(**GEMMA3, rope_parameters=rope).to_dict())
    assert found == ModelConfig(
        arch="gemma3",
        num_layers=8,
        hidden_size=32,
        intermediate_size=50,
        vocab_size=99,
        max_position=300,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        norm_eps=1e-6,
        activation="gelu_tanh",
        tie_embeddings=True,
        rope=RopeConfig(theta=2e6, rotary_dim=12, rope_type="linear", factor=8.0),
        rope_local=RopeConfig(theta=3e4, rotary_dim=12),
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embed_scale=math.sqrt(32),
        attn_scale=0.25,
        sliding_window=21,
        window_layers=(0, 1, 2, 3, 4, 6, 7),
        eos_token_ids=(3,),
    )


def test_gemma3_of_older_files_and_inside_a_multimodal_one():
    old = GEMMA3 | {
        "model_type": "gemma3_text",
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 3,
    }
    found = from_hf(old)
    assert found.rope == RopeConfig(theta=2e6, rotary_dim=12, rope_type="linear", factor=8.0)
    assert found.rope_local == RopeConfig(theta=3e4, rotary_dim=12)
    assert found.window_layers == (0, 1, 3, 4, 6, 7)
    outer = {"model_type": "gemma3", "text_config": old, "eos_token_id": [1, 106]}
    assert from_hf(outer).eos_token_ids == (1, 106)
    assert from_hf(outer).window_layers == found.window_layers
    # Google's 4B file says no more than this.
    few = ("hidden_size", "intermediate_size", "num_hidden_layers", "rope_scaling")
    sparse = from_hf({"model_type": "gemma3", "text_config": {key: old[key] for key in few}})
    assert (sparse.num_heads, sparse.num_kv_heads, sparse.head_dim, sparse.vocab_size) == (8, 4, 256, 262208)
    assert sparse.rope.theta == 1e6 and sparse.rope_local is not None and sparse.rope_local.theta == 1e4


@pytest.mark.parametrize("like", ["tiny-llama", "tiny-gemma3", "llama-1b", "gemma3-270m", "smollm2-135m"])
def test_hf_round_trip(like):
    config = preset_config(like)
    assert from_hf(SPECS[config.arch].config_to_hf(config)) == config


def refused(config, expected):
    with pytest.raises(CheckpointError) as caught:
        from_hf(config)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("config.json: ") and len(str(caught.value)) < 300


REQUIRED = {
    "llama": [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ],
    "gemma3_text": ["hidden_size", "intermediate_size", "num_hidden_layers"],
}


@pytest.mark.parametrize(("model_type", "key"), [(m, k) for m, keys in REQUIRED.items() for k in keys])
def test_required_keys(model_type, key):
    config = {"model_type": model_type} | (LLAMA if model_type == "llama" else GEMMA3)
    del config[key]
    refused(config, f"{key} is missing")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model_type", "mamba", "model_type is 'mamba'; supported architectures: llama, gemma3"),
        ("model_type", ["llama"], "supported architectures"),
        ("model_type", None, "supported architectures"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'; expected 'silu'"),
        ("mlp_bias", True, "mlp_bias is True"),
        (
            "num_hidden_layers",
            10**9,
            "num_hidden_layers is 1000000000; expected a whole number from 1 to 4096",
        ),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("num_hidden_layers", True, "num_hidden_layers is True"),
        ("hidden_size", "32", "hidden_size is '32'"),
        ("hidden_size", 2.0**70, "hidden_size is"),
        ("rms_norm_eps", -1, "rms_norm_eps is -1; expected a number above 0"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        ("eos_token_id", -1, "eos_token_id is -1"),
        ("eos_token_id", {"a": 1}, "expected a token id or a list of them"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes'; expected true or false"),
        ("rope_parameters", [1], "rope_parameters is [1]; expected an object"),
        ("rope_parameters", {"rope_type": "su"}, "rope_type='su': expected one of"),
        ("partial_rotary_factor", 2.0, "partial_rotary_factor"),
        ("head_dim", "x" * 10_000, "head_dim is 'xxx"),
    ],
)
def test_refused_llama(key, value, expected):
    refused({"model_type": "llama"} | LLAMA | {key: value}, expected)


def test_head_dim_that_does_not_divide():
    config = {"model_type": "llama"} | LLAMA | {"num_attention_heads": 5}
    del config["head_dim"]
    refused(config, "32 features do not divide among 5 heads, and head_dim is not given")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("text_config", 3, "text_config is 3"),
        ("layer_types", ["full_attention"], "expected 8 times sliding_attention or full_attention"),
        ("layer_types", [["full_attention"]] * 8, "expected 8 times"),
        ("layer_types", 8, "expected 8 times"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping is 30.0"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is True"),
        ("hidden_activation", "relu", "hidden_activation is 'relu'"),
        ("rope_parameters", {"full_attention": 3}, "rope_parameters is 3"),
    ],
)
def test_refused_gemma3(key, value, expected):
    refused({"model_type": "gemma3_text"} | GEMMA3 | {key: value}, expected)


def from_gguf(metadata, tensors=frozenset()) -> ModelConfig:
    return spec_for("gguf", metadata, file="m.gguf").config_from_gguf(
        metadata, file="m.gguf", tensors=tensors
    )


def test_smollm2_file():
    checkpoint = read_gguf(locate_model("smollm2"))
    config = from_gguf(checkpoint.metadata, frozenset(checkpoint.tensors))
    eps = config.norm_eps
    assert eps == pytest.approx(1e-5)
    assert config == preset_config("smollm2-135m", norm_eps=eps)


def test_gemma3_file():
    try:
        checkpoint = read_gguf(locate_model("gemma3-270m"))
    except ModelNotFoundError:
        pytest.skip("gemma3-270m is not installed")
    config = from_gguf(checkpoint.metadata, frozenset(checkpoint.tensors))
    expected = preset_config("gemma3-270m", norm_eps=config.norm_eps, eos_token_ids=(1,))
    # The file stores 1 + w; that this is right, test_transformers shows on the logits.
    assert config == replace(expected, norm_offset=0.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"general.architecture": "qwen9"}, "general.architecture is 'qwen9'; supported architectures"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 10**12}, "llama.block_count is 1000000000000"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8; expected 0"),
        ({"llama.vocab_size": None}, "llama.vocab_size is None; expected a whole number"),
        ({"llama.rope.freq_base": "x"}, "llama.rope.freq_base is 'x'"),
    ],
)
def test_refused_gguf(change, expected):
    metadata = {"general.architecture": "llama"} | SPECS["llama"].config_to_gguf(preset_config("tiny-llama"))
    assert from_gguf(metadata).num_layers == 2
    with pytest.raises(CheckpointError) as caught:
        from_gguf(metadata | change)
    assert str(caught.value).startswith("m.gguf: ") and expected in str(caught.value)


def test_gguf_vocabulary_size_and_ends():
    metadata = {"general.architecture": "llama"} | SPECS["llama"].config_to_gguf(preset_config("tiny-llama"))
    metadata |= {
        "llama.vocab_size": None,
        "tokenizer.ggml.tokens": ["a"] * 77,
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6,
    }
    found = from_gguf(metadata, frozenset({"output.weight", "blk.0.attn_q.bias"}))
    assert (found.vocab_size, found.eos_token_ids) == (77, (5, 6))
    assert not found.tie_embeddings and found.qkv_bias and not found.o_bias


def test_every_hugging_face_type_is_known():
    assert set(HF_MODEL_TYPES) == {"llama", "gemma3", "gemma3_text"}
