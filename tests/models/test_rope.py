"""What files and users may say about RoPE. That the frequencies equal transformers': test_transformers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ridgeline.config import RopeConfig
from ridgeline.errors import CheckpointError, ConfigError
from ridgeline.models.fields import Fields, gguf_rope, hf_rope, rope_to_gguf
from ridgeline.models.rope import rope_frequencies, rope_from_hf, rope_to_hf

PLAIN = RopeConfig(theta=10000.0, rotary_dim=24)
KINDS = {
    "default": PLAIN,
    "partial": replace(PLAIN, rotary_dim=12, theta=5e5),
    "linear": replace(PLAIN, rope_type="linear", factor=4.0),
    "dynamic": replace(PLAIN, rope_type="dynamic", factor=2.0),
    "yarn": replace(
        PLAIN, rope_type="yarn", factor=4.0, original_max_position=64, beta_fast=24.0, beta_slow=2.0
    ),
    "yarn, factor": replace(
        PLAIN, rope_type="yarn", factor=4.0, original_max_position=64, attention_factor=0.75
    ),
    "yarn, mscale": replace(
        PLAIN, rope_type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=1.2, truncate=False
    ),
    "llama3": replace(PLAIN, rope_type="llama3", factor=8.0, original_max_position=64, low_freq_factor=2.0),
}


@pytest.mark.parametrize("name", KINDS)
def test_rope_parameters_round_trip(name):
    stated = {"rope_parameters": rope_to_hf(KINDS[name], head_dim=24)}
    assert hf_rope(Fields(stated, "config.json"), replace(PLAIN, theta=1.0)) == KINDS[name]


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ("dynamic", "llama3", "yarn, mscale")])
def test_gguf_keys_round_trip(name):
    fields = Fields({f"llama.{k}": v for k, v in rope_to_gguf(KINDS[name]).items()}, "m.gguf", "llama.")
    found = gguf_rope(fields, PLAIN)
    options = {"max_position": 256, "max_model_len": 256}
    ours, factor = rope_frequencies(KINDS[name], **options)
    theirs, their_factor = rope_frequencies(found, **options)
    np.testing.assert_array_equal(ours, theirs)
    assert their_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.freq_base": 5e5}, {"theta": 5e5}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, {}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {}),
    ],
)
def test_gguf_keys_as_llama_cpp_reads_them(keys, expected):
    fields = Fields({f"llama.{k}": v for k, v in keys.items()}, "m.gguf", "llama.")
    assert gguf_rope(fields, PLAIN) == replace(PLAIN, **expected)


def test_what_gguf_cannot_say():
    with pytest.raises(CheckpointError, match="dynamic RoPE; write a Hugging Face directory"):
        rope_to_gguf(KINDS["dynamic"])
    with pytest.raises(
        CheckpointError, match=r"m.gguf: llama.rope.scaling.type is 'longrope'; expected none"
    ):
        gguf_rope(Fields({"llama.rope.scaling.type": "longrope"}, "m.gguf", "llama."), PLAIN)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_older_fields(key):
    config = {"rope_theta": 5e5, "rope_scaling": {key: "linear", "factor": 4.0}, "partial_rotary_factor": 0.5}
    expected = RopeConfig(theta=5e5, rotary_dim=12, rope_type="linear", factor=4.0)
    assert hf_rope(Fields(config, "config.json"), PLAIN) == expected
    assert hf_rope(Fields({"rope_scaling": None}, "config.json"), PLAIN) == PLAIN


def test_kinds_of_layers():
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    }
    old = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    for config in (new, old):
        fields = Fields(config, "config.json")
        full = hf_rope(fields, PLAIN, kind="full_attention")
        local = hf_rope(fields, PLAIN, kind="sliding_attention", theta_key="rope_local_base_freq")
        assert full == replace(PLAIN, theta=1e6, rope_type="linear", factor=8.0)
        assert local == replace(PLAIN, theta=2e4)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "longrope"}, "rope_type='longrope': expected one of default, linear, dynamic, yarn"),
        ({"rope_type": []}, "expected one of default"),
        ({"type": "linear"}, "needs a factor, for example {'rope_type': 'linear', 'factor': 4.0}"),
        ({"rope_type": "linear", "fcator": 2.0}, "unknown RoPE setting 'fcator'; known: rope_type, factor"),
        ({"rope_type": "linear", "factor": "4"}, "factor='4': expected a number above 0"),
        ({"rope_type": "linear", "factor": -1}, "factor=-1: expected a number above 0"),
        ({"rope_type": "linear", "factor": float("nan")}, "expected a number above 0"),
        ({"rope_type": "linear", "factor": float("inf")}, "expected a number above 0"),
        ({"rope_type": "linear", "factor": 10**400}, "expected a number above 0"),
        ({"rope_type": "linear", "factor": True}, "expected a number above 0"),
        ({"rope_theta": 1}, "rope_theta=1: expected a number above 1"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5}, "a number above 1"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate=1: expected true or false"),
        (
            {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0},
            "expected less than high_freq_factor",
        ),
    ],
)
def test_bad_settings(scaling, expected):
    with pytest.raises(ConfigError) as caught:
        rope_from_hf(scaling, PLAIN)
    assert expected in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        hf_rope(Fields({"rope_parameters": scaling}, "config.json"), PLAIN)
    assert str(caught.value).startswith("config.json: ") and expected in str(caught.value)


def test_divisors_are_another_spelling_of_llama3():
    options = {"max_position": 256, "max_model_len": 256}
    plain, _ = rope_frequencies(PLAIN, **options)
    scaled, factor = rope_frequencies(KINDS["llama3"], **options)
    assert (scaled != plain).any() and (scaled == plain).any()
    divided, same = rope_frequencies(replace(PLAIN, freq_divisors=tuple(plain / scaled)), **options)
    np.testing.assert_allclose(divided, scaled, rtol=1e-15)
    assert factor == same == 1.0


def test_only_dynamic_depends_on_the_length_and_only_beyond_the_trained_one():
    for name, rope in KINDS.items():
        short, trained, long = (
            rope_frequencies(rope, max_position=256, max_model_len=n)[0] for n in (64, 256, 1024)
        )
        np.testing.assert_array_equal(short, trained)
        assert (long != trained).any() == (name == "dynamic")
