"""Quantized linears written as other programs read them: one class for each kind of directory.

A writer is told all linears of a model first, since some kinds state their settings once for all of them. Of
each it says why it cannot hold it, if so, and it makes the tensors of the others one at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ridgeline.checkpoint.awq import awq_config, awq_tensors, fits_awq
from ridgeline.checkpoint.bitsandbytes import fits_int8, int8_config, int8_tensors
from ridgeline.checkpoint.compressed_tensors import CTGroup, ct_config, ct_tensors, group_for
from ridgeline.checkpoint.gptq import Version, fits_gptq, gptq_config, gptq_tensors
from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import Array
from ridgeline.quant.groups import Groups, group_dtype, unpack_groups
from ridgeline.quant.weight import Weight

_ORDERED = "its columns are in act-order"
_SHAPE = "its shape does not fill whole words"


class Writer(Protocol):
    """Owner of what one directory says about its linears. Modules are named as in the file."""

    def refusal(self, module: str, weight: Weight, groups: Groups) -> str | None:
        """Why the linear cannot be held as it is, or None. Raises CheckpointError if that must not be."""
        ...

    def tensors(self, module: str, weight: Weight, groups: Groups) -> dict[str, Array]:
        """Its parts by the name they have in the file."""
        ...

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        """quantization_config, after all tensors; `plain`: the linears that are not quantized."""
        ...


@dataclass(frozen=True, slots=True)
class Grid:
    """What the kinds with one setting for all linears state."""

    bits: int
    group_size: int | None
    """None: the whole row"""
    symmetric: bool


def grid_of(weight: Weight) -> Grid | None:
    """The grid of a matrix in integers, from its format alone; None for other formats."""
    codes, size = weight.format.codes, weight.format.block_size
    if codes is None:
        bits = {"Q8_0": 8, "Q4_0": 4}.get(weight.format.name)
        return None if bits is None else Grid(bits, size, symmetric=True)
    return Grid(codes.bits, None if size == weight.shape[1] else size, codes.symmetric)


def exact_groups(weight: Weight) -> Groups | None:
    """A matrix in integers: a group format, Q8_0 or Q4_0. No value changes; None for other formats."""
    if weight.format.codes is not None:
        return unpack_groups(weight.data, weight.format)
    if weight.format.name not in ("Q8_0", "Q4_0"):
        return None
    bits = 8 if weight.format.name == "Q8_0" else 4
    blocks = np.ascontiguousarray(weight.data).view(np.dtype([("d", "<f2"), ("qs", "u1", 4 * bits)]))
    q = blocks["qs"]
    q = q + np.uint8(128) if bits == 8 else np.concatenate([q & np.uint8(15), q >> np.uint8(4)], axis=2)
    return Groups(bits, q.reshape(weight.shape), blocks["d"].astype(np.float32), None)


def _most_common(grids: Iterable[tuple[Grid, int]]) -> Grid | None:
    """The grid that most weights have."""
    counts: Counter[Grid] = Counter()
    for grid, num_elements in grids:
        counts[grid] += num_elements
    return counts.most_common(1)[0][0] if counts else None


def _named(module: str, parts: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{module}.{suffix}": array for suffix, array in parts.items()}


class GPTQWriter:
    """One setting for most linears, GPTQModel's `dynamic` for the others."""

    def __init__(self, linears: Mapping[str, Weight], *, version: Version | None = None) -> None:
        """`version`: of the zero points; None: 1, which everything reads, unless a zero point is 0."""
        grids = {module: grid for module, weight in linears.items() if (grid := grid_of(weight)) is not None}
        self._base = _most_common((grid, linears[module].num_elements) for module, grid in grids.items())
        self._grids = grids
        self._written: list[str] = []
        self._ordered = False
        has_zero = any(_has_zero(weight) for weight in linears.values())
        if version == 1 and has_zero:
            raise CheckpointError(
                "GPTQ version 1 stores each zero point less 1, and this model has zero points of 0, about "
                "which readers disagree; write version 2"
            )
        self._version: Version = version or (2 if has_zero else 1)

    def refusal(self, module: str, weight: Weight, groups: Groups) -> str | None:
        return None if fits_gptq(groups) else _SHAPE

    def tensors(self, module: str, weight: Weight, groups: Groups) -> dict[str, Array]:
        self._written.append(module)
        order = weight.buffers.get("order")
        self._ordered |= order is not None
        return _named(module, gptq_tensors(groups, order, version=self._version))

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        assert self._base is not None
        dynamic: dict[str, dict[str, Any]] = {
            f"-:^{re.escape(module)}$": {} for module in plain if module != "lm_head"
        }
        for module in self._written:
            if (grid := self._grids[module]) != self._base:
                size = -1 if grid.group_size is None else grid.group_size
                dynamic[f"+:^{re.escape(module)}$"] = {
                    "bits": grid.bits,
                    "group_size": size,
                    "sym": grid.symmetric,
                }
        return gptq_config(
            bits=self._base.bits,
            group_size=self._base.group_size,
            symmetric=self._base.symmetric,
            desc_act=self._ordered,
            lm_head="lm_head" in self._written,
            version=self._version,
            dynamic=dynamic,
        )


