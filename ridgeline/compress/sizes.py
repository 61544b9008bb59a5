"""Bytes and bits of a model's tensors: by class, by format, and against float32.

A tied embedding and head are one tensor and counted once. Bits per weight count all that is stored for a
weight: codes, scales, zero points, and the order of the columns where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ridgeline.models.load import LoadedModel
from ridgeline.quant.weight import Weight

CLASSES = ("embedding", "attention", "mlp", "norms")
_PARTS = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
TABLES = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the tensors of one model."""

    num_bytes: int
    float32_bytes: int
    by_class: dict[str, int]
    """bytes of each of CLASSES; embedding: the head too"""
    by_format: dict[str, int]
    """bytes by the name of the format, most first"""
    linear_bits: float
    """bits per weight of the linears of all layers"""
    table_bits: float
    """of embedding and head"""
    bits: float
    """of everything"""

    @property
    def ratio(self) -> float:
        """How many times smaller than in float32."""
        return self.float32_bytes / self.num_bytes

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return {name: getattr(self, name) for name in (*self.__slots__, "ratio")}


def sizes_of(model: LoadedModel) -> Sizes:
    """Of the weights as they are in memory; values are not needed, only formats and shapes."""
    names = {id(weight): name for name, weight in reversed(list(model.weights.items()))}
    distinct = {name: model.weights[name] for name in names.values()}
    by_class = dict.fromkeys(CLASSES, 0)
    by_format: dict[str, int] = {}
    for name, weight in distinct.items():
        by_class[class_of(name)] += stored_bytes(weight)
        by_format[weight.format.name] = by_format.get(weight.format.name, 0) + stored_bytes(weight)
    return Sizes(
        num_bytes=sum(by_class.values()),
        float32_bytes=4 * sum(weight.num_elements for weight in distinct.values()),
        by_class=by_class,
        by_format=dict(sorted(by_format.items(), key=lambda item: -item[1])),
        linear_bits=_bits(w for name, w in distinct.items() if is_linear(name, w)),
        table_bits=_bits(w for name, w in distinct.items() if name in TABLES),
        bits=_bits(distinct.values()),
    )


def is_linear(name: str, weight: Weight) -> bool:
    """A matrix of a layer."""
    return name not in TABLES and len(weight.shape) > 1


def class_of(name: str) -> str:
    """The one of CLASSES that a canonical name belongs to; biases go with their matrices."""
    if name in TABLES:
        return "embedding"
    part = name.split(".")[2] if name.startswith("layers.") else name
    return next((kind for kind, parts in _PARTS.items() if part in parts), "norms")


def stored_bytes(weight: Weight) -> int:
    """Of the values and, with act-order, of the order of the columns."""
    order = weight.buffers.get("order")
    return weight.num_bytes + (0 if order is None else order.nbytes)


def _bits(weights: Iterable[Weight]) -> float:
    weights = list(weights)
    return 8 * sum(map(stored_bytes, weights)) / max(1, sum(weight.num_elements for weight in weights))
