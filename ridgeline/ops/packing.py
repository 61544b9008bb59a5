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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ridgeline.logs import logger
from ridgeline.quant.formats import FORMATS, GROUP_BITS, SCALE_BYTES, Array, QuantFormat, group_format
from ridgeline.quant.weight import ActivationQuant, Weight

Bytes = npt.NDArray[np.uint8]

WEIGHT_FORMATS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
"""Formats of files that csrc/packed.h reads; group formats are packed as one of GROUP_KERNELS."""
GROUP_SPANS = (32, 64)
"""Columns that share a scale and a zero point in csrc/packed_groups.h; longer groups repeat theirs."""
GROUP_KERNELS = tuple(
    group_format(bits, span, symmetric=False, scale=scale).name
    for bits in GROUP_BITS
    for scale in SCALE_BYTES
    for span in GROUP_SPANS
    if bits >= 4 or (span, scale) != (64, "F32")
)
"""Packed forms of group formats: `INT4_G64` and so on. What fits none of them is dequantized to F32."""
KERNELS = (*WEIGHT_FORMATS, *GROUP_KERNELS, "Q8_0:A8", "INT4_G64:A8", "INT8_G64:A8")
"""Names of kernels, those of rounded inputs for the usual formats only."""
KERNEL_BLOCK = 32
"""Columns that the kernels of quantized matrices take at a time."""
ROUNDED = ":A8"
"""Ends the name of a weight whose linear rounds its input to int8."""
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
    order: npt.NDArray[np.int32] | None = None
    activation: ActivationQuant | None = None


def packed_format(weight: Weight) -> QuantFormat:
    """The form in which a matrix is packed; F32 where its format or its number of columns has none."""
    format, columns = weight.format, weight.shape[-1]
    if format.codes is None:
        return (
            format if format.name in WEIGHT_FORMATS and columns % format.block_size == 0 else FORMATS["F32"]
        )
    for span in reversed(GROUP_SPANS):
        if format.block_size % span == 0 and columns % KERNEL_BLOCK == 0:
            packed = group_format(format.codes.bits, span, symmetric=False, scale=format.codes.scale)
            if packed.name in GROUP_KERNELS:
                return packed
    return FORMATS["F32"]


def weight_label(weight: Weight) -> str:
    """The name of its format, and whether a linear rounds its input: `INT8_G576_SYM:A8`."""
    return weight.format.name + (ROUNDED if weight.activation else "")


def kernel_name(weight: Weight) -> str:
    """The same of the form in which it is packed: weights of one name are multiplied by one kernel."""
    return packed_format(weight).name + (ROUNDED if weight.activation else "")


def input_bits(label: str, isa: str) -> Literal[8, 16, 32]:
    """Bits of the inputs that a kernel multiplies; 32: floats. `label`: of a weight or a kernel."""
    name = label.removesuffix(ROUNDED)
    if not name.startswith(("Q", "INT")):
        return 32
    is_byte = name.startswith(("Q8_0", "INT8"))
    return 16 if is_byte and (name == label or isa == "avx2") else 8


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
        packed: list[PackedWeight] = []
        end = 0
        with ThreadPoolExecutor(self._num_threads) as pool:
            for weight in weights:
                format, num_bytes = self._place(weight)
                begin, end = end, end + num_bytes
                if len(weight.shape) == 1:
                    values = np.ascontiguousarray(weight.dequantize(), np.float32)
                    packed.append(PackedWeight(format_number(FORMATS["F32"]), len(values), 1, values))
                    continue
                out = memory[begin:end]
                if not filled:
                    self._pack(weight, format, out, pool.map)
                order = packed_order(weight, format)
                rows, columns = weight.shape
                number = format_number(format)
                packed.append(PackedWeight(number, rows, columns, out, order, weight.activation))
        return packed

    def _place(self, weight: Weight) -> tuple[QuantFormat, int]:
        """The format that a matrix is packed in, and its bytes, a multiple of 64; 0 for a vector."""
        if len(weight.shape) == 1:
            return weight.format, 0
        format = packed_format(weight)
        num_bytes = int(self._library.rl_packed_bytes(format_number(format), *weight.shape))
        assert num_bytes, f"{weight.name}: {format.name} of shape {weight.shape} cannot be packed"
        return format, -(-num_bytes // 64) * 64

    def _pack(self, weight: Weight, format: QuantFormat, packed: Bytes, parallel: Callable[..., Any]) -> None:
        if format.name == "F32" and format is not weight.format:
            logger.info("%s: %s has no kernel; held as %s", weight.name, weight.format.name, format.name)
        data = file_rows(weight, format)
        group_size, has_zeros = group_layout(weight, format)

        def pack(begin: int) -> None:
            part = data[begin : begin + _PACK_ROWS]
            self._library.rl_pack(
                format_number(format),
                group_size,
                has_zeros,
                data.ctypes.data,
                begin,
                begin + _PACK_ROWS,
                *weight.shape,
                packed.ctypes.data,
            )
            give_back(part)

        list(parallel(pack, range(0, weight.shape[0], _PACK_ROWS)))
        give_back(weight.data)  # where `data` is a copy: of some columns, or of values


def packed_order(weight: Weight, format: QuantFormat) -> npt.NDArray[np.int32] | None:
    """Which input feature each packed column belongs to; None: its own number."""
    order = weight.buffers.get("order") if format.codes else None
    return None if order is None else np.ascontiguousarray(order, np.int32)


def file_rows(weight: Weight, format: QuantFormat) -> Array:
    """What rl_pack reads to pack a matrix as `format`: the rows of the file, or their values."""
    if format is weight.format or format.codes is not None:
        return np.ascontiguousarray(weight.data)
    return np.ascontiguousarray(weight.dequantize(), np.float32)


def group_layout(weight: Weight, format: QuantFormat) -> tuple[int, int]:
    """Columns of a group in the file, and whether it holds zero points; zeros if `format` has no groups."""
    if format.codes is None or weight.format.codes is None:
        return 0, 0
    return weight.format.block_size, int(not weight.format.codes.symmetric)


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


def mapping_of(array: Array) -> mmap.mmap | None:
    """The mapping that an array is a view of, if it is one."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


def give_back(part: Array) -> None:
    """Let the system drop the pages of a mapped file from the first to the last byte of `part`; they can be
    read again."""
    mapping = mapping_of(part)
    if mapping is None or not hasattr(mmap, "MADV_DONTNEED") or not part.size:
        return
    start = part.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    steps = zip(part.shape, part.strides, strict=True)
    num_bytes = part.itemsize + sum((size - 1) * stride for size, stride in steps)
    begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (start + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def format_number(format: QuantFormat) -> int:
    """As csrc/ridgeline.h numbers packed forms."""
    if format.codes is not None:
        scale = 8 * (format.codes.scale == "F32")
        return 256 + 16 * format.codes.bits + scale + GROUP_SPANS.index(format.block_size)
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
