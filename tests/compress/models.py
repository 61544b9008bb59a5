"""Tiny models whose rows divide by the usual group sizes, and tokens for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ridgeline.compress.calibration import Calibration
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.models.load import LoadedModel
from ridgeline.models.registry import expected_shapes
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight
from tests.tiny import tiny_config

NUM_TOKENS = 64


def make_model(name: str, seed: int = 0, **overrides: Any) -> LoadedModel:
    """The architectures of tests.tiny (llama: GQA with biases) with 64 hidden and 128 intermediate features.

    Some inputs are much larger than others, as in trained models: scales have something to do.
    """
    config = tiny_config(name, **({"hidden_size": 64, "intermediate_size": 128} | overrides))
    rng = np.random.default_rng(seed)
    weights: dict[str, Weight] = {}
    for weight_name, shape in expected_shapes(config).items():
        values = rng.standard_normal(shape) * (1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.2)
        if "norm" in weight_name:
            values += np.exp(0.7 * rng.standard_normal(shape)) - config.norm_offset
        weights[weight_name] = Weight(weight_name, FORMATS["F32"], shape, {"data": values.astype(np.float32)})
    if config.tie_embeddings:
        weights["lm_head"] = weights["embed_tokens"]
    return LoadedModel(config, weights, None)


def make_calibration(num_samples: int = 6, length: int = NUM_TOKENS, seed: int = 0) -> Calibration:
    tokens = np.random.default_rng(seed).integers(0, 97, (num_samples, length))
    return Calibration(tokens.tolist(), seed)


def eager_logits(model: LoadedModel, windows: list[list[int]], *, dtype: str = "float64") -> np.ndarray:
    """[windows, length, V] by the eager executor, one window at a time."""
    options = {"executor": "eager", "max_model_len": 256, "max_num_seqs": 1, "dtype": dtype}
    engine = LLMEngine(EngineConfig.from_options("tiny", **options), model, None)
    block_size = engine.layout.block_size
    rows = []
    for window in windows:
        blocks = range(-(-len(window) // block_size))
        batch = ForwardBatch.from_rows([Row(window, 0, blocks, len(window))], block_size=block_size)
        rows.append(engine.executor.forward(batch).copy())
    return np.stack(rows)
