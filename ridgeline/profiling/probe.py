"""An engine around a tiny model, so that nothing but the engine is left: what a step or a process costs."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from ridgeline.config import EngineConfig, ModelConfig, RopeConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.models.load import LoadedModel
from ridgeline.models.registry import expected_shapes
from ridgeline.ops.emulate import make_weight
from ridgeline.tokenizer import Tokenizer

PROBE_MODEL = ModelConfig(
    arch="llama",
    num_layers=1,
    hidden_size=32,
    intermediate_size=32,
    vocab_size=256,
    max_position=4096,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    norm_eps=1e-5,
    activation="silu",
    tie_embeddings=False,
    rope=RopeConfig(theta=10_000.0, rotary_dim=16),
)


def probe_engine(*, num_threads: int | None, tokenizer: Future[Tokenizer | None] | None) -> LLMEngine:
    """A native engine for up to 16 sequences of 1,024 tokens, with seeded weights."""
    rng = np.random.default_rng(4)
    weights = {
        name: make_weight(name, *shape, format="F32", rng=rng, std=0.1)
        for name, shape in expected_shapes(PROBE_MODEL).items()
    }
    settings = EngineConfig.from_options(
        "probe", executor="native", num_threads=num_threads, max_num_seqs=16, max_model_len=1024
    )
    return LLMEngine(settings, LoadedModel(PROBE_MODEL, weights, None), tokenizer)
