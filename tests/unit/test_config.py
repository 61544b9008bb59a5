"""EngineConfig: flat options, resolution of None, and refusals that say what to do."""

from __future__ import annotations

import pytest

from ridgeline.config import EngineConfig, ModelConfig, RopeConfig
from ridgeline.errors import ConfigError

MODEL = ModelConfig(
    arch="llama",
    num_layers=2,
    hidden_size=32,
    intermediate_size=64,
    vocab_size=100,
    max_position=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    activation="silu",
    tie_embeddings=True,
    rope=RopeConfig(theta=1e4, rotary_dim=8),
)


def resolve(unavailable=None, **options):
    return EngineConfig.from_options("m", **options).resolve(MODEL, unavailable=unavailable or {})


def test_options_reach_their_group():
    config = EngineConfig.from_options("m", max_num_seqs=4, block_size=64, num_sinks=2, seed=7)
    assert (config.scheduler.max_num_seqs, config.cache.block_size) == (4, 64)
    assert (config.load.num_sinks, config.seed) == (2, 7)


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown engine option 'blocksize'.*block_size"):
        EngineConfig.from_options("m", blocksize=3)


def test_nothing_is_left_open():
    config = resolve()
    assert (config.executor, config.device, config.dtype, config.attention) == (
        "native",
        "cpu",
        None,  # matrices as the file stores them
        "flash",
    )
    assert (config.cache.block_size, config.cache.kv_cache_dtype) == (32, "float16")
    eager = resolve(executor="eager")
    assert (eager.dtype, eager.attention, eager.cache.kv_cache_dtype) == ("float32", "sdpa", "float32")
    assert config.cache.enable_prefix_caching
    assert config.scheduler.enable_chunked_prefill
    assert (config.max_model_len, config.scheduler.max_num_batched_tokens) == (256, 512)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float64"}, {"attention": "sdpa"}, {"kv_cache_dtype": "bfloat16"}, {"device": "cuda"}],
)
def test_settings_that_native_cannot_honour_choose_eager(options):
    assert resolve(**options).executor == "eager"
    with pytest.raises(ConfigError, match=f"native.*{next(iter(options))}"):
        resolve(executor="native", **options)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"attention": "naive"}, {"kv_cache_dtype": "int8"}, {"dtype": "float32"}],
)
def test_settings_that_native_honours(options):
    assert resolve(**options).executor == "native"


def test_without_any_executor_the_reasons_are_given():
    with pytest.raises(ConfigError, match="native: no compiler.*eager: no torch"):
        resolve(unavailable={"native": "no compiler", "eager": "no torch", "compiled": "no torch"})


def test_no_cache_turns_off_what_needs_one():
    config = resolve(kv_cache=False)
    assert not config.cache.enable_prefix_caching
    assert not config.scheduler.enable_chunked_prefill
    assert config.scheduler.max_num_batched_tokens == 256


def test_contiguous_is_one_block_per_request():
    config = resolve(kv_layout="contiguous", max_model_len=100)
    assert config.cache.block_size == 128
    assert not config.cache.enable_prefix_caching


def test_no_batching_is_one_request():
    assert resolve(batching="none").scheduler.max_num_seqs == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache": False, "enable_prefix_caching": True}, "enable_prefix_caching needs"),
        ({"kv_cache": False, "enable_chunked_prefill": True}, "enable_chunked_prefill needs"),
        ({"batching": "static", "enable_chunked_prefill": True}, "enable_chunked_prefill needs"),
        ({"kv_layout": "contiguous", "block_size": 32}, "leave block_size out"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 100}, "below max_model_len"),
        ({"block_size": 33}, "multiple of 32"),
        ({"block_size": 0}, "at least 1"),
        ({"max_num_seqs": None}, "at least 1"),
        ({"max_model_len": 2.5}, "whole number"),
        ({"dtype": "fp8"}, "one of 'float64'"),
        ({"kv_cache": None}, "True or False"),
        ({"seed": -1}, "seed"),
        ({"kv_cache_tokens": 64, "kv_cache_memory_bytes": 1}, "give one"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve(**options)
