"""Group formats: integer codes, scales and zero points as arrays, and the rows of blocks that hold them.

    block: d (float16 or float32) | z (u8, unless symmetric) | codes, `bits` each, lowest bits first

w = d * (q - z). This is the one form in which quantizers hand over what they found and in which checkpoints
of every kind arrive, so that loading, sharding, packing and counting bytes know a single layout.

Letters: N x K a weight (out x in), R = K / group_size groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import Array, GroupCodes, QuantFormat, ScaleDtype, group_format

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """A matrix in integers: q uint8 [N, K], scales float32 [N, R], zeros uint8 [N, R] or None (symmetric)."""

    bits: int
    q: Bytes
    scales: Floats
    zeros: Bytes | None

    @property
    def group_size(self) -> int:
        return int(self.q.shape[1] // self.scales.shape[1])

    def dequantize(self) -> Floats:
        """float32 [N, K]."""
        n, k = self.q.shape
        zeros = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[:, :, None]
        grouped = self.q.reshape(n, -1, self.group_size).astype(np.float32)
        values: Floats = self.scales[:, :, None] * (grouped - np.asarray(zeros, np.float32))
        return values.reshape(n, k)

    def scale_dtype(self) -> ScaleDtype:
        return scale_dtype(self.scales)


def scale_dtype(scales: Floats) -> ScaleDtype:
    """F16 where that loses nothing, else F32."""
    with np.errstate(over="ignore"):
        same = np.array_equal(scales.astype(np.float16).astype(np.float32), scales)
    return "F16" if same else "F32"


def group_dtype(fmt: QuantFormat) -> np.dtype[Any]:
    """One block as a numpy record."""
    codes = _codes_of(fmt)
    zero = [] if codes.symmetric else [("z", "u1")]
    scale = "<f2" if codes.scale == "F16" else "<f4"
    return np.dtype([("d", scale), *zero, ("qs", "u1", fmt.block_size * codes.bits // 8)])


def pack_groups(groups: Groups, scale: ScaleDtype | None = None) -> tuple[QuantFormat, Bytes]:
    """The format and the rows uint8 [N, row bytes] of a matrix in integers.

    `scale`: how scales are stored; None: float16 where that loses nothing. Raises CheckpointError for shapes
    that do not belong together, codes out of range, or scales that float16 cannot hold.
    """
    n, k = groups.q.shape
    num_groups = groups.scales.shape[1]
    if groups.scales.shape[0] != n or num_groups == 0 or k % num_groups:
        raise CheckpointError(f"codes {groups.q.shape} and scales {groups.scales.shape} do not fit together")
    if groups.zeros is not None and groups.zeros.shape != groups.scales.shape:
        raise CheckpointError(f"zeros {groups.zeros.shape} and scales {groups.scales.shape} differ in shape")
    if groups.q.size and int(groups.q.max()) >> groups.bits:
        raise CheckpointError(f"a code of {int(groups.q.max())} does not fit {groups.bits} bits")
    fmt = group_format(
        groups.bits, groups.group_size, symmetric=groups.zeros is None, scale=scale or groups.scale_dtype()
    )
    blocks = np.empty((n, num_groups), group_dtype(fmt))
    with np.errstate(over="ignore"):
        blocks["d"] = groups.scales
    if not np.isfinite(blocks["d"]).all():
        raise CheckpointError("a scale is not finite in its stored form; quantize finite weights")
    if groups.zeros is not None:
        blocks["z"] = groups.zeros
    for start in range(0, n, _ROWS_AT_ONCE):
        part = groups.q[start : start + _ROWS_AT_ONCE]
        blocks["qs"][start : start + _ROWS_AT_ONCE] = pack_bits(
            part.reshape(-1, groups.group_size), groups.bits
        ).reshape(len(part), num_groups, -1)
    return fmt, blocks.view(np.uint8).reshape(n, -1)


def unpack_groups(data: Array, fmt: QuantFormat) -> Groups:
    """Rows of blocks as arrays: the inverse of `pack_groups`."""
    codes = _codes_of(fmt)
    blocks = np.ascontiguousarray(data).view(group_dtype(fmt))
    n, num_groups = blocks.shape
    q = unpack_bits(blocks["qs"].reshape(n * num_groups, -1), codes.bits)
    zeros = None if codes.symmetric else np.ascontiguousarray(blocks["z"])
    return Groups(codes.bits, q.reshape(n, -1), blocks["d"].astype(np.float32), zeros)


def dequantize_groups(data: Array, fmt: QuantFormat, shape: tuple[int, ...]) -> Floats:
    """Rows of blocks [N, row bytes] as float32 of `shape`, a few rows at a time."""
    rows = np.ascontiguousarray(data).reshape(-1, shape[-1] // fmt.block_size * fmt.block_bytes)
    values = np.empty((len(rows), shape[-1]), np.float32)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        values[part] = unpack_groups(rows[part], fmt).dequantize()
    return values.reshape(shape)


def pack_bits(q: Bytes, bits: int) -> Bytes:
    """Codes [n, K] as one dense stream of bits a row, lowest first: [n, K * bits / 8]."""
    n, k = q.shape
    if bits == 8:
        return q
    if bits == 3:
        planes = (q[:, :, None] >> np.arange(3, dtype=np.uint8)) & np.uint8(1)
        return np.packbits(planes.reshape(n, -1), axis=1, bitorder="little")
    each = 8 // bits
    shifts = np.arange(each, dtype=np.uint8) * np.uint8(bits)
    packed: Bytes = np.bitwise_or.reduce(q.reshape(n, k // each, each) << shifts, axis=2)
    return packed


def unpack_bits(packed: Bytes, bits: int) -> Bytes:
    """The inverse of `pack_bits`."""
    n = len(packed)
    if bits == 8:
        return np.ascontiguousarray(packed)
    if bits == 3:
        planes = np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little").reshape(n, -1, 3)
        triples: Bytes = planes[:, :, 0] | planes[:, :, 1] << np.uint8(1) | planes[:, :, 2] << np.uint8(2)
        return triples
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes: Bytes = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(n, -1)


def _codes_of(fmt: QuantFormat) -> GroupCodes:
    assert fmt.codes is not None, f"{fmt.name} is no group format"
    return fmt.codes
