"""What the golden answers of llama.cpp (gguf.json) are answers to: inputs by seed, tiny models by shape."""

from __future__ import annotations

import hashlib
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.compress.gguf import gguf_formats
from ridgeline.models.load import LoadedModel
from ridgeline.models.registry import expected_shapes
from ridgeline.models.synth import preset_config, synthesize
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

GOLDEN = Path(__file__).parent / "gguf.json"
ENCODERS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
MIXES = (
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q5_K_S", "Q5_K_M", "Q4_K_S", "Q4_K_M"),
    *("Q3_K_S", "Q3_K_M", "Q3_K_L", "Q2_K"),
)
FILE_MIXES = ("Q4_K_M", "Q5_K_S", "Q3_K_M", "Q2_K", "Q4_0")

_SMALL = {"vocab_size": 512, "head_dim": 16, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 64}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("tiny-llama", {"hidden_size": 256, "num_layers": 9, "intermediate_size": 512, "num_heads": 8}),
    "every head its own keys": ("tiny-llama", {"hidden_size": 256, "num_layers": 5, "num_kv_heads": 4}),
    "tied, 288 columns": ("tiny-gemma3", {"hidden_size": 288, "intermediate_size": 512, "num_layers": 18}),
    "tied, 512 columns": ("tiny-gemma3", {"hidden_size": 512, "num_layers": 4}),
    "80 columns": ("tiny-llama", {"hidden_size": 80, "intermediate_size": 336, "tie_embeddings": True}),
    "80 layers": ("tiny-llama", {"hidden_size": 256, "num_layers": 80} | _SMALL),
    "like SmolLM2": (
        "tiny-llama",
        {"hidden_size": 576, "intermediate_size": 1536, "num_layers": 30} | _SMALL,
    ),
}
FILE_SHAPE = "untied"


def model_of(shape: str) -> LoadedModel:
    """Only the description."""
    like, overrides = SHAPES[shape]
    config = preset_config(like, **overrides)
    weights = {name: Weight(name, FORMATS["F32"], s, {}) for name, s in expected_shapes(config).items()}
    if config.tie_embeddings:
        weights["lm_head"] = weights["embed_tokens"]
    return LoadedModel(config, weights, None)


def write_float_model(shape: str, path: Path) -> Path:
    like, overrides = SHAPES[shape]
    return synthesize(like, "F32", path=path, seed=7, **overrides)


def formats_of(shape: str, mix: str) -> dict[str, str]:
    model = model_of(shape)
    return runs(
        {
            name: fmt.name
            for name, fmt in gguf_formats(model, mix).items()
            if "lm_head" not in name or not model.config.tie_embeddings
        }
    )


def runs(formats: dict[str, str]) -> dict[str, str]:
    """Formats by canonical name -> by stem: "Q6_K*3 Q4_K" for four layers. Vectors are left out."""
    by_stem: dict[str, list[str]] = {}
    for name in sorted(formats, key=lambda n: int(n.split(".")[1]) if n.startswith("layers.") else -1):
        stem = name.split(".", 2)[-1]
        if stem.endswith(("_proj", "lm_head", "embed_tokens")):
            by_stem.setdefault(stem, []).append(formats[name])
    return {
        stem: " ".join(f"{name}*{len(list(same))}" for name, same in groupby(found))
        for stem, found in by_stem.items()
    }


def encoder_rows() -> np.ndarray:
    """float32 [264, 768]: ordinary, heavy-tailed, wide, of few values, sparse, constant, of one sign, tiny."""
    rng = np.random.default_rng(11)
    rows = (rng.standard_normal((264, 768)) * 0.02).astype(np.float32)
    rows[40:80] = rng.standard_t(3, (40, 768)) * 0.02
    rows[80:120] *= np.exp2(rng.integers(-30, 12, (40, 1))).astype(np.float32)
    rows[120:160] = rng.integers(-8, 8, (40, 768))
    rows[160:200] = rng.integers(-31, 32, (40, 768)) / 8
    rows[200:240] *= rng.random((40, 768)) < 0.05
    # A zero of either sign gives a scale whose sign the gguf package and ggml store differently.
    rows += np.float32(0)
    rows[240:252] = np.array([0.37, -0.37, 3, -3, 1e-5, -1e-5, 0, 1, -1, 2, -2, 5], np.float32)[:, None]
    rows[242:244, ::2] *= -1
    rows[252:256] = np.abs(rows[252:256])
    rows[256:260] = -5 - np.abs(rows[256:260])
    rows[260] *= 1e-14
    rows[261] *= 1e-20
    rows[262] = np.arange(768) - 384
    rows[263, 100:] = 0
    return np.ascontiguousarray(rows)


def importances() -> dict[str, np.ndarray | None]:
    """float32 [768]: none, uneven, with zeros (a whole super-block of them), over 40 powers of two."""
    rng = np.random.default_rng(12)
    holes = rng.gamma(0.5, 1, 768) * (rng.random(768) < 0.7)
    holes[256:512] = 0
    return {
        "none": None,
        "uneven": rng.gamma(0.3, 1, 768).astype(np.float32),
        "holes": holes.astype(np.float32),
        "wide": np.exp2(rng.integers(-20, 20, 768)).astype(np.float32),
    }


def file_importance() -> dict[str, np.ndarray]:
    """By canonical name, for the model of FILE_SHAPE."""
    rng = np.random.default_rng(13)
    return {
        name: rng.gamma(0.5, 1, weight.shape[-1]).astype(np.float32)
        for name, weight in sorted(model_of(FILE_SHAPE).weights.items())
        if len(weight.shape) == 2
    }


def digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