def _has_zero(weight: Weight) -> bool:
    """Whether a zero point of the matrix is 0."""
    if weight.format.codes is None or weight.format.codes.symmetric:
        return False
    blocks = np.ascontiguousarray(weight.data).view(group_dtype(weight.format))
    return not bool(blocks["z"].all())


class AWQWriter:
    """4 bits and one group size."""

    def __init__(self, linears: Mapping[str, Weight]) -> None:
        grids = [
            (g, w.num_elements) for w in linears.values() if (g := grid_of(w)) is not None and g.bits == 4
        ]
        self._base = _most_common((replace(grid, symmetric=False), size) for grid, size in grids)

    def refusal(self, module: str, weight: Weight, groups: Groups) -> str | None:
        if "order" in weight.buffers:
            return _ORDERED
        if module == "lm_head":
            return "readers take the head for a plain one"
        if not fits_awq(groups):
            return "it is not of 4 bits" if groups.bits != 4 else _SHAPE
        grid = grid_of(weight)
        if grid is None or self._base is None or grid.group_size != self._base.group_size:
            return "its groups are of another size than most"
        return None

    def tensors(self, module: str, weight: Weight, groups: Groups) -> dict[str, Array]:
        return _named(module, awq_tensors(groups))

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        assert self._base is not None
        return awq_config(group_size=self._base.group_size, untouched=plain)


class CTWriter:
    """Every linear as it is, linears of a kind in one entry of config_groups; the embedding too.

    A tied head shares the embedding's codes. transformers dequantizes it by itself, so it has scales too.
    """

    def __init__(self, *, tied: bool) -> None:
        self._tied = tied
        self._groups: dict[CTGroup, list[str]] = {}

    def refusal(self, module: str, weight: Weight, groups: Groups) -> str | None:
        if weight.activation is not None and weight.activation.outlier_threshold is not None:
            raise CheckpointError(
                f"{weight.name}: compressed-tensors cannot state outliers (LLM.int8()); write bitsandbytes"
            )
        return _ORDERED if "order" in weight.buffers else None

    def tensors(self, module: str, weight: Weight, groups: Groups) -> dict[str, Array]:
        is_embedding = module.endswith("embed_tokens")
        group = group_for(groups, weight.activation, is_embedding=is_embedding)
        modules = self._groups.setdefault(group, [])
        modules.append(module)
        named = _named(module, ct_tensors(groups, weight.activation, group))
        if is_embedding and self._tied:
            modules.append("lm_head")
            parts = ("weight_scale", "weight_zero_point")
            named |= {f"lm_head.{p}": named[f"{module}.{p}"] for p in parts if f"{module}.{p}" in named}
        return named

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        return ct_config(self._groups, plain)


class Int8Writer:
    """LLM.int8(): rows of 8 bits whose inputs are rounded per token, outliers left in float."""

    def __init__(self, linears: Mapping[str, Weight]) -> None:
        thresholds = {w.activation.outlier_threshold for w in linears.values() if w.activation is not None}
        if len(thresholds) != 1:
            raise CheckpointError(
                "bitsandbytes states one outlier threshold for linears with rounded inputs; this model has "
                f"{', '.join(map(str, sorted(thresholds, key=str))) or 'none'}"
            )
        self._threshold = thresholds.pop()

    def refusal(self, module: str, weight: Weight, groups: Groups) -> str | None:
        if module == "lm_head":
            return "readers take the head for a plain one"
        return None if fits_int8(groups, weight.activation) else "it is no row of 8 bits with rounded inputs"

    def tensors(self, module: str, weight: Weight, groups: Groups) -> dict[str, Array]:
        return _named(module, int8_tensors(groups))

    def config(self, plain: Sequence[str]) -> dict[str, Any]:
        return int8_config(threshold=self._threshold, untouched=plain)
