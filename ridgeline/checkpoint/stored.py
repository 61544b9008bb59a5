"""A quantized linear as a Hugging Face directory stores it: several tensors under the name of one module.

`Parts` finds them with their dtype and shape checked. What a format's reader makes of them is a
`StoredLinear`: everything but the codes, which are moved when the weight is wanted, one linear at a time. So
describing a model reads scales and zero points only, hundredths of the file. Where a file packs along K,
its stream of bits is that of our blocks, and nothing is unpacked.

Letters: N x K the weight (out x in), R groups of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ridgeline.checkpoint.checkpoint import TensorEntry
from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import Array, QuantFormat, group_format
from ridgeline.quant.groups import Bytes, Floats, Groups, group_dtype, scale_dtype
from ridgeline.quant.weight import ActivationQuant, Weight

_REQUIRED = object()
FLOATS = ("F16", "BF16", "F32")


class TensorFiles(Protocol):
    """What is needed of a directory: its tensors, and their values as they are stored."""

    @property
    def tensors(self) -> Mapping[str, TensorEntry]: ...

    def array(self, name: str) -> Array: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """Values of a quantization_config, read with their kind checked. A null counts as missing."""

    values: Mapping[str, Any]
    where: str
    """For errors: the file and the object in it."""

    def wrong(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key} is {self.values.get(key)!r:.80}; expected {expected}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(key)
        if value is None and default is _REQUIRED:
            raise CheckpointError(f"{self.where}: {key} is missing; the weights cannot be understood without")
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        value = self.get(key, default)
        if type(value) is not int or not (least <= value < 2**31):
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def group_size(self, default: Any = _REQUIRED) -> int | None:
        """None for -1: one group as long as the row."""
        value = self.get("group_size", default)
        if value == -1 and type(value) is int:
            return None
        return self.integer("group_size", default)

    def bits(self, key: str = "bits", *, possible: tuple[int, ...] = (2, 3, 4, 8)) -> int:
        value = self.get(key)
        if type(value) is not int or value not in possible:
            raise self.wrong(key, f"one of {', '.join(map(str, possible))}")
        return value

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def one_of(self, key: str, possible: tuple[str, ...], default: Any = _REQUIRED) -> str:
        value = self.get(key, default)
        if not isinstance(value, str) or value.lower() not in possible:
            raise self.wrong(key, f"one of {', '.join(map(repr, possible))}")
        return value.lower()

    def inner(self, key: str) -> Settings | None:
        """An object inside, or None where it is not there."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object")
        return Settings(value, f"{self.where}: {key}")


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one module of a directory, by suffix."""

    files: TensorFiles
    module: str
    path: str
    used: set[str] = field(default_factory=set)
    """Names of the tensors that were asked for."""

    def __contains__(self, suffix: str) -> bool:
        return f"{self.module}.{suffix}" in self.files.tensors

    def error(self, suffix: str, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor '{self.module}.{suffix}' {text}")

    def array(self, suffix: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> Array:
        """The stored values, of one of `dtypes`; None in `shape` is any size."""
        name = f"{self.module}.{suffix}"
        if suffix not in self:
            here = sorted(
                n.rpartition(".")[2] for n in self.files.tensors if n.rpartition(".")[0] == self.module
            )
            raise self.error(suffix, f"is missing; of this module there are {', '.join(here) or 'none'}")
        entry = self.files.tensors[name]
        if entry.format.name not in dtypes:
            raise self.error(suffix, f"is of dtype {entry.format.name}; expected {' or '.join(dtypes)}")
        if len(entry.shape) != len(shape) or any(
            want is not None and have != want for have, want in zip(entry.shape, shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(
                suffix, f"has shape {entry.shape}; the config and its other parts say ({wanted})"
            )
        self.used.add(name)
        return self.files.array(name)

    def shape(self, suffix: str) -> tuple[int, ...]:
        """As stored; () where it is missing."""
        entry = self.files.tensors.get(f"{self.module}.{suffix}")
        return () if entry is None else entry.shape

    def is_dtype(self, suffix: str, dtype: str) -> bool:
        return suffix in self and self.files.tensors[f"{self.module}.{suffix}"].format.name == dtype

    def scales(self, suffix: str, shape: tuple[int | None, ...]) -> Floats:
        """Finite numbers as float32."""
        stored = self.array(suffix, FLOATS, shape)
        if stored.dtype == np.uint16:  # bfloat16
            values = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            values = stored.astype(np.float32)
        if not np.isfinite(values).all():
            raise self.error(suffix, "holds numbers that are not finite; the file is damaged: fetch it again")
        return values


@dataclass(frozen=True, slots=True, eq=False)
class StoredLinear:
    """A quantized linear, its codes not yet read: w = scales * (codes - zeros)."""

    shape: tuple[int, int]
    bits: int
    scales: Floats
    """[N, R]"""
    zeros: Bytes | None
    """[N, R]; None: symmetric"""
    packed: Callable[[], Bytes]
    """uint8 [N, K * bits / 8] as of `pack_bits`, columns in the order of the groups"""
    order: npt.NDArray[np.int32] | None = None
    """[K] the input feature of each column (`Weight.buffers["order"]`)"""
    activation: ActivationQuant | None = None

    @property
    def format(self) -> QuantFormat:
        """As `weight` will have it: it follows from the scales and zero points."""
        group_size = self.shape[1] // self.scales.shape[1]
        scale = scale_dtype(self.scales)
        return group_format(self.bits, group_size, symmetric=self.zeros is None, scale=scale)

    def weight(self, name: str) -> Weight:
        fmt = self.format
        blocks = np.empty(self.scales.shape, group_dtype(fmt))
        blocks["d"] = self.scales
        if self.zeros is not None:
            blocks["z"] = self.zeros
        blocks["qs"] = self.packed().reshape(*self.scales.shape, -1)
        buffers: dict[str, Array] = {"data": blocks.view(np.uint8).reshape(len(blocks), -1)}
        if self.order is not None:
            buffers["order"] = self.order
        return Weight(name, fmt, self.shape, buffers, self.activation)


class QuantScheme(Protocol):
    """How one directory stores its quantized linears."""

    def read(self, parts: Parts) -> StoredLinear | None:
        """The linear, or None if this module is not quantized. Raises CheckpointError for any damage."""
        ...


def even_groups(parts: Parts, suffix: str, sizes: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int64]:
    """How often each group's scale repeats so that all groups have one size, their common divisor.

    The last group of a row may be shorter (576 columns in groups of 128). Raises CheckpointError where no
    size that fills whole bytes divides all of them.
    """
    size = math.gcd(*sizes.tolist())
    if size * bits % 8:
        raise parts.error(
            suffix,
            f"makes groups of {sorted(set(sizes.tolist()))} columns; no group of whole bytes divides them",
        )
    return sizes // size


def group_sizes(columns: int, group_size: int | None) -> npt.NDArray[np.int64]:
    """Columns of each group of a row, the last one perhaps fewer."""
    size = min(group_size or columns, columns)
    sizes = np.full(-(-columns // size), size, np.int64)
    sizes[-1] = columns - size * (len(sizes) - 1)
    return sizes


def grouped_order(
    parts: Parts, suffix: str, g_idx: Array, num_groups: int
) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.int64]]:
    """From the group of each input feature (act-order): features sorted by group, and the groups' sizes."""
    if len(g_idx) and not (g_idx.min() >= 0 and g_idx.max() < num_groups):
        raise parts.error(
            suffix, f"names groups {int(g_idx.min())} to {int(g_idx.max())}; there are 0 to {num_groups - 1}"
        )
    sizes = np.bincount(g_idx, minlength=num_groups)
    if not sizes.all():
        raise parts.error(
            suffix, f"leaves group {int(np.argmin(sizes))} without columns; the file is damaged"
        )
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    return (None if np.array_equal(order, np.arange(len(order))) else order), sizes


def stored_scales(groups: Groups) -> Array:
    """Scales as they are written: float16 where that loses nothing, else float32."""
    return groups.scales.astype(np.float16) if groups.scale_dtype() == "F16" else groups.scales
