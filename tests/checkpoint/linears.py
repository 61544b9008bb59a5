"""Seeded linears in integers, whole models of them, and directories that are only tensors in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ridgeline.checkpoint.checkpoint import TensorEntry
from ridgeline.checkpoint.safetensors import DTYPES
from ridgeline.checkpoint.stored import Parts
from ridgeline.models.load import LoadedModel
from ridgeline.quant.groups import Groups, pack_groups
from ridgeline.quant.weight import ActivationQuant, Weight


def random_groups(n, k, *, bits, group_size=None, symmetric=True, seed=0, least_zero=0, f16=True) -> Groups:
    rng = np.random.default_rng(seed)
    size = group_size or k
    scales = rng.uniform(0.5, 2.0, (n, k // size)).astype(np.float32) * np.float32(0.01)
    scales = scales.astype(np.float16).astype(np.float32) if f16 else scales
    zeros = None if symmetric else rng.integers(least_zero, 1 << bits, (n, k // size)).astype(np.uint8)
    return Groups(bits, rng.integers(0, 1 << bits, (n, k)).astype(np.uint8), scales, zeros)


def weight_of(name, groups, *, order=None, activation=None) -> Weight:
    fmt, rows = pack_groups(groups)
    buffers = {"data": rows} | ({} if order is None else {"order": order})
    return Weight(name, fmt, groups.q.shape, buffers, activation)


def grouped_order(k, size, seed=0):
    """A permutation as a file gives it back: rising within each group."""
    rows = np.random.default_rng(seed).permutation(k).reshape(-1, size)
    return np.sort(rows, axis=1).reshape(-1).astype(np.int32)


def quantized_model(
    model: LoadedModel,
    *,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    least_zero: int = 1,
    head_bits: int | None = None,
    with_order: bool = False,
    activation: ActivationQuant | None = None,
    others: dict[str, dict[str, Any]] | None = None,
) -> LoadedModel:
    """Random codes for every linear; `others`: another grid for names that end so."""
    weights = dict(model.weights)
    for i, (name, weight) in enumerate(model.weights.items()):
        is_head = name in ("embed_tokens", "lm_head")
        if len(weight.shape) != 2 or (is_head and head_bits is None):
            continue
        grid: dict[str, Any] = {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "least_zero": least_zero,
        }
        if is_head:
            grid = {"bits": head_bits, "group_size": 32, "symmetric": True}
        for suffix, other in (others or {}).items():
            grid |= other if name.endswith(suffix) else {}
        order = grouped_order(weight.shape[1], group_size, seed=i) if with_order and not is_head else None
        weights[name] = weight_of(
            name,
            random_groups(*weight.shape, seed=i, **grid),
            order=order,
            activation=None if is_head else activation,
        )
    if model.weights["lm_head"] is model.weights["embed_tokens"]:
        weights["lm_head"] = weights["embed_tokens"]
    return replace(model, weights=weights)


@dataclass
class Files:
    """Tensors in memory, found as in a directory."""

    arrays: dict[str, np.ndarray]

    @property
    def tensors(self):
        kinds = {"f": "F", "i": "I", "u": "U"}
        formats = {
            name: DTYPES["BF16" if a.dtype == np.uint16 else f"{kinds[a.dtype.kind]}{8 * a.dtype.itemsize}"]
            for name, a in self.arrays.items()
        }
        return {
            name: TensorEntry(name, formats[name], a.shape, 0, a.nbytes, None)
            for name, a in self.arrays.items()
        }

    def array(self, name):
        return self.arrays[name]


def parts_of(arrays, module="layer") -> Parts:
    return Parts(Files({f"{module}.{suffix}": array for suffix, array in arrays.items()}), module, "dir")


def assert_same_weights(ours: LoadedModel, theirs: LoadedModel) -> None:
    """Bit for bit: codes, scales, zero points, order, and how inputs are rounded."""
    assert set(ours.weights) == set(theirs.weights)
    for name, weight in ours.weights.items():
        other = theirs.weights[name]
        assert (weight.format, weight.shape, weight.activation) == (
            other.format,
            other.shape,
            other.activation,
        ), name
        assert set(weight.buffers) == set(other.buffers), name
        for key, buffer in weight.buffers.items():
            np.testing.assert_array_equal(buffer, other.buffers[key], err_msg=f"{name} {key}")
