"""Architectures by the names that files use, and the weights each one must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ridgeline.checkpoint.names import NameTable
from ridgeline.config import ModelConfig
from ridgeline.errors import CheckpointError
from ridgeline.models import gemma3, llama


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What one architecture says about its files."""

    names: NameTable
    gguf_permuted: bool
    config_from_hf: Callable[..., ModelConfig]
    config_from_gguf: Callable[..., ModelConfig]
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    config_to_gguf: Callable[[ModelConfig], dict[str, Any]]


SPECS: dict[str, ModelSpec] = {
    name: ModelSpec(
        module.NAMES,
        module.GGUF_PERMUTED,
        module.config_from_hf,
        module.config_from_gguf,
        module.config_to_hf,
        module.config_to_gguf,
    )
    for name, module in (("llama", llama), ("gemma3", gemma3))
}
"""By `ModelConfig.arch`, which is also the name in GGUF files."""
HF_MODEL_TYPES: dict[str, ModelSpec] = SPECS | {"gemma3_text": SPECS["gemma3"]}


def spec_for(kind: str, metadata: Mapping[str, Any], *, file: str) -> ModelSpec:
    """The spec of a checkpoint of kind "hf" or "gguf"; an unknown architecture lists the known ones."""
    key, known = ("model_type", HF_MODEL_TYPES) if kind == "hf" else ("general.architecture", SPECS)
    name = metadata.get(key)
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"{file}: {key} is {name!r:.80}; supported architectures: {', '.join(known)}")
    return known[name]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape (out x in) of every weight by canonical name; a tied lm_head is not listed."""
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_norm": (hidden,),
        "q_proj": (q_size, hidden),
        "k_proj": (kv_size, hidden),
        "v_proj": (kv_size, hidden),
        "o_proj": (hidden, q_size),
        "mlp_norm": (hidden,),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    if config.qkv_bias:
        layer |= {"q_proj.bias": (q_size,), "k_proj.bias": (kv_size,), "v_proj.bias": (kv_size,)}
    if config.o_bias:
        layer |= {"o_proj.bias": (hidden,)}
    if config.qk_norm:
        layer |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}
    if config.post_norms:
        layer |= {"post_attn_norm": (hidden,), "post_mlp_norm": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (config.vocab_size, hidden), "norm": (hidden,)}
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes
