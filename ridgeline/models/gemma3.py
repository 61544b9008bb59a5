"""Gemma 3 (text): how its files state a ModelConfig, and how a ModelConfig is stated in them.

It differs from Llama in almost everything: a sixth of the layers sees all tokens and the others a window with
their own RoPE base, queries and keys are normed, norms surround each block, embeddings are scaled by sqrt(C).
Norms multiply by 1 + w in Hugging Face files; GGUF files store 1 + w already.
Gemma team 2025, arXiv:2503.19786.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ridgeline.checkpoint.names import GEMMA3
from ridgeline.config import ModelConfig, RopeConfig
from ridgeline.errors import CheckpointError
from ridgeline.models.fields import MAX_LAYERS, Fields, gguf_rope, hf_rope, rope_to_gguf
from ridgeline.models.rope import rope_to_hf

NAMES = GEMMA3
GGUF_PERMUTED = False
LAYERS_PER_FULL = 6
"""Every sixth layer attends to everything."""
NUM_LAYERS_27B = 62
THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
LOCAL, FULL = "sliding_attention", "full_attention"


def window_layers(num_layers: int, every: int = LAYERS_PER_FULL) -> tuple[int, ...]:
    """All but every sixth layer."""
    return tuple(i for i in range(num_layers) if (i + 1) % every)


def config_from_hf(config: Mapping[str, Any], *, file: str) -> ModelConfig:
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise CheckpointError(f"{file}: text_config is {text!r:.80}; expected an object")
    # What generation_config.json says about eos is beside text_config.
    text = {**text, "eos_token_id": config.get("eos_token_id", text.get("eos_token_id"))}
    fields = Fields(text, file)
    hidden_size, head_dim = fields.integer("hidden_size"), fields.integer("head_dim", 256)
    num_layers = fields.integer("num_hidden_layers", most=MAX_LAYERS)
    fields.must_be("hidden_activation", "gelu_pytorch_tanh")
    fields.must_be("attention_bias", False)
    fields.must_be("use_bidirectional_attention", False)
    fields.must_be("final_logit_softcapping", None)
    fields.must_be("attn_logit_softcapping", None)
    windowed = window_layers(num_layers, fields.integer("sliding_window_pattern", LAYERS_PER_FULL))
    kinds = fields.get("layer_types", [LOCAL if i in windowed else FULL for i in range(num_layers)])
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(k in (LOCAL, FULL) for k in kinds):
        raise fields.wrong("layer_types", f"{num_layers} times {LOCAL} or {FULL}")
    return ModelConfig(
        arch="gemma3",
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size", 262208),
        max_position=fields.integer("max_position_embeddings", 131072),
        num_heads=fields.integer("num_attention_heads", 8),
        num_kv_heads=fields.integer("num_key_value_heads", 4),
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation="gelu_tanh",
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        rope=hf_rope(fields, RopeConfig(theta=THETA, rotary_dim=head_dim), kind=FULL),
        rope_local=hf_rope(
            fields,
            RopeConfig(theta=LOCAL_THETA, rotary_dim=head_dim),
            kind=LOCAL,
            theta_key="rope_local_base_freq",
        ),
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embed_scale=math.sqrt(hidden_size),
        attn_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        sliding_window=fields.integer("sliding_window", 4096),
        window_layers=tuple(i for i, kind in enumerate(kinds) if kind == LOCAL),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    assert config.attn_scale is not None and config.rope_local is not None
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {
            FULL: rope_to_hf(config.rope, head_dim=config.head_dim),
            LOCAL: rope_to_hf(config.rope_local, head_dim=config.head_dim),
        },
        "query_pre_attn_scalar": round(config.attn_scale**-2),
        "sliding_window": config.sliding_window,
        "layer_types": [LOCAL if i in config.window_layers else FULL for i in range(config.num_layers)],
        "eos_token_id": list(config.eos_token_ids),
    }


def config_from_gguf(metadata: Mapping[str, Any], *, file: str, tensors: frozenset[str]) -> ModelConfig:
    fields = Fields(metadata, file, prefix="gemma3.")
    hidden_size, head_dim = fields.integer("embedding_length"), fields.integer("attention.key_length", 256)
    num_layers = fields.integer("block_count", most=MAX_LAYERS)
    num_heads = fields.integer("attention.head_count")
    rope = gguf_rope(fields, RopeConfig(theta=THETA, rotary_dim=head_dim))
    fields.must_be("final_logit_softcapping", None)
    # The file does not state the scale. llama.cpp takes the head dimension, but for the largest model.
    query_scalar = hidden_size / num_heads if num_layers == NUM_LAYERS_27B else head_dim
    every = fields.integer("attention.sliding_window_pattern", LAYERS_PER_FULL)
    return ModelConfig(
        arch="gemma3",
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        vocab_size=fields.gguf_vocab_size(),
        max_position=fields.integer("context_length"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv"),
        head_dim=head_dim,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        activation="gelu_tanh",
        tie_embeddings="output.weight" not in tensors,
        rope=rope,
        rope_local=RopeConfig(
            theta=fields.number("rope.freq_base_swa", LOCAL_THETA), rotary_dim=rope.rotary_dim
        ),
        qk_norm=True,
        post_norms=True,
        embed_scale=math.sqrt(hidden_size),
        attn_scale=query_scalar**-0.5,
        sliding_window=fields.integer("attention.sliding_window"),
        window_layers=window_layers(num_layers, every),
        eos_token_ids=fields.gguf_eos(),
    )


def config_to_gguf(config: ModelConfig) -> dict[str, Any]:
    """Raises CheckpointError for what a GGUF file of this architecture cannot state."""
    assert config.rope_local is not None
    if config.window_layers != window_layers(config.num_layers) or config.attn_scale != config.head_dim**-0.5:
        raise CheckpointError(
            f"a GGUF file of gemma3 has windows in all but every {LAYERS_PER_FULL}th layer and the "
            "attention scale head_dim**-0.5; other models need a Hugging Face directory"
        )
    metadata = {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": config.rope_local.theta,
        "vocab_size": config.vocab_size,
    }
    return {f"gemma3.{key}": value for key, value in (metadata | rope_to_gguf(config.rope)).items()}
