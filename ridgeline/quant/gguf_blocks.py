"""GGUF block formats in numpy: bytes to numbers and back, equal bit for bit to ggml's own code.

`LAYOUTS` spells out every block as a numpy record; the fields are ggml's (ggml-common.h). A block of 32 has
one float16 scale `d` and perhaps a minimum `m`: w = d*q + m, or w = d*(q - z) with z fixed. A K-quant
super-block of 256 has 8 or 16 groups with small integer scales, which `d` (and `dmin`) scale in turn. Bits
are packed the same way everywhere: a run of bytes holds the low bits of its first `run` elements, then the
next higher bits belong to the next `run` elements (`_unpack`).

Letters: n quant blocks, B elements per block, G groups per super-block. Encoders follow ggml's reference
quantizers. Those that round to nearest are here; those that search (K-quants, and all where the columns have
an importance) are in C++ (`quant.gguf_native`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import Array, QuantFormat
from ridgeline.quant.gguf_native import encode_rows, share_out

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Blocks = npt.NDArray[Any]
"""Records of one of the LAYOUTS, shape [n]."""

_ROWS_AT_ONCE = 256
_LARGEST = 2.0**28
"""No K-quant reaches further (Q6_K: 65504 * 128 * 32), and squares of more could overflow in a search."""
CHUNK_ELEMENTS = 1 << 16
"""Elements converted at a time: the temporaries stay in the L2 cache and memory near the result's size."""

LAYOUTS: dict[str, np.dtype[Any]] = {
    "Q4_0": np.dtype([("d", "<f2"), ("qs", "u1", 16)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)]),
    # qh bit j is the fifth bit of element j
    "Q5_0": np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q8_0": np.dtype([("d", "<f2"), ("qs", "i1", 32)]),
    # scales: low nibble scale, high nibble minimum of 16 elements
    "Q2_K": np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")]),
    "Q3_K": np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")]),
    "Q4_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)]),
    "Q5_K": np.dtype(
        [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]
    ),
    "Q6_K": np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
}


def _unpack(packed: Bytes, *, bits: int, run: int) -> Bytes:
    """[n, bytes] -> [n, bytes * 8 / bits]: each run of bytes gives `run` elements per bit position."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run) >> shifts
    return (runs & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def _column(blocks: Blocks, name: str) -> Floats:
    """A float16 field as float32 [n, 1]."""
    column: Floats = blocks[name].astype(np.float32)[:, None]
    return column


def _grouped(scales: Floats, q: npt.NDArray[Any]) -> Floats:
    """scales [n, G] * q [n, B], each scale for the B/G elements of its group -> [n, G, B/G]."""
    n, num_groups = scales.shape
    return scales[:, :, None] * q.reshape(n, num_groups, -1).astype(np.float32)


def _five_bits(blocks: Blocks) -> Bytes:
    return _unpack(blocks["qs"], bits=4, run=16) | (_unpack(blocks["qh"], bits=1, run=1) << np.uint8(4))


def _k_scales_and_mins(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight 6-bit scales and minima of Q4_K and Q5_K from 12 bytes -> [n, 8] each.

    Bytes 0-3 hold scales 0-3 and bytes 4-7 minima 0-3 in their low six bits; bytes 8-11 hold the low
    nibbles of scales and minima 4-7, whose upper two bits are on top of bytes 0-3 and 4-7.
    """
    low_scale, low_min, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = [low_scale & 0x3F, (high & 0x0F) | ((low_scale >> 2) & 0x30)]
    mins = [low_min & 0x3F, (high >> 4) | ((low_min >> 2) & 0x30)]
    return np.hstack(scales).astype(np.float32), np.hstack(mins).astype(np.float32)


def _decode_q4_0(b: Blocks) -> Floats:
    return _column(b, "d") * (_unpack(b["qs"], bits=4, run=16).astype(np.float32) - np.float32(8))


def _decode_q4_1(b: Blocks) -> Floats:
    return _column(b, "d") * _unpack(b["qs"], bits=4, run=16).astype(np.float32) + _column(b, "m")


def _decode_q5_0(b: Blocks) -> Floats:
    return _column(b, "d") * (_five_bits(b).astype(np.float32) - np.float32(16))


def _decode_q5_1(b: Blocks) -> Floats:
    return _column(b, "d") * _five_bits(b).astype(np.float32) + _column(b, "m")


