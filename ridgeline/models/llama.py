"""Llama and its kin (SmolLM2, TinyLlama, ...): how their files state a ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ridgeline.checkpoint.names import LLAMA
from ridgeline.config import ModelConfig, RopeConfig
from ridgeline.models.fields import Fields, gguf_rope, hf_rope

NAMES = LLAMA
GGUF_PERMUTED = True
"""GGUF stores q and k rows for interleaved RoPE; loading puts them back into half-split order."""


def config_from_hf(config: Mapping[str, Any], *, file: str) -> ModelConfig:
    fields = Fields(config, file)
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    fields.must_be("hidden_act", "silu")
    fields.must_be("mlp_bias", False)
    return ModelConfig(
        arch="llama",
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position=fields.integer("max_position_embeddings"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps"),
        activation="silu",
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        rope=hf_rope(fields, head_dim=head_dim, default_theta=10000.0),
        qkv_bias=bool(fields.get("attention_bias", False)),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def config_from_gguf(metadata: Mapping[str, Any], *, file: str, tensors: frozenset[str]) -> ModelConfig:
    fields = Fields(metadata, file, prefix="llama.")
    num_heads, hidden_size = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden_size // num_heads)
    return ModelConfig(
        arch="llama",
        num_layers=fields.integer("block_count"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        vocab_size=fields.vocab_size(),
        max_position=fields.integer("context_length"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        activation="silu",
        tie_embeddings="output.weight" not in tensors,
        rope=gguf_rope(fields, RopeConfig(theta=10000.0, rotary_dim=head_dim)),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        eos_token_ids=fields.gguf_eos(),
    )
