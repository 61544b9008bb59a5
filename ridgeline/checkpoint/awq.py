"""AWQ checkpoints in the GEMM layout (AutoAWQ, GPTQModel), 4 bits, read and written.

    qweight int32 [K, N / 8]   codes packed along N: nibble i of a word is column 8 c + ORDER[i]
    qzeros  int32 [R, N / 8]   zero points in the same order, stored as they are
    scales  float16 [R, N]     w = scale * (q - z)

Lin et al. 2023, arXiv:2306.00978; AutoAWQ awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ridgeline.checkpoint.stored import Parts, Settings, StoredLinear, even_groups, group_sizes, stored_scales
from ridgeline.checkpoint.words import pack_words, unpack_words
from ridgeline.quant.formats import Array
from ridgeline.quant.groups import Bytes, Groups, pack_bits

BITS, PER_WORD = 4, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = tuple(int(i) for i in np.argsort(ORDER))
"""The nibble of each column."""


@dataclass(frozen=True, slots=True)
class AWQScheme:
    """What a quantization_config of AWQ says."""

    group_size: int | None
    has_zeros: bool

    def read(self, parts: Parts) -> StoredLinear | None:
        if "qweight" not in parts and "weight" in parts:
            return None
        qweight = parts.array("qweight", ("I32",), (None, None))
        k, n = qweight.shape[0], qweight.shape[1] * PER_WORD
        if k == 0 or n == 0:
            raise parts.error("qweight", f"has shape {qweight.shape}: it holds no weights")
        sizes = group_sizes(k, self.group_size)
        scales = parts.scales("scales", (len(sizes), n))
        repeats = even_groups(parts, "scales", sizes, BITS)
        zeros = None
        if self.has_zeros:
            zeros = _unpack(parts.array("qzeros", ("I32",), (len(sizes), n // PER_WORD)))
            if (zeros == 1 << (BITS - 1)).all():
                zeros = None
        return StoredLinear(
            shape=(n, k),
            bits=BITS,
            scales=np.repeat(scales.T, repeats, axis=1),
            zeros=None if zeros is None else np.repeat(zeros.T, repeats, axis=1),
            packed=lambda: pack_bits(np.ascontiguousarray(_unpack(qweight).T), BITS),
        )


def awq_scheme(settings: Settings) -> AWQScheme:
    """From quantization_config. Raises CheckpointError for anything but 4 bits in the GEMM layout."""
    settings.one_of("version", ("gemm",), "gemm")
    settings.one_of("checkpoint_format", ("gemm",), "gemm")
    settings.bits("w_bit" if "w_bit" in settings.values else "bits", possible=(BITS,))
    if "q_group_size" in settings.values:
        values = {**settings.values, "group_size": settings.values["q_group_size"]}
        settings = Settings(values, settings.where)
    return AWQScheme(settings.group_size(), settings.flag("zero_point", True))


def _unpack(words: Array) -> Bytes:
    """int32 [n, M / 8] as codes [n, M], columns in their natural order."""
    codes = unpack_words(words, BITS, words.shape[1] * PER_WORD).reshape(len(words), -1, PER_WORD)
    return codes[:, :, _PLACE].reshape(len(words), -1)


def _pack(codes: Bytes) -> Array:
    ordered = codes.reshape(len(codes), -1, PER_WORD)[:, :, ORDER]
    return pack_words(np.ascontiguousarray(ordered.reshape(codes.shape)), BITS)


def fits_awq(groups: Groups) -> bool:
    return groups.bits == BITS and groups.q.shape[0] % PER_WORD == 0


def awq_tensors(groups: Groups) -> dict[str, Array]:
    """The parts of one linear by suffix."""
    zeros = groups.zeros
    if zeros is None:
        zeros = np.full(groups.scales.shape, 1 << (BITS - 1), np.uint8)
    return {
        "qweight": _pack(np.ascontiguousarray(groups.q.T)),
        "qzeros": _pack(np.ascontiguousarray(zeros.T)),
        "scales": stored_scales(groups).T,
    }


def awq_config(*, group_size: int | None, untouched: Sequence[str]) -> dict[str, Any]:
    """quantization_config. `untouched`: modules that hold plain weights."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": -1 if group_size is None else group_size,
        "zero_point": True,
        "modules_to_not_convert": list(untouched) or None,
    }
