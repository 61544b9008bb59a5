"""Rotary frequencies of every RoPE kind, fixed when the model is loaded.

Each function maps the plain frequencies theta^(-2i/R) to scaled ones; the formulas are those of Hugging
Face's ROPE_INIT_FUNCTIONS, computed in float64. Kinds that depend on the length of the text (dynamic NTK) use
max_model_len, so that a token never depends on how long its batch has become.

R: rotated features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from ridgeline.config import RopeConfig, RopeType
from ridgeline.errors import ConfigError

Frequencies = npt.NDArray[np.float64]

_FIELDS = {
    "factor": "factor",
    "rope_theta": "theta",
    "original_max_position_embeddings": "original_max_position",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
"""Keys of Hugging Face's rope_parameters / rope_scaling -> fields of RopeConfig."""
_AT_LEAST_ONE = ("rope_theta", "original_max_position_embeddings")
_IGNORED = ("rope_type", "type", "finetuned")


def rope_from_hf(scaling: Mapping[str, Any], base: RopeConfig) -> RopeConfig:
    """`base` with what a Hugging Face rope_parameters or rope_scaling dictionary says.

    Raises ConfigError for an unknown kind or key, and for a value that is not a number of the right size.
    """
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in get_args(RopeType):
        raise ConfigError(f"rope_type={kind!r}: expected one of {', '.join(get_args(RopeType))}")
    changes: dict[str, Any] = {}
    for key, value in scaling.items():
        if key in _IGNORED or value is None:
            continue
        if key not in _FIELDS:
            raise ConfigError(f"unknown RoPE setting {key!r}; known: rope_type, {', '.join(_FIELDS)}")
        least = 1 if key in _AT_LEAST_ONE else 0
        if key == "truncate":
            if not isinstance(value, bool):
                raise ConfigError(f"truncate={value!r}: expected true or false")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value < 1e30:
            raise ConfigError(f"{key}={value!r:.80}: expected a number above {least}")
        changes[_FIELDS[key]] = value
    if kind != "default" and "factor" not in changes:
        example = f"{{'rope_type': {kind!r}, 'factor': 4.0}}"
        raise ConfigError(f"rope_type={kind!r} needs a factor, for example {example}")
    if "original_max_position" in changes:
        changes["original_max_position"] = int(changes["original_max_position"])
    rope = replace(base, rope_type=kind, **changes)
    if rope.rope_type == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:
        raise ConfigError(
            f"low_freq_factor={rope.low_freq_factor}: expected less than high_freq_factor, which is "
            f"{rope.high_freq_factor}"
        )
    return rope


def rope_to_hf(rope: RopeConfig, *, head_dim: int) -> dict[str, Any]:
    """The rope_parameters dictionary of `rope`; `freq_divisors` have no place in it."""
    assert rope.freq_divisors is None
    plain = RopeConfig(theta=0.0, rotary_dim=rope.rotary_dim)
    stated = {key: getattr(rope, name) for key, name in _FIELDS.items()}
    keep = {key: value for key, value in stated.items() if value != getattr(plain, _FIELDS[key])}
    if rope.rope_type == "llama3":  # transformers has no defaults for these
        keep |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.rope_type != "default":
        keep["factor"] = rope.factor
    if rope.rotary_dim != head_dim:
        keep["partial_rotary_factor"] = rope.rotary_dim / head_dim
    return {"rope_type": rope.rope_type} | keep


def rope_frequencies(rope: RopeConfig, *, max_position: int, max_model_len: int) -> tuple[Frequencies, float]:
    """inv_freq [R/2] and the factor on cos and sin.

    max_position: positions the model was trained for; max_model_len: longest text this engine will see.
    """
    original = rope.original_max_position or max_position
    theta = rope.theta
    if rope.rope_type == "dynamic":  # NTK-aware: a larger base, u/bloc97 and u/emozilla 2023
        length = max(max_model_len, max_position)
        stretch = rope.factor * length / max_position - (rope.factor - 1)
        theta *= stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
    inv_freq = theta ** -(np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim)
    attention_factor = 1.0
    if rope.rope_type == "linear":  # Chen et al. 2023, arXiv:2306.15595
        inv_freq = inv_freq / rope.factor
    elif rope.rope_type == "yarn":
        inv_freq, attention_factor = _yarn(inv_freq, rope, original)
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(inv_freq, rope, original)
    if rope.freq_divisors is not None:
        inv_freq = inv_freq / np.array(rope.freq_divisors)
    return inv_freq, attention_factor


def _yarn(inv_freq: Frequencies, rope: RopeConfig, original: int) -> tuple[Frequencies, float]:
    """Interpolate slow dimensions, keep fast ones, ramp between. Peng et al. 2023, arXiv:2309.00071."""

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        return rope.rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rope.rotary_dim // 2) - low) / (high - low), 0, 1)
    scaled = inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return scaled, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scaled, mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return scaled, mscale(1.0)


def _llama3(inv_freq: Frequencies, rope: RopeConfig, original: int) -> Frequencies:
    """Divide long wavelengths by the factor, keep short ones, blend between (Llama 3.1)."""
    wavelength = 2 * np.pi / inv_freq
    blend = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return (1 - blend) * inv_freq / rope.factor + blend * inv_freq
