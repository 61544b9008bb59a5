"""Weights as the native kernels read them: sixteen rows at a time (csrc/packed.h), as large as in the file.

They are packed once, in parallel, and the pages of the file are given back as they are read, so there is
never a second copy in memory. A cache file keeps the result for the next start, which then only maps it; the
layout is the same for every instruction set.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.logs import logger
from ridgeline.quant.formats import FORMATS, QuantFormat
from ridgeline.quant.weight import Weight

Bytes = npt.NDArray[np.uint8]

WEIGHT_FORMATS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
"""Formats that csrc/packed.h reads; others are dequantized to F32."""
LAYOUT_VERSION = 1
"""Of csrc/packed.h: a cache file of another version is not used."""
_PACK_ROWS = 512


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight as csrc reads it: float32 for a vector, groups of sixteen rows for a matrix."""

    format: int
    rows: int
    columns: int
    data: npt.NDArray[np.generic]


class Packer:
    """Packs the weights of a Program with a few threads, and gives the file's pages back as they are read."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._library = library
        self._num_threads = num_threads

    def pack(self, weights: Sequence[Weight], cache: Path | None = None) -> list[PackedWeight]:
        """One after the other, the rows of each shared between threads; from `cache` where that is there."""
        total = sum(self._place(weight)[1] for weight in weights)
        memory = _map_cache(cache, total) if cache else None
        if memory is not None:
            return self._pack_all(weights, memory, filled=True)
        if cache is None:
            return self._pack_all(weights, _huge_bytes(total), filled=False)
        with _new_cache(cache, total) as memory:
            return self._pack_all(weights, memory, filled=False)

    def num_bytes(self, weights: Sequence[Weight]) -> int:
        """What `pack` would take, from shapes and formats alone."""
        vectors = sum(4 * weight.num_elements for weight in weights if len(weight.shape) == 1)
        return vectors + sum(self._place(weight)[1] for weight in weights)

    def _pack_all(self, weights: Sequence[Weight], memory: Bytes, *, filled: bool) -> list[PackedWeight]:
        """Into consecutive parts of `memory`; filled: they are there already."""
        packed, end = [], 0
        with ThreadPoolExecutor(self._num_threads) as pool:
            for weight in weights:
                format, num_bytes = self._place(weight)
                begin, end = end, end + num_bytes
                if len(weight.shape) == 1:
                    values = np.ascontiguousarray(weight.dequantize(), np.float32)
                    packed.append(PackedWeight(_number(FORMATS["F32"]), len(values), 1, values))
                    continue
                out = memory[begin:end]
                if not filled:
                    self._pack(weight, format, out, pool.map)
                rows, columns = weight.shape
                packed.append(PackedWeight(_number(format), rows, columns, out))
        return packed

    def _place(self, weight: Weight) -> tuple[QuantFormat, int]:
        """The format that a matrix is packed in, and its bytes, a multiple of 64; 0 for a vector."""
        if len(weight.shape) == 1:
            return weight.format, 0
        for format in (weight.format, FORMATS["F32"]):
            num_bytes = self._packed_bytes(format.name, *weight.shape)
            if num_bytes:
                return format, -(-num_bytes // 64) * 64
        raise AssertionError(f"{weight.name}: F32 of shape {weight.shape} cannot be packed")

    def _pack(self, weight: Weight, format: QuantFormat, packed: Bytes, parallel: Callable[..., Any]) -> None:
        rows, columns = weight.shape
        data = weight.data
        if format is not weight.format:
            logger.info("%s: %s has no kernel; held as %s", weight.name, weight.format.name, format.name)
            data = weight.dequantize().astype(np.float32, copy=False)
        data = np.ascontiguousarray(data)

        def pack(begin: int) -> None:
            part = data[begin : begin + _PACK_ROWS]
            self._library.rl_pack(
                _number(format),
                data.ctypes.data,
                begin,
                begin + _PACK_ROWS,
                rows,
                columns,
                packed.ctypes.data,
            )
            give_back(part)

        list(parallel(pack, range(0, rows, _PACK_ROWS)))

    def _packed_bytes(self, format: str, rows: int, columns: int) -> int:
        if format not in WEIGHT_FORMATS:
            return 0
        return int(self._library.rl_packed_bytes(FORMATS[format].ggml_type, rows, columns))


def aligned_bytes(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialised memory that starts at a cache line."""
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


def _huge_bytes(num_bytes: int) -> Bytes:
    """Zeroed memory, in huge pages where the system has them: decode reads it a few per cent faster (LOG)."""
    mapping = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


def give_back(part: npt.NDArray[np.generic]) -> None:
    """Let the system drop the pages of a mapped file that lie inside `part`; they can be read again."""
    base: Any = part
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = part.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (start + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        base.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _number(format: QuantFormat) -> int:
    assert format.ggml_type is not None
    return format.ggml_type


def cache_name(weights: Sequence[Weight], files: Sequence[Path], *details: object) -> str:
    """A file name for the packed form of `weights`: another one when a file, a format or `details` change."""
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    shapes = [(w.name, w.format.name, w.shape) for w in weights]
    text = repr((LAYOUT_VERSION, stamps, shapes, details))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest() + ".packed"


def _map_cache(path: Path, num_bytes: int) -> Bytes | None:
    """The cache file, mapped; None where there is none of this size."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != num_bytes:
                return None
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _new_cache(path: Path, num_bytes: int) -> Iterator[Bytes]:
    """Memory that becomes the cache file if the block ends well: renamed into place, never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        with open(temporary, "w+b") as file:
            file.truncate(num_bytes)
            mapping = mmap.mmap(file.fileno(), num_bytes)
        yield np.frombuffer(mapping, np.uint8)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