def _decode_q8_0(b: Blocks) -> Floats:
    return _column(b, "d") * b["qs"].astype(np.float32)


def _decode_q2_k(b: Blocks) -> Floats:
    scales = _column(b, "d") * (b["scales"] & 0x0F).astype(np.float32)
    mins = _column(b, "dmin") * (b["scales"] >> 4).astype(np.float32)
    return _grouped(scales, _unpack(b["qs"], bits=2, run=32)) - mins[:, :, None]


def _decode_q3_k(b: Blocks) -> Floats:
    # Scale j: its low nibble is in bytes 0-7, its upper two bits in bytes 8-11; the value is off by 32.
    packed = b["scales"]
    scales = _unpack(packed[:, :8], bits=4, run=8) | (_unpack(packed[:, 8:], bits=2, run=4) << np.uint8(4))
    scales = _column(b, "d") * (scales.astype(np.float32) - np.float32(32))

    # The mask is inverted: a set bit means that 4 is *not* taken off.
    high = _unpack(b["hmask"], bits=1, run=32) << np.uint8(2)
    q = (_unpack(b["qs"], bits=2, run=32) | high).astype(np.float32) - np.float32(4)
    return _grouped(scales, q)


def _decode_q4_k(b: Blocks) -> Floats:
    scales, mins = _k_scales_and_mins(b["scales"])
    q = _unpack(b["qs"], bits=4, run=32)
    return _grouped(_column(b, "d") * scales, q) - (_column(b, "dmin") * mins)[:, :, None]


def _decode_q5_k(b: Blocks) -> Floats:
    scales, mins = _k_scales_and_mins(b["scales"])
    q = _unpack(b["qs"], bits=4, run=32) | (_unpack(b["qh"], bits=1, run=32) << np.uint8(4))
    return _grouped(_column(b, "d") * scales, q) - (_column(b, "dmin") * mins)[:, :, None]


def _decode_q6_k(b: Blocks) -> Floats:
    q = _unpack(b["ql"], bits=4, run=64) | (_unpack(b["qh"], bits=2, run=32) << np.uint8(4))
    return _grouped(_column(b, "d") * b["scales"].astype(np.float32), q.astype(np.float32) - np.float32(32))


_DECODERS: dict[str, Callable[[Blocks], Floats]] = {
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q5_0": _decode_q5_0,
    "Q5_1": _decode_q5_1,
    "Q8_0": _decode_q8_0,
    "Q2_K": _decode_q2_k,
    "Q3_K": _decode_q3_k,
    "Q4_K": _decode_q4_k,
    "Q5_K": _decode_q5_k,
    "Q6_K": _decode_q6_k,
}


