"""Reading a config.json or GGUF metadata field by field, with errors that name the file and the key.

Values are checked where they are read, because everything after believes them: sizes are whole numbers with
a limit, so that a damaged file cannot ask for a billion layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ridgeline.config import RopeConfig
from ridgeline.errors import CheckpointError, ConfigError
from ridgeline.models.rope import rope_from_hf

_REQUIRED = object()
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Fields:
    """Values of one file, by key after `prefix`. A null counts as missing."""

    values: Mapping[str, Any]
    file: str
    prefix: str = ""

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(self.prefix + key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise CheckpointError(
                f"{self.file}: {self.prefix}{key} is missing; the model's shape cannot be known without it. "
                "Fetch or convert the model again"
            )
        return default

    def wrong(self, key: str, expected: str) -> CheckpointError:
        found = f"{self.values.get(self.prefix + key)!r:.80}"
        return CheckpointError(f"{self.file}: {self.prefix}{key} is {found}; expected {expected}")

    def integer(self, key: str, default: Any = _REQUIRED, *, most: int = 2**31 - 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.wrong(key, f"a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def must_be(self, key: str, expected: Any) -> None:
        """A feature that the decoder does not have: refuse the file rather than ignore it."""
        if self.get(key, expected) != expected:
            raise self.wrong(key, f"{expected!r}, which is all that is supported")

    def head_dim(self, key: str, hidden_size: int, num_heads: int) -> int:
        """Stated, or hidden_size / num_heads where that is whole."""
        if self.get(key, None) is None and hidden_size % num_heads:
            raise CheckpointError(
                f"{self.file}: {hidden_size} features do not divide among {num_heads} heads, and "
                f"{self.prefix}{key} is not given"
            )
        return self.integer(key, hidden_size // num_heads)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise self.wrong(key, "a token id or a list of them")
        return tuple(ids)

    def gguf_vocab_size(self) -> int:
        """Stated, or as many as there are tokens."""
        tokens = self.values.get("tokenizer.ggml.tokens", ())
        return self.integer("vocab_size", len(tokens) if hasattr(tokens, "__len__") else None)

    def gguf_eos(self) -> tuple[int, ...]:
        ids = (self.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        return tuple(dict.fromkeys(i for i in ids if type(i) is int))


def hf_rope(
    fields: Fields, default: RopeConfig, *, kind: str | None = None, theta_key: str = "rope_theta"
) -> RopeConfig:
    """RoPE of a config.json: rope_parameters of transformers 5, or the older rope_theta and rope_scaling.

    `kind` is the kind of layer, where a model has several: rope_parameters is then keyed by it, and
    rope_scaling is about the layers that see everything.
    """
    parameters = fields.get("rope_parameters", {})
    if isinstance(parameters, dict) and kind in parameters:
        parameters = parameters[kind]
    if not parameters and kind != "sliding_attention":
        parameters = fields.get("rope_scaling", {})
    if not isinstance(parameters, dict):
        raise CheckpointError(f"{fields.file}: rope_parameters is {parameters!r:.80}; expected an object")
    stated = {"rope_theta": fields.number(theta_key, default.theta)} | parameters
    part = stated.pop("partial_rotary_factor", None) or fields.number("partial_rotary_factor", 1.0)
    if not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise CheckpointError(f"{fields.file}: partial_rotary_factor is {part!r}; expected 0 to 1")
    try:
        return rope_from_hf(stated, replace(default, rotary_dim=int(default.rotary_dim * part)))
    except ConfigError as error:
        raise CheckpointError(f"{fields.file}: {error}") from None


def gguf_rope(fields: Fields, default: RopeConfig) -> RopeConfig:
    """RoPE of GGUF metadata. As llama.cpp reads it: a factor without a type is linear."""
    rope = replace(
        default,
        theta=fields.number("rope.freq_base", default.theta),
        rotary_dim=fields.integer("rope.dimension_count", default.rotary_dim),
    )
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    kind = fields.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise fields.wrong("rope.scaling.type", "none, linear or yarn")
    if kind == "none" or factor == 1.0:
        return rope
    if kind == "linear":
        return replace(rope, rope_type="linear", factor=factor)
    # llama.cpp multiplies YaRN's own 0.1 ln(factor) + 1 by this; Hugging Face replaces it.
    stretch = fields.number("rope.scaling.yarn_attn_factor", fields.number("rope.scaling.attn_factor", 1.0))
    original = fields.get("rope.scaling.original_context_length", None)
    return replace(
        rope,
        rope_type="yarn",
        factor=factor,
        original_max_position=original and fields.integer("rope.scaling.original_context_length"),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", default.beta_fast),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", default.beta_slow),
        attention_factor=None if stretch == 1.0 else stretch * (0.1 * math.log(factor) + 1.0),
    )


def rope_to_gguf(rope: RopeConfig) -> dict[str, Any]:
    """Metadata of a RoPE, after the prefix. llama3 has no keys: it is a tensor of divisors."""
    if rope.rope_type == "dynamic":
        raise CheckpointError("a GGUF file cannot state dynamic RoPE; write a Hugging Face directory")
    metadata: dict[str, Any] = {"rope.freq_base": rope.theta, "rope.dimension_count": rope.rotary_dim}
    if rope.rope_type in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": rope.factor}
    if rope.rope_type == "yarn":
        metadata |= {
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
        if rope.original_max_position is not None:
            metadata["rope.scaling.original_context_length"] = rope.original_max_position
        if rope.attention_factor is not None:
            stretch = rope.attention_factor / (0.1 * math.log(rope.factor) + 1.0)
            metadata["rope.scaling.attn_factor"] = stretch
    return metadata
