"""Gemma 3 (text): how its files state a ModelConfig.

It differs from Llama in almost everything: a sixth of the layers sees all tokens and the others a window with
their own RoPE base, queries and keys are normed, norms surround each block, embeddings are scaled by sqrt(C).
Norms multiply by 1 + w in Hugging Face files; GGUF files store 1 + w already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ridgeline.checkpoint.names import GEMMA3
from ridgeline.config import ModelConfig, RopeConfig
from ridgeline.models.fields import Fields, gguf_rope, hf_rope

NAMES = GEMMA3
GGUF_PERMUTED = False
LAYERS_PER_FULL = 6
"""Every sixth layer attends to everything."""
LOCAL_THETA = 10000.0


def config_from_hf(config: Mapping[str, Any], *, file: str) -> ModelConfig:
    fields = Fields(config.get("text_config", config), file)
    hidden_size, head_dim = fields.integer("hidden_size"), fields.integer("head_dim", 256)
    num_layers = fields.integer("num_hidden_layers")
    fields.must_be("hidden_activation", "gelu_pytorch_tanh")
    fields.must_be("attention_bias", False)
    fields.must_be("final_logit_softcapping", None)
    fields.must_be("attn_logit_softcapping", None)
    kinds = fields.get("layer_types", None)
    if kinds is None:
        every = fields.integer("sliding_window_pattern", LAYERS_PER_FULL)
        kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(num_layers)]
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
        tie_embeddings=bool(fields.get("tie_word_embeddings", True)),
        rope=hf_rope(fields, head_dim=head_dim, default_theta=1e6, kind="full_attention"),
        rope_local=hf_rope(
            fields,
            head_dim=head_dim,
            default_theta=LOCAL_THETA,
            kind="sliding_attention",
            theta_key="rope_local_base_freq",
        ),
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        embed_scale=math.sqrt(hidden_size),
        attn_scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
        sliding_window=fields.integer("sliding_window", 4096),
        window_layers=tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention"),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def config_from_gguf(metadata: Mapping[str, Any], *, file: str, tensors: frozenset[str]) -> ModelConfig:
    fields = Fields(metadata, file, prefix="gemma3.")
    hidden_size, head_dim = fields.integer("embedding_length"), fields.integer("attention.key_length", 256)
    num_layers = fields.integer("block_count")
    rope = gguf_rope(fields, RopeConfig(theta=1e6, rotary_dim=head_dim))
    return ModelConfig(
        arch="gemma3",
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        vocab_size=fields.vocab_size(),
        max_position=fields.integer("context_length"),
        num_heads=fields.integer("attention.head_count"),
        num_kv_heads=fields.integer("attention.head_count_kv"),
        head_dim=head_dim,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        activation="gelu_tanh",
        tie_embeddings="output.weight" not in tensors,
        rope=rope,
        rope_local=RopeConfig(theta=LOCAL_THETA, rotary_dim=rope.rotary_dim),
        qk_norm=True,
        post_norms=True,
        embed_scale=math.sqrt(hidden_size),
        # llama.cpp scales by the head dimension for every size but 27B, whose file has 62 layers.
        attn_scale=(hidden_size / fields.integer("attention.head_count") if num_layers == 62 else head_dim) ** -0.5,
        sliding_window=fields.integer("attention.sliding_window"),
        window_layers=tuple(i for i in range(num_layers) if (i + 1) % LAYERS_PER_FULL),
        eos_token_ids=fields.gguf_eos(),
    )
