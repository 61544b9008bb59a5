"""Llama and SmolLM2: how their files state a ModelConfig, and how a ModelConfig is stated in them.

Touvron et al. 2023, arXiv:2302.13971. GGUF files of this architecture store the rows of q and k in the
order of interleaved RoPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ridgeline.checkpoint.names import LLAMA
from ridgeline.config import ModelConfig, RopeConfig
from ridgeline.errors import CheckpointError
from ridgeline.models.fields import MAX_LAYERS, Fields, gguf_rope, hf_rope, rope_to_gguf
from ridgeline.models.rope import rope_to_hf

NAMES = LLAMA
GGUF_PERMUTED = True
"""GGUF stores q and k rows for interleaved RoPE; loading puts them back into half-split order."""
THETA = 10000.0


def config_from_hf(config: Mapping[str, Any], *, file: str) -> ModelConfig:
    fields = Fields(config, file)
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = fields.head_dim("head_dim", hidden_size, num_heads)
    fields.must_be("hidden_act", "silu")
    fields.must_be("mlp_bias", False)
    return ModelConfig(
        arch="llama",
        num_layers=fields.integer("num_hidden_layers", most=MAX_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_position=fields.integer("max_position_embeddings"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps"),
        activation="silu",
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        rope=hf_rope(fields, RopeConfig(theta=THETA, rotary_dim=head_dim)),
        qkv_bias=fields.flag("attention_bias", False),
        o_bias=fields.flag("attention_bias", False),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Raises CheckpointError for what a config.json of this architecture cannot state."""
    if config.qkv_bias != config.o_bias:
        raise CheckpointError(
            f"attention_bias is one setting in a config.json: give qkv_bias={config.qkv_bias} and o_bias the "
            "same value, or write a GGUF file"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": rope_to_hf(config.rope, head_dim=config.head_dim),
        "attention_bias": config.qkv_bias,
        "eos_token_id": list(config.eos_token_ids),
    }


def config_from_gguf(metadata: Mapping[str, Any], *, file: str, tensors: frozenset[str]) -> ModelConfig:
    fields = Fields(metadata, file, prefix="llama.")
    num_heads, hidden_size = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.head_dim("attention.key_length", hidden_size, num_heads)
    fields.must_be("expert_count", 0)
    return ModelConfig(
        arch="llama",
        num_layers=fields.integer("block_count", most=MAX_LAYERS),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("feed_forward_length"),
        vocab_size=fields.gguf_vocab_size(),
        max_position=fields.integer("context_length"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        activation="silu",
        tie_embeddings="output.weight" not in tensors,
        rope=gguf_rope(fields, RopeConfig(theta=THETA, rotary_dim=head_dim)),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        eos_token_ids=fields.gguf_eos(),
    )


def config_to_gguf(config: ModelConfig) -> dict[str, Any]:
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
        "vocab_size": config.vocab_size,
    }
    return {f"llama.{key}": value for key, value in (metadata | rope_to_gguf(config.rope)).items()}
