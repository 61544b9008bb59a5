"""The mixes of llama-quantize as data: which format each tensor of a GGUF file gets under a name like Q4_K_M.

A mix is a format for all matrices and rules that give some of them more bits: value and down projections of
the layers that hurt most, the output matrix. Where rows are no whole super-blocks of 256, K-quants fall back
to a format of 32. Source: llama.cpp src/llama-quant.cpp (llama_tensor_get_type_impl, tensor_type_fallback).
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ridgeline.config import ModelConfig
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel
from ridgeline.quant.formats import FORMATS, QuantFormat

FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are no whole super-blocks; F16 where 32 is too much as well."""

Layers = Callable[[int, int], bool]
"""Whether a rule holds for layer i of n."""


def _every(i: int, n: int) -> bool:
    return True


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth, and every third layer between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first(count: int) -> Layers:
    return lambda i, n: i < count


def _share(parts: int) -> Layers:
    """The first n / parts layers."""
    return lambda i, n: i < n // parts


@dataclass(frozen=True, slots=True)
class Rule:
    """Matrices called `stem` in the layers of `layers` get `format`. The first rule that holds counts."""

    stem: str
    layers: Layers
    format: str
    min_q_per_kv: int = 1
    """only where so many query heads share a KV head"""
    with_importance: bool = False
    """only where columns have an importance"""


@dataclass(frozen=True, slots=True)
class Mix:
    file_type: int
    """llama.cpp's number, general.file_type"""
    format: str
    rules: tuple[Rule, ...] = ()


MIXES: dict[str, Mix] = {
    "F32": Mix(0, "F32"),
    "F16": Mix(1, "F16"),
    "BF16": Mix(32, "BF16"),
    "Q8_0": Mix(7, "Q8_0"),
    "Q4_0": Mix(2, "Q4_0", (Rule("down_proj", _share(8), "Q4_1", with_importance=True),)),
    "Q4_1": Mix(3, "Q4_1"),
    "Q5_0": Mix(8, "Q5_0", (Rule("down_proj", _share(8), "Q5_1", with_importance=True),)),
    "Q5_1": Mix(9, "Q5_1"),
    "Q6_K": Mix(18, "Q6_K"),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q5_K_M": Mix(17, "Q5_K", (Rule("v_proj", _more_bits, "Q6_K"), Rule("down_proj", _more_bits, "Q6_K"))),
    "Q4_K_S": Mix(14, "Q4_K", (Rule("v_proj", _first(4), "Q5_K"), Rule("down_proj", _share(8), "Q5_K"))),
    "Q4_K_M": Mix(15, "Q4_K", (Rule("v_proj", _more_bits, "Q6_K"), Rule("down_proj", _more_bits, "Q6_K"))),
    "Q3_K_S": Mix(11, "Q3_K"),
    "Q3_K_M": Mix(
        12,
        "Q3_K",
        (
            Rule("v_proj", _first(2), "Q5_K"),
            Rule("v_proj", _every, "Q4_K"),
            Rule("down_proj", _share(16), "Q5_K"),
            Rule("down_proj", _every, "Q4_K"),
            Rule("o_proj", _every, "Q4_K"),
        ),
    ),
    "Q3_K_L": Mix(13, "Q3_K", tuple(Rule(s, _every, "Q5_K") for s in ("v_proj", "down_proj", "o_proj"))),
    "Q2_K": Mix(
        10,
        "Q2_K",
        (
            Rule("v_proj", _every, "Q4_K", min_q_per_kv=4),
            *(Rule(stem, _every, "Q3_K") for stem in ("v_proj", "down_proj", "o_proj")),
        ),
    ),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def mix_named(name: str) -> Mix:
    """The mix that llama-quantize calls so. Raises ConfigError with the nearest names."""
    key = ALIASES.get(name.upper(), name.upper())
    if key not in MIXES:
        nearest = difflib.get_close_matches(key, MIXES, n=3, cutoff=0.3) or list(MIXES)
        raise ConfigError(f"no GGUF mix {name!r}; nearest: {', '.join(nearest)}")
    return MIXES[key]


def gguf_formats(model: LoadedModel, mix: str, *, has_importance: bool = False) -> dict[str, QuantFormat]:
    """The format of every weight by canonical name, a tied lm_head included. Vectors are F32.

    has_importance: whether columns will be weighed, which changes Q4_0 and Q5_0 a little.
    """
    chosen, config = mix_named(mix), model.config
    return {
        name: _format(name, weight.shape, chosen, config, has_importance=has_importance)
        for name, weight in model.weights.items()
    }


def file_type_of(model: LoadedModel) -> int:
    """The number of the first mix that gives all matrices their formats, else of the commonest format."""
    found = {name: weight.format for name, weight in model.weights.items() if len(weight.shape) == 2}
    for name, mix in MIXES.items():
        for has_importance in (False, True):
            wanted = gguf_formats(model, name, has_importance=has_importance)
            if all(wanted[weight] is fmt for weight, fmt in found.items()):
                return mix.file_type
    sizes: Counter[str] = Counter()
    for name, fmt in found.items():
        sizes[fmt.name] += model.weights[name].num_elements
    commonest = sizes.most_common(1)[0][0]
    return MIXES[ALIASES.get(commonest, commonest)].file_type


def _format(
    name: str, shape: tuple[int, ...], mix: Mix, config: ModelConfig, *, has_importance: bool
) -> QuantFormat:
    if len(shape) != 2:
        return FORMATS["F32"]
    fmt = FORMATS[mix.format]
    if fmt.block_size == 1:
        return fmt
    num_columns = shape[1]
    if name == "lm_head" or (name == "embed_tokens" and config.tie_embeddings):
        fmt = FORMATS["Q8_0"] if num_columns % fmt.block_size or fmt.name == "Q8_0" else FORMATS["Q6_K"]
    elif name != "embed_tokens":
        fmt = _by_rule(name, mix, config, has_importance=has_importance)
    for candidate in (fmt.name, FALLBACKS.get(fmt.name, fmt.name)):
        if num_columns % FORMATS[candidate].block_size == 0:
            return FORMATS[candidate]
    return FORMATS["F16"]


def _by_rule(name: str, mix: Mix, config: ModelConfig, *, has_importance: bool) -> QuantFormat:
    _, layer, stem = name.split(".")
    for rule in mix.rules:
        if (
            rule.stem == stem
            and rule.layers(int(layer), config.num_layers)
            and config.num_heads // config.num_kv_heads >= rule.min_q_per_kv
            and (has_importance or not rule.with_importance)
        ):
            fmt = FORMATS[rule.format]
            break
    else:
        fmt = FORMATS[mix.format]
    # Llama of 70B: its value matrices are small beside the others, so they can have more.
    is_70b = config.arch == "llama" and config.num_layers == 80 and config.num_heads != config.num_kv_heads
    return FORMATS["Q5_K"] if is_70b and stem == "v_proj" and fmt.name in ("Q3_K", "Q4_K") else fmt
