"""What a model file is to the rest of the package, whatever its kind: metadata and named tensors.

A `TensorEntry` says where the bytes of a tensor lie, `Checkpoint.weight` maps them: nothing is read until
it is used and nothing is copied, so two processes that serve one file share its pages. `gguf` reads one
kind of file, `safetensors` the other; `map_weight` is the step they have in common.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import QuantFormat
from ridgeline.quant.weight import Weight

_INTEGER_DTYPES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"} | _INTEGER_DTYPES
INTEGERS = {
    name: QuantFormat(name, None, 1, np.dtype(dtype).itemsize) for name, dtype in _INTEGER_DTYPES.items()
}
"""Parts of quantized linears in Hugging Face directories: never a weight by themselves."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie. `shape` is row-major (out x in), `offset` is from the file's start."""

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    file: Path


class Checkpoint(Protocol):
    """An opened model file or directory."""

    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> Literal["gguf", "hf"]: ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF key-values, or the config.json of a Hugging Face directory."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorEntry]: ...

    def weight(self, name: str) -> Weight:
        """The tensor, memory-mapped. `CheckpointError` names the file and the tensor it lacks."""
        ...


def cache_directory() -> Path:
    """Where derived files are kept: $XDG_CACHE_HOME/ridgeline, or ~/.cache/ridgeline."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ridgeline"


def map_weight(entry: TensorEntry, mapping: mmap | bytes) -> Weight:
    """The bytes of `entry` inside the mapped file, seen as the array that `Weight` describes; no copy."""
    block_format = entry.format
    if block_format.name in _NUMPY_DTYPES:
        dtype = np.dtype(_NUMPY_DTYPES[block_format.name])
        shape = entry.shape
    else:
        dtype = np.dtype(np.uint8)
        shape = (*entry.shape[:-1], block_format.num_bytes(entry.shape[-1:]))
    array = np.frombuffer(mapping, dtype, entry.num_bytes // dtype.itemsize, entry.offset)
    return Weight(entry.name, block_format, entry.shape, {"data": array.reshape(shape)})


def missing_tensor(path: Path, name: str, present: Iterable[str]) -> CheckpointError:
    """The error for a tensor that is not in the checkpoint, with the names that look most like it."""
    names = list(present)
    nearest = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.0)) or "none"
    return CheckpointError(
        f"{path}: expected a tensor {name!r}, found {len(names)} others (nearest: {nearest}); "
        "the file is incomplete or of another architecture"
    )