def dequantize(data: Array, fmt: QuantFormat, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A tensor's bytes, as `Weight.data` or plain uint8, as a new float32 array of `shape` (F64: float64).

    A scale of infinity or NaN in the file gives infinities or NaNs, without a warning.
    """
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if shape[-1] % fmt.block_size or raw.size != fmt.num_bytes(shape):
        raise CheckpointError(
            f"{fmt.name} tensor of shape {shape}: expected rows of whole {fmt.block_size}-element blocks and "
            f"{fmt.num_bytes(shape)} bytes, found {raw.size} bytes; give the shape that belongs to the bytes"
        )
    if fmt.name == "F64":
        return raw.view("<f8").reshape(shape).copy()
    if fmt.name == "F32":
        return raw.view("<f4").reshape(shape).copy()
    if fmt.name == "F16":
        with np.errstate(invalid="ignore"):
            return raw.view("<f2").reshape(shape).astype(np.float32)
    if fmt.name == "BF16":
        widened = raw.view("<u2").astype(np.uint32)
        widened <<= np.uint32(16)
        return widened.view(np.float32).reshape(shape)

    blocks = raw.view(LAYOUTS[fmt.name])
    decode = _DECODERS[fmt.name]
    values = np.empty((blocks.size, fmt.block_size), np.float32)
    step = CHUNK_ELEMENTS // fmt.block_size
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, blocks.size, step):
            chunk = blocks[start : start + step]
            values[start : start + step] = decode(chunk).reshape(chunk.size, fmt.block_size)
    return values.reshape(shape)


def _signed_peak(x: Floats) -> Floats:
    """The element of each row with the largest magnitude, the first one of a tie -> [n, 1]."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)


def _inverse(d: Floats) -> Floats:
    """1/d of the scale before it is rounded to float16, as ggml does; 0 where d has no inverse."""
    inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _truncate(q: Floats, *, limit: int) -> Bytes:
    """ggml rounds by truncation of a value that is shifted to be positive."""
    return q.astype(np.uint8).clip(0, limit)


def _store_bits(blocks: Blocks, q: Bytes) -> None:
    """Pack 32 elements: nibbles j and j + 16 share a byte; a fifth bit goes to qh."""
    blocks["qs"] = (q[:, :16] & np.uint8(0x0F)) | (q[:, 16:] << np.uint8(4))
    if "qh" in (blocks.dtype.names or ()):
        blocks["qh"] = np.packbits(q >> np.uint8(4), axis=1, bitorder="little")


def _encode_symmetric(x: Floats, blocks: Blocks, *, levels: int) -> None:
    """Q4_0 and Q5_0. w = d*(q - levels/2), where the largest magnitude sits exactly on the negative end."""
    d = _signed_peak(x) / np.float32(-levels // 2)
    blocks["d"] = d[:, 0]
    _store_bits(blocks, _truncate(x * _inverse(d) + np.float32(levels // 2 + 0.5), limit=levels - 1))


def _encode_asymmetric(x: Floats, blocks: Blocks, *, levels: int) -> None:
    """Q4_1 and Q5_1. w = d*q + m from the smallest to the largest element."""
    m = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - m) / np.float32(levels - 1)
    blocks["d"], blocks["m"] = d[:, 0], m[:, 0]
    _store_bits(blocks, _truncate((x - m) * _inverse(d) + np.float32(0.5), limit=levels - 1))


def _encode_q8_0(x: Floats, blocks: Blocks) -> None:
    """w = d*q, d = max|w| / 127, rounded half away from zero (C's roundf, unlike the truncation above)."""
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    magnitude = np.abs(scaled)
    floor = np.floor(magnitude)
    rounded = np.sign(scaled) * (floor + np.floor(np.float32(2) * (magnitude - floor)))
    blocks["d"], blocks["qs"] = d[:, 0], rounded.astype(np.int8)


_ENCODERS: dict[str, Callable[[Floats, Blocks], None]] = {
    "Q4_0": lambda x, blocks: _encode_symmetric(x, blocks, levels=16),
    "Q4_1": lambda x, blocks: _encode_asymmetric(x, blocks, levels=16),
    "Q5_0": lambda x, blocks: _encode_symmetric(x, blocks, levels=32),
    "Q5_1": lambda x, blocks: _encode_asymmetric(x, blocks, levels=32),
    "Q8_0": _encode_q8_0,
}


def _to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round to nearest even on the upper 16 bits; a NaN is made quiet so that it stays one."""
    bits = values.view(np.uint32)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    # No carry out of bit 31: the largest finite pattern, 0xFF7FFFFF, rounds to 0xFF80 (infinity).
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(is_nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


def quantize(values: npt.ArrayLike, fmt: QuantFormat, *, importance: npt.ArrayLike | None = None) -> Array:
    """float32 values [..., K] -> the array that `Weight.data` holds in `fmt`: [..., row bytes] for blocks.

    importance [K]: weight of each column's squared error, such as the mean of the input's squares; ggml's
    imatrix. Q8_0 and float formats do not use it. F16 and BF16 keep infinities and NaNs and round what is too
    large to infinity; a block cannot hold them, so there they are an error.
    """
    x = np.ascontiguousarray(values, dtype=np.float32)
    if fmt.name == "F32":
        return x.copy()
    if fmt.name == "F16":
        with np.errstate(over="ignore", invalid="ignore"):
            return x.astype(np.float16)
    if fmt.name == "BF16":
        return _to_bf16(x)
    if fmt.name not in LAYOUTS:
        known = ", ".join(("F32", "F16", "BF16", *LAYOUTS))
        raise CheckpointError(f"cannot quantize to {fmt.name}; choose one of {known}")
    if x.ndim == 0 or x.shape[-1] % fmt.block_size:
        raise CheckpointError(
            f"cannot quantize shape {x.shape} to {fmt.name}: expected rows of a multiple of {fmt.block_size} "
            "elements; choose F16 or BF16 for this tensor"
        )
    shape = (*x.shape[:-1], x.shape[-1] // fmt.block_size * fmt.block_bytes)
    if x.size == 0:
        return np.empty(shape, np.uint8)
    weights = None if importance is None else _checked_importance(importance, x.shape[-1])
    if fmt.name in _ENCODERS and (weights is None or fmt.name == "Q8_0"):
        return _round_to_nearest(x.reshape(-1, fmt.block_size), fmt).view(np.uint8).reshape(shape)

    rows = x.reshape(-1, x.shape[-1])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        if not (np.abs(rows[start : start + _ROWS_AT_ONCE]) <= _LARGEST).all():
            raise _not_finite(fmt, x)
    encoded = encode_rows(rows, fmt, importance=weights)
    if not _scales_are_finite(encoded.reshape(-1).view(LAYOUTS[fmt.name])):
        raise _not_finite(fmt, x)
    return encoded.reshape(shape)


def _checked_importance(importance: npt.ArrayLike, num_columns: int) -> Floats:
    weights = np.ascontiguousarray(importance, dtype=np.float32)
    if weights.shape != (num_columns,) or not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise CheckpointError(
            f"importance of shape {weights.shape}: expected {num_columns} finite numbers of at least 0, one "
            "for each input feature; calibrate again"
        )
    return weights


def _round_to_nearest(rows: Floats, fmt: QuantFormat) -> Blocks:
    """float32 [n, B] -> [n] blocks of one of the _ENCODERS."""
    blocks = np.empty(len(rows), LAYOUTS[fmt.name])
    step = CHUNK_ELEMENTS // fmt.block_size

    def encode(start: int) -> None:
        chunk, encoded = rows[start : start + step], blocks[start : start + step]
        # 1/0, and what a NaN does on its way to an integer: both are caught by the checks around.
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            if np.isfinite(chunk).all():
                _ENCODERS[fmt.name](chunk, encoded)
                if _scales_are_finite(encoded):
                    return
        raise _not_finite(fmt, chunk)

    share_out(encode, range(0, len(rows), step))
    return blocks


def _scales_are_finite(blocks: Blocks) -> bool:
    fields = {"d", "m", "dmin"} & set(blocks.dtype.names or ())
    return all(bool(np.isfinite(blocks[name]).all()) for name in fields)


def _not_finite(fmt: QuantFormat, x: Floats) -> CheckpointError:
    return CheckpointError(
        f"cannot quantize to {fmt.name}: expected finite values whose scale fits float16, found values "
        f"from {x.min()} to {x.max()}; keep this tensor in F32 or mend the values"
    )


_RANDOM_SCALES: dict[str, tuple[str | None, float, float]] = {
    "Q4_0": (None, 0.0, 4.61),
    "Q4_1": ("m", -7.5, 4.61),
    "Q5_0": (None, 0.0, 9.23),
    "Q5_1": ("m", -15.5, 9.23),
    "Q8_0": (None, 0.0, 73.6),
    "Q2_K": ("dmin", 1.5, 13.9),
    "Q3_K": (None, 0.0, 43.3),
    "Q4_K": ("dmin", 7.5, 258.0),
    "Q5_K": ("dmin", 15.5, 527.0),
    "Q6_K": (None, 0.0, 1366.0),
}
"""Field of the minimum, its ratio to d that makes the mean zero, std of the weights at d = 1: moments of
uniformly random quants, scales and minima."""


def random_blocks(fmt: QuantFormat, num_blocks: int, rng: np.random.Generator, *, std: float = 0.02) -> Bytes:
    """Valid random blocks uint8 [num_blocks, block_bytes]: weights of mean about 0 and about `std`."""
    if fmt.block_size == 1:
        normal = rng.standard_normal(num_blocks, np.float32) * np.float32(std)
        array = normal.astype(np.float64) if fmt.name == "F64" else quantize(normal, fmt)
        return array.view(np.uint8).reshape(num_blocks, fmt.block_bytes)

    raw = rng.integers(0, 256, (num_blocks, fmt.block_bytes), np.uint8)
    blocks = raw.reshape(-1).view(LAYOUTS[fmt.name])
    if fmt.name == "Q8_0":
        # No encoder writes -128, and kernels may rely on that.
        blocks["qs"] = np.maximum(blocks["qs"], np.int8(-127))
    min_field, min_ratio, unit_std = _RANDOM_SCALES[fmt.name]
    d = rng.uniform(0.75, 1.25, num_blocks) * (std / unit_std)
    blocks["d"] = d
    if min_field is not None:
        blocks[min_field] = d * min_ratio
    return raw
