"""Reading a config.json or GGUF metadata field by field, with errors that name the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ridgeline.config import RopeConfig
from ridgeline.errors import CheckpointError, ConfigError
from ridgeline.models.rope import rope_from_hf

_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """Values of one file, by key after `prefix`."""

    values: Mapping[str, Any]
    file: str
    prefix: str = ""

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(self.prefix + key)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"{self.file}: {self.prefix}{key} is missing; it says the model's shape")
            return default
        return value

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.file}: {self.prefix}{key} is {value!r}; expected a whole number above 0")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise CheckpointError(f"{self.file}: {self.prefix}{key} is {value!r}; expected a number above 0")
        return float(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.get(key, None)
        if value is None:
            return ()
        ids = [value] if isinstance(value, int) else value
        if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise CheckpointError(f"{self.file}: {key} is {value!r}; expected a token id or a list of them")
        return tuple(ids)

    def must_be(self, key: str, expected: Any) -> None:
        """A feature that the decoder does not have: refuse the file rather than ignore it."""
        value = self.get(key, expected)
        if value != expected:
            raise CheckpointError(f"{self.file}: {key} is {value!r}; only {expected!r} is supported")

    def vocab_size(self) -> int:
        """GGUF: stated, or as many as there are tokens."""
        stated = self.get("vocab_size", None)
        if stated is not None:
            return self.integer("vocab_size")
        tokens = self.values.get("tokenizer.ggml.tokens")
        if tokens is None or len(tokens) == 0:
            raise CheckpointError(f"{self.file}: neither {self.prefix}vocab_size nor tokenizer.ggml.tokens is there")
        return len(tokens)

    def gguf_eos(self) -> tuple[int, ...]:
        ids = (self.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
        return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))


def hf_rope(
    fields: Fields, *, head_dim: int, default_theta: float, kind: str | None = None, theta_key: str = "rope_theta"
) -> RopeConfig:
    """RoPE of a config.json: rope_parameters of transformers 5 (for one kind of layer, where it is keyed by
    kind), or the older rope_theta and rope_scaling."""
    parameters = fields.get("rope_parameters", None)
    if parameters is not None and kind is not None and kind in parameters:
        parameters = parameters[kind]
    partial = (parameters or {}).get("partial_rotary_factor") or fields.get("partial_rotary_factor", 1.0)
    theta = (parameters or {}).get("rope_theta") or fields.get(theta_key, default_theta)
    base = RopeConfig(theta=float(theta), rotary_dim=int(head_dim * partial))
    scaling = parameters
    if parameters is None and kind != "sliding_attention":
        scaling = fields.get("rope_scaling", None)
    if not scaling:
        return base
    try:
        return rope_from_hf(scaling, base)
    except ConfigError as error:
        raise CheckpointError(f"{fields.file}: {error}") from None


def gguf_rope(fields: Fields, base: RopeConfig) -> RopeConfig:
    """RoPE of GGUF metadata: freq_base, dimension_count and the scaling.* keys."""
    rope = replace(
        base,
        theta=fields.number("rope.freq_base", base.theta),
        rotary_dim=fields.integer("rope.dimension_count", base.rotary_dim),
    )
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none" and fields.get("rope.scale_linear", None):
        kind = "linear"
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{fields.file}: rope.scaling.type is {kind!r}; supported: none, linear, yarn")
    return replace(
        rope,
        rope_type=kind,
        factor=fields.number("rope.scaling.factor", fields.get("rope.scale_linear", 1.0)),
        original_max_position=fields.get("rope.scaling.original_context_length", None),
    )
