"""Load options: KV heads repeated exactly or pooled, windows and sinks, and which values are impossible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ridgeline.config import EngineConfig, LoadConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.load import load_model
from ridgeline.models.surgery import change_config, possible_kv_heads
from ridgeline.models.synth import preset_config, synthesize
from ridgeline.sampling_params import SamplingParams

SHAPE = {"num_heads": 12, "num_kv_heads": 4, "num_layers": 1, "qkv_bias": True}
KV_WEIGHTS = [f"layers.0.{p}_proj{suffix}" for p in "kv" for suffix in ("", ".bias")]


@pytest.fixture(scope="module", params=["F32", "Q4_1", "Q8_0"])
def path(request, tmp_path_factory):
    return synthesize("tiny-llama", request.param, path=tmp_path_factory.mktemp("m") / "m.gguf", **SHAPE)


def heads(weight, num_heads):
    return weight.dequantize().reshape(num_heads, 16, *weight.shape[1:])


def test_repeated_heads_keep_their_bytes(path):
    before, after = load_model(path), load_model(path, LoadConfig(num_kv_heads=12))
    assert after.config == replace(before.config, num_kv_heads=12)
    for name in before.weights:
        old, new = before.weights[name], after.weights[name]
        assert old.format is new.format
        if name not in KV_WEIGHTS:
            np.testing.assert_array_equal(old.data, new.data)
            continue
        assert new.shape == (12 * 16, *old.shape[1:])
        for head in range(12):  # query head h reads KV head h // 3 before, and its own copy after
            np.testing.assert_array_equal(heads(new, 12)[head], heads(old, 4)[head // 3])


@pytest.mark.parametrize("wanted", [2, 1])
def test_pooled_heads_are_the_mean(path, wanted):
    before, after = load_model(path), load_model(path, LoadConfig(num_kv_heads=wanted))
    assert after.config.num_kv_heads == wanted
    for name in KV_WEIGHTS:
        old, new = before.weights[name], after.weights[name]
        assert new.format.name == "F32" and new.name == name
        for head in range(wanted):
            group = heads(old, 4)[head * 4 // wanted : (head + 1) * 4 // wanted]
            np.testing.assert_allclose(heads(new, wanted)[head], group.mean(axis=0), rtol=1e-5, atol=1e-7)


def test_the_same_number_changes_nothing(path):
    model = load_model(path, LoadConfig(num_kv_heads=4))
    assert model.config == load_model(path).config
    assert model.weights["layers.0.v_proj"].format is load_model(path).weights["layers.0.v_proj"].format


def test_possible_kv_heads():
    assert possible_kv_heads(preset_config("tiny-llama", **SHAPE)) == [1, 2, 4, 12]
    nine_of_three = preset_config("tiny-llama", num_heads=9, num_kv_heads=3)
    assert possible_kv_heads(nine_of_three) == [1, 3, 9]


@pytest.mark.parametrize("wanted", [0, 3, 5, 6, 8, 24, -1, True, 2.0, "4"])
def test_impossible_kv_heads(wanted):
    config = preset_config("tiny-llama", **SHAPE)
    with pytest.raises(ConfigError, match=r"12 query and 4 KV heads; possible: 1, 2, 4, 12"):
        change_config(config, LoadConfig(num_kv_heads=wanted))


def test_window_and_sinks():
    config = preset_config("tiny-llama", num_layers=3)
    changed = change_config(config, LoadConfig(sliding_window=7, num_sinks=2))
    assert changed == replace(config, sliding_window=7, window_layers=(0, 1, 2), num_sinks=2)
    assert changed.window_is_global


@pytest.mark.parametrize(
    ("like", "load", "expected"),
    [
        ("tiny-llama", LoadConfig(sliding_window=0), "sliding_window=0: expected at least 1 token"),
        ("tiny-llama", LoadConfig(sliding_window=True), "sliding_window=True: expected at least 1 token"),
        (
            "tiny-llama",
            LoadConfig(num_sinks=4),
            "num_sinks=4: expected 0 or more, together with sliding_window",
        ),
        ("tiny-llama", LoadConfig(sliding_window=8, num_sinks=-1), "num_sinks=-1: expected 0 or more"),
        ("tiny-gemma3", LoadConfig(sliding_window=8), "the layers of gemma3 have windows"),
        ("tiny-llama", LoadConfig(rope_scaling={"rope_type": "yarn"}), "needs a factor"),
    ],
)
def test_impossible_options(like, load, expected):
    with pytest.raises(ConfigError, match=expected):
        change_config(preset_config(like), load)


def test_rope_scaling_starts_from_the_plain_rope():
    config = preset_config("llama-1b")
    changed = change_config(config, LoadConfig(rope_scaling={"rope_type": "yarn", "factor": 2.0})).rope
    assert changed == replace(
        preset_config("llama-7b").rope, theta=500000.0, rotary_dim=64, rope_type="yarn", factor=2.0
    )


def answer(path, num_kv_heads):
    """Greedy tokens, the logprobs of all tokens at every position, and the cache's bytes per token."""
    options = {"executor": "eager", "dtype": "float64", "kv_cache_tokens": 128, "max_model_len": 96}
    config = EngineConfig.from_options(str(path), **options, num_kv_heads=num_kv_heads)
    engine = LLMEngine.from_config(config)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=512, prompt_logprobs=512)
    engine.add_request({"prompt_token_ids": list(range(5, 45))}, params)
    finished = []
    while engine.has_unfinished:
        finished += [output for output in engine.step() if output.finished]
    engine.close()
    (output,) = finished
    (choice,) = output.outputs
    rows = [row for row in (*output.prompt_logprobs, *choice.logprobs) if row is not None]
    logprobs = np.array([[row[i].logprob for i in range(512)] for row in rows])
    return choice.token_ids, logprobs, CacheLayout.bytes_per_token(engine.model.config, "float64")


def test_repeated_heads_compute_the_same(path):
    tokens, logprobs, bytes_per_token = answer(path, None)
    assert logprobs.shape == (39 + 8, 512)
    repeated_tokens, repeated_logprobs, repeated_bytes = answer(path, 12)
    assert repeated_tokens == tokens and repeated_bytes == 3 * bytes_per_token
    # The weights are equal (above), but BLAS may sum a matrix of more rows in another order: a few ulp.
    np.testing.assert_allclose(repeated_logprobs, logprobs, rtol=0, atol=1e-13)


def test_pooled_heads_compute_something_else(path):
    _, logprobs, bytes_per_token = answer(path, None)
    _, pooled_logprobs, pooled_bytes = answer(path, 1)
    assert 4 * pooled_bytes == bytes_per_token
    assert np.abs(pooled_logprobs[:30] - logprobs[:30]).mean() > 1e-3
