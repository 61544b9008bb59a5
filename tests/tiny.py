"""Seeded tiny models, made in memory: every feature of each architecture, vocabulary of 97 tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ridgeline.config import LoadConfig, ModelConfig, RopeConfig
from ridgeline.models.load import LoadedModel
from ridgeline.models.registry import expected_shapes
from ridgeline.models.surgery import change_config
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "arch": "llama",
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 16,
        "qkv_bias": True,
    },
    "gemma3": {
        "arch": "gemma3",
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 24,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
        "rope_local": RopeConfig(theta=1e4, rotary_dim=24),
        "qk_norm": True,
        "post_norms": True,
        "norm_offset": 1.0,
        "embed_scale": 48**0.5,
        "sliding_window": 20,
        "window_layers": (0, 1),
    },
    "sinks": {
        "arch": "llama",
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
        "sliding_window": 40,
        "window_layers": (0, 1),
        "num_sinks": 4,
    },
}


def tiny_config(name: str, **overrides: Any) -> ModelConfig:
    settings = {
        "hidden_size": 48,
        "intermediate_size": 72,
        "vocab_size": 97,
        "max_position": 256,
        "norm_eps": 1e-5,
        "activation": "silu",
        "tie_embeddings": False,
    } | ARCHITECTURES[name]
    settings.setdefault("rope", RopeConfig(theta=1e4, rotary_dim=settings["head_dim"]))
    return ModelConfig(**(settings | overrides))


@cache
def tiny_model(name: str, seed: int = 0, load: LoadConfig | None = None) -> LoadedModel:
    """Weights large enough that logits spread and no two tokens tie."""
    return model_of(tiny_config(name), seed, load)


def model_of(config: ModelConfig, seed: int = 0, load: LoadConfig | None = None) -> LoadedModel:
    """The same of any config, in float32."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Weight] = {}
    for weight_name, shape in expected_shapes(config).items():
        values = rng.standard_normal(shape) * (1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.2)
        if "norm" in weight_name:
            values += 1.0 - config.norm_offset
        weights[weight_name] = Weight(weight_name, FORMATS["F32"], shape, {"data": values.astype(np.float32)})
    if config.tie_embeddings:
        weights["lm_head"] = weights["embed_tokens"]
    return LoadedModel(change_config(config, load or LoadConfig()), weights, None)
