"""Changes to a model while it is loaded: other KV heads, a window for every layer, another RoPE scaling.

`change_config` says what the model becomes, the others make its weights so. Rows are moved or repeated in
the file's own format; only pooling has to compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ridgeline.config import LoadConfig, ModelConfig, RopeConfig
from ridgeline.errors import ConfigError
from ridgeline.models.rope import rope_from_hf
from ridgeline.ops.packing import give_back
from ridgeline.quant.formats import FORMATS, Array
from ridgeline.quant.weight import Weight


def change_config(config: ModelConfig, load: LoadConfig) -> ModelConfig:
    """The config after the load options. Raises ConfigError with the values that are possible."""
    if load.rope_scaling is not None:
        plain = RopeConfig(theta=config.rope.theta, rotary_dim=config.rope.rotary_dim)
        config = replace(config, rope=rope_from_hf(load.rope_scaling, plain))
    if load.sliding_window is not None:
        if not _is_count(load.sliding_window) or load.sliding_window < 1:
            raise ConfigError(f"sliding_window={load.sliding_window!r}: expected at least 1 token")
        if config.rope_local is not None:
            raise ConfigError(
                f"sliding_window={load.sliding_window}: the layers of {config.arch} have windows and "
                "positions of their own; leave it out or use a model without them"
            )
        everywhere = tuple(range(config.num_layers))
        config = replace(config, sliding_window=load.sliding_window, window_layers=everywhere)
    if load.num_sinks:
        if not _is_count(load.num_sinks) or load.sliding_window is None:
            raise ConfigError(
                f"num_sinks={load.num_sinks!r}: expected 0 or more, together with sliding_window (sinks are "
                "what stays visible outside of a window)"
            )
        config = replace(config, num_sinks=load.num_sinks)
    if load.num_kv_heads is not None:
        possible = possible_kv_heads(config)
        if not _is_count(load.num_kv_heads) or load.num_kv_heads not in possible:
            raise ConfigError(
                f"num_kv_heads={load.num_kv_heads!r}: this model has {config.num_heads} query and "
                f"{config.num_kv_heads} KV heads; possible: {', '.join(map(str, possible))}"
            )
        config = replace(config, num_kv_heads=load.num_kv_heads)
    return config


def possible_kv_heads(config: ModelConfig) -> list[int]:
    """Divisors of num_heads that repeat the present KV heads evenly, or pool them evenly."""
    current = config.num_kv_heads
    divisors = [n for n in range(1, config.num_heads + 1) if config.num_heads % n == 0]
    return [n for n in divisors if n % current == 0 or current % n == 0]


def change_kv_heads(weight: Weight, *, current: int, wanted: int) -> Weight:
    """k_proj, v_proj or its bias with `wanted` KV heads instead of `current`.

    More heads repeat the rows, in the file's own format: the same numbers exactly (MHA from GQA). Fewer heads
    are the mean of each group, as float32 (Ainslie et al. 2023, arXiv:2305.13245, pool so before uptraining).
    """
    if wanted == current:
        return weight
    if wanted > current:
        return map_rows(weight, lambda rows: np.repeat(_by_head(rows, current), wanted // current, axis=0))
    values = weight.dequantize()
    pooled = values.reshape(wanted, current // wanted, -1, *values.shape[1:]).mean(axis=1)
    shape = (values.shape[0] * wanted // current, *values.shape[1:])
    return Weight(weight.name, FORMATS["F32"], shape, {"data": np.ascontiguousarray(pooled.reshape(shape))})


def unpermute(weight: Weight, *, num_heads: int) -> Weight:
    """q or k rows of a GGUF llama file from interleaved to half-split RoPE order.

    The converter wrote [heads, 2, D/2] as [heads, D/2, 2]; rows are moved whole, nothing is unpacked.
    """
    return map_rows(weight, lambda rows: rows.reshape(num_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2))


def permute(weight: Weight, *, num_heads: int) -> Weight:
    """The inverse of `unpermute`."""
    return map_rows(weight, lambda rows: rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2))


def map_rows(weight: Weight, change: Callable[[Array], Array]) -> Weight:
    """A weight whose rows (dimension 0) were moved or repeated; its bytes stay what they are."""
    data = weight.data
    changed = np.ascontiguousarray(change(data)).reshape(-1, *data.shape[1:])
    give_back(data)
    shape = (changed.shape[0], *weight.shape[1:])
    return replace(weight, shape=shape, buffers={**weight.buffers, "data": changed})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _by_head(rows: Array, num_heads: int) -> Array:
    return rows.reshape(num_heads, -1, *rows.shape[1:])
