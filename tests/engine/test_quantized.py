"""Models in group formats and with rounded inputs: the same bits every way on native, and what torch computes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.models.load import LoadedModel
from ridgeline.models.registry import expected_shapes
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.packing import kernel_name
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.groups import Groups, pack_groups
from ridgeline.quant.weight import ActivationQuant, Weight
from tests.engine.test_equivalence import WAYS, alone, engine, mixed, run
from tests.tiny import tiny_config

NATIVE = {"executor": "native", "dtype": None, "attention": None}
SCHEMES: dict[str, tuple[int, int | None, bool, ActivationQuant | None]] = {
    "INT4_G32": (4, 32, False, None),
    "INT4 ordered": (4, 32, True, None),
    "INT3": (3, 32, False, None),
    "W8A16": (8, None, False, None),
    "W8A8": (8, None, False, ActivationQuant()),
    "W8A8 static": (8, 32, False, ActivationQuant(static_scale=0.03)),
    "W4A8 ordered": (4, 32, True, ActivationQuant()),
    "LLM.int8": (8, None, False, ActivationQuant(outlier_threshold=1.5)),
}
"""Bits, group size (None: the row), columns in an order of their own, rounding of the input."""


def rtn(name: str, values: np.ndarray, bits: int, size: int, order: np.ndarray | None) -> Weight:
    """Symmetric round-to-nearest: enough for a model to be one."""
    stored = values if order is None else values[:, order]
    groups = stored.reshape(len(stored), -1, size)
    middle = 1 << (bits - 1)
    scales = (np.abs(groups).max(-1) / (middle - 1)).astype(np.float16).astype(np.float32)
    q = np.clip(np.rint(groups / scales[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
    fmt, rows = pack_groups(Groups(bits, q.reshape(values.shape), scales, None))
    buffers = {"data": rows} if order is None else {"data": rows, "order": order.astype(np.int32)}
    return Weight(name, fmt, values.shape, buffers)


@cache
def quantized_model(scheme: str) -> LoadedModel:
    """Two layers whose every matrix is packed; q, k and v share an order, as one Hessian gives it."""
    bits, size, is_ordered, activation = SCHEMES[scheme]
    config = tiny_config("llama", hidden_size=64, intermediate_size=96)
    rng = np.random.default_rng(5)
    orders = {k: rng.permutation(k) for k in (64, 96)} if is_ordered else {}
    weights: dict[str, Weight] = {}
    for name, shape in expected_shapes(config).items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            values = 0.2 * values + ("norm" in name)
            weights[name] = Weight(name, FORMATS["F32"], shape, {"data": values.astype(np.float32)})
            continue
        values *= 1.5 / shape[1] ** 0.5
        made = rtn(name, values, bits, size or shape[1], orders.get(shape[1]))
        weights[name] = made if name == "embed_tokens" else replace(made, activation=activation)
    return LoadedModel(config, weights, None)


@pytest.mark.parametrize("way", ["batched", "chunked", "preempted", "blocks of 64", "no chunked prefill"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_native_gives_the_same_bits_every_way(scheme, way):
    model = quantized_model(scheme)
    requests = mixed(model)
    assert run(engine(model, **NATIVE, **WAYS[way]), requests) == _alone(scheme)


@pytest.mark.parametrize("scheme", ["INT4 ordered", "W8A8", "LLM.int8"])
def test_threads_and_fusion_change_no_bit(scheme):
    model = quantized_model(scheme)
    requests = mixed(model)
    for options in ({"num_threads": 1}, {"num_threads": 3}, {"fusion": "none"}):
        assert run(engine(model, **NATIVE, **options), requests) == _alone(scheme)


@cache
def _alone(scheme: str):
    model = quantized_model(scheme)
    return alone(model, mixed(model), **NATIVE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_matrix_is_packed(scheme):
    llm = LLMEngine(
        EngineConfig.from_options("tiny", executor="native", max_model_len=128), quantized_model(scheme), None
    )
    names = {kernel_name(w) for w in llm.executor.program.weights if len(w.shape) == 2}
    llm.close()
    assert all(name.startswith("INT") for name in names), names


def logits(model: LoadedModel, **options) -> np.ndarray:
    options = {"max_model_len": 128, "kv_cache_dtype": "float32"} | options
    llm = LLMEngine(EngineConfig.from_options("tiny", **options), model, None)
    row = Row(tuple(range(3, 60)), 0, (1, 0), 57)
    try:
        return np.array(llm.executor.forward(ForwardBatch.from_rows([row], block_size=32)), np.float64)
    finally:
        llm.close()


@pytest.mark.parametrize("scheme", [s for s, (*_, activation) in SCHEMES.items() if activation])
def test_native_rounds_inputs_as_torch_does(scheme):
    """In float64, the definition: float32 may put a code on the other side of a tie, torch's as well as ours."""
    model = quantized_model(scheme)
    exact = {"executor": "eager", "dtype": "float64", "kv_cache_dtype": None}
    expected = logits(model, **exact)
    plain = replace(model, weights={n: replace(w, activation=None) for n, w in model.weights.items()})
    rounding = np.abs(expected - logits(plain, **exact)).mean()
    assert rounding > 1e-3
    assert np.abs(logits(model, executor="native") - expected).mean() < 0.1 * rounding


def test_the_compiled_step_rounds_inputs_too():
    model = quantized_model("LLM.int8")
    eager, compiled = (logits(model, executor=e) for e in ("eager", "compiled"))
    np.testing.assert_allclose(compiled, eager, atol=0.02 * eager.std())
