"""All ranks compute what one process computes: float64, every architecture, every way to cut a model.

Ranks are threads with collectives of numpy (tests/ranks.py), so what is tested is the cutting of the weights and
the decoder of a shard, and that a rank's Program tells exactly how many bytes it exchanges.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ridgeline.config import EngineConfig, LoadConfig
from ridgeline.engine.executors.compiled import CompiledExecutor
from ridgeline.engine.executors.eager import EagerExecutor
from ridgeline.engine.executors.native import NativeExecutor
from ridgeline.engine.memory import cache_of_rank, plan_cache
from ridgeline.models.decoder import record_decoder
from ridgeline.models.shard import shard_model
from ridgeline.models.surgery import change_config, change_kv_heads
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.emulate import make_weight
from ridgeline.ops.program import StepShape
from tests.ranks import Ranks
from tests.tiny import ARCHITECTURES, model_of, tiny_config, tiny_model

PARALLEL = ((2, 1), (3, 1), (4, 1), (1, 2), (2, 2))
"""tp_size, pp_size; llama and sinks have two layers."""
EXECUTORS = {"eager": EagerExecutor, "compiled": CompiledExecutor, "native": NativeExecutor}


def quantized_model(format, **sizes):
    """Random matrices in any format; vectors as they are."""
    config = tiny_config("llama", **({"hidden_size": 64} | sizes))
    model = model_of(replace(config, rope=replace(config.rope, rotary_dim=config.head_dim)))
    rng = np.random.default_rng(3)
    weights = {
        name: make_weight(name, *w.shape, format=format, rng=rng, std=1.5 / w.shape[1] ** 0.5)
        if len(w.shape) == 2
        else w
        for name, w in model.weights.items()
    }
    return replace(model, weights=weights)


def load_options_of(model, load):
    """What `load_model` does to a file."""
    config = change_config(model.config, load)
    sizes = {"current": model.config.num_kv_heads, "wanted": config.num_kv_heads}
    weights = {
        name: change_kv_heads(w, **sizes) if ".k_proj" in name or ".v_proj" in name else w
        for name, w in model.weights.items()
    }
    return replace(model, config=config, weights=weights)


@functools.cache
def ragged_steps(vocab_size: int, block_size: int = 32):
    """Three steps of two sequences: chunks of prompts, a chunk beside a decode row, two decode rows.

    Contexts grow longer than every window; the middle step has no logits for its chunk.
    """
    rng = np.random.default_rng(5)
    lengths = [(((0, 45, 0), (0, 7, 1))), (((45, 30, 0), (7, 1, 1))), (((75, 1, 1), (8, 1, 1)))]
    blocks = ((3, 1, 4), (0,))
    return [
        ForwardBatch.from_rows(
            [
                Row([int(i) for i in rng.integers(0, vocab_size, new)], start, blocks[s], num_logits)
                for s, (start, new, num_logits) in enumerate(step)
            ],
            block_size=block_size,
        )
        for step in lengths
    ]


def resolved(model, **options):
    options = {"max_model_len": 160, "kv_cache_tokens": 8 * 32, "max_num_seqs": 4, "num_threads": 1} | options
    config = EngineConfig.from_options("tiny", **options).resolve(model.config, unavailable={})
    return config, plan_cache(config, model.config)


def logits_alone(model, **options):
    config, layout = resolved(model, **options)
    executor = EXECUTORS[config.executor](config, model, layout)
    return [executor.forward(batch).copy() for batch in ragged_steps(model.config.vocab_size)]


def logits_of_ranks(model, tp_size, pp_size, **options):
    """Logits of each rank of the last stage, and the group."""
    config, layout = resolved(model, **options)
    ranks = Ranks(tp_size, pp_size)

    def run(rank):
        shard = shard_model(model, ranks.places[rank])
        executor = EXECUTORS[config.executor](
            config, shard, cache_of_rank(layout, shard.config), ranks.collectives[rank]
        )
        return [executor.forward(batch).copy() for batch in ragged_steps(model.config.vocab_size)]

    found = ranks.run(run)
    for place, logits in zip(ranks.places, found, strict=True):
        if not place.is_last_stage:
            assert [x.shape[1] for x in logits] == [0] * len(logits)
    return [x for place, x in zip(ranks.places, found, strict=True) if place.is_last_stage], ranks


def check(model, tp_size, pp_size, *, tolerance, **options):
    expected = logits_alone(model, **options)
    found, ranks = logits_of_ranks(model, tp_size, pp_size, **options)
    for of_rank in found:
        for step, (x, y) in enumerate(zip(of_rank, expected, strict=True)):
            assert x.dtype == y.dtype and x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=f"step {step}")
            np.testing.assert_array_equal(x.argmax(-1), y.argmax(-1))
            np.testing.assert_array_equal(x, found[0][step])  # the same bits on all ranks
    return ranks


@pytest.mark.parametrize(("tp_size", "pp_size"), PARALLEL)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_float64_logits_are_those_of_one_process(name, tp_size, pp_size):
    check(tiny_model(name), tp_size, pp_size, tolerance=1e-11, executor="eager", dtype="float64")


def test_three_stages():
    check(tiny_model("gemma3"), 1, 3, tolerance=1e-11, executor="eager", dtype="float64")
    check(tiny_model("gemma3"), 2, 3, tolerance=1e-11, executor="eager", dtype="float64")


def test_a_rank_for_each_query_head():
    check(tiny_model("llama"), 6, 1, tolerance=1e-11, executor="eager", dtype="float64")


def test_biases_of_the_output_are_added_once():
    model = model_of(tiny_config("llama", o_bias=True))
    for tp_size, pp_size in ((2, 1), (3, 2)):
        check(model, tp_size, pp_size, tolerance=1e-11, executor="eager", dtype="float64")


def test_load_options_and_an_int8_cache():
    load = LoadConfig(sliding_window=24, num_sinks=2, num_kv_heads=6)
    model = load_options_of(tiny_model("llama"), load)
    check(model, 4, 1, tolerance=1e-11, executor="eager", dtype="float64")
    options = {"executor": "eager", "dtype": "float64", "kv_cache_dtype": "int8"}
    check(tiny_model("sinks"), 2, 2, tolerance=1e-11, **options)


@pytest.mark.parametrize("format", ["Q4_0", "Q8_0", "INT4_G32", "INT8_G16_SYM", "F16"])
def test_quantized_weights_are_cut_at_their_blocks(format):
    """Dequantized, the parts hold the very numbers of the whole."""
    model = quantized_model(format, num_heads=6, num_kv_heads=3, head_dim=32, intermediate_size=192)
    check(model, 2, 1, tolerance=1e-11, executor="eager", dtype="float64")
    check(model, 3, 2, tolerance=1e-11, executor="eager", dtype="float64")


def test_k_quants_where_their_super_blocks_fit():
    sizes = {"hidden_size": 256, "intermediate_size": 768}
    model = quantized_model("Q4_K", num_heads=8, num_kv_heads=2, head_dim=64, **sizes)
    check(model, 2, 1, tolerance=1e-11, executor="eager", dtype="float64")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_other_dtypes_are_as_near_as_they_are(dtype, tolerance):
    model = tiny_model("llama")
    expected = logits_alone(model, executor="eager", dtype=dtype)
    found, _ = logits_of_ranks(model, 2, 2, executor="eager", dtype=dtype)
    for x, y in zip(found[0], expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2)])
def test_compiled(tp_size, pp_size):
    torch._dynamo.reset()  # it keeps the graphs of a few executors only
    check(tiny_model("llama"), tp_size, pp_size, tolerance=1e-11, executor="compiled", dtype="float64")


@pytest.mark.parametrize(("tp_size", "pp_size"), PARALLEL)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_native(name, tp_size, pp_size):
    check(tiny_model(name), tp_size, pp_size, tolerance=2e-3, executor="native")


@pytest.mark.parametrize(("executor", "dtype", "size"), [("eager", "float64", 8), ("native", None, 4)])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(3, 1), (1, 2), (2, 2)])
def test_the_program_tells_the_bytes_exchanged(tp_size, pp_size, executor, dtype, size):
    """Exactly, for every rank: a chunk without logits, and rows that have some."""
    model = tiny_model("llama")
    _, ranks = logits_of_ranks(model, tp_size, pp_size, executor=executor, dtype=dtype)
    shapes = [StepShape(((45, 45), (7, 7)), 1), StepShape(((30, 75), (1, 8)), 1), StepShape.decode(2, 76)]
    for place, collectives in zip(ranks.places, ranks.collectives, strict=True):
        shard = shard_model(model, place)
        program = record_decoder(shard.config, shard.weights, max_model_len=160, shard=shard.shard)
        predicted = sum(program.communication_bytes(shape, element_size=size) for shape in shapes)
        assert predicted == collectives.num_bytes.total() > 0
        tokens, hidden = sum(shape.num_tokens for shape in shapes), model.config.hidden_size
        num_layers, logits = shard.config.num_layers, sum(shape.num_logits for shape in shapes)
        sums = 2 * num_layers + place.is_first_stage if tp_size > 1 else 0
        links = (not place.is_first_stage) + (not place.is_last_stage)
        by_hand = tokens * hidden * (sums + links)
        if tp_size > 1 and place.is_last_stage:
            by_hand += logits * model.config.vocab_size
        assert predicted == size * by_hand
