"""What a tensor's bytes mean: the table of formats, and the family of group formats.

A format stores `block_size` consecutive elements of a row in `block_bytes` bytes. The GGUF names and
numbers are ggml's (ggml-common.h); the layouts are spelled out in `quant.gguf_blocks`. Group formats are
ours (`quant.groups`): integer codes of any group size with a scale and perhaps a zero point, what GPTQ, AWQ
and compressed-tensors checkpoints hold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from ridgeline.errors import CheckpointError

Array = npt.NDArray[np.generic]


ScaleDtype = Literal["F16", "F32"]
SCALE_BYTES: dict[ScaleDtype, int] = {"F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class GroupCodes:
    """What the blocks of a group format hold: w = d * (q - z), one d (and z) for each block.

    q is unsigned of `bits` bits. Symmetric: z = 2^(bits - 1) and is not stored.
    """

    bits: int
    symmetric: bool
    scale: ScaleDtype

    @property
    def middle(self) -> int:
        """The zero point of a symmetric format."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """Layout of one tensor's bytes."""

    name: str
    ggml_type: int | None
    block_size: int
    block_bytes: int
    codes: GroupCodes | None = None
    """of a group format; None for GGUF's"""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose rows (last dimension) are a whole number of blocks."""
        num_elements = 1
        for size in shape:
            num_elements *= size
        return num_elements // self.block_size * self.block_bytes


FORMATS: dict[str, QuantFormat] = {
    f.name: f
    for f in (
        QuantFormat("F64", 28, 1, 8),
        QuantFormat("F32", 0, 1, 4),
        QuantFormat("F16", 1, 1, 2),
        QuantFormat("BF16", 30, 1, 2),
        QuantFormat("Q4_0", 2, 32, 18),
        QuantFormat("Q4_1", 3, 32, 20),
        QuantFormat("Q5_0", 6, 32, 22),
        QuantFormat("Q5_1", 7, 32, 24),
        QuantFormat("Q8_0", 8, 32, 34),
        QuantFormat("Q2_K", 10, 256, 84),
        QuantFormat("Q3_K", 11, 256, 110),
        QuantFormat("Q4_K", 12, 256, 144),
        QuantFormat("Q5_K", 13, 256, 176),
        QuantFormat("Q6_K", 14, 256, 210),
    )
}
GGML_TYPES: dict[int, QuantFormat] = {f.ggml_type: f for f in FORMATS.values() if f.ggml_type is not None}


def format_named(name: str) -> QuantFormat:
    """The format called `name`, group formats included; an unknown name lists the known ones."""
    if name in FORMATS:
        return FORMATS[name]
    if match := re.fullmatch(r"INT(\d)_G(\d+)(_SYM)?(_F32)?", name):
        bits, size, symmetric, wide = match.groups()
        return group_format(
            int(bits), int(size), symmetric=symmetric is not None, scale="F32" if wide else "F16"
        )
    raise CheckpointError(f"unknown tensor format {name!r}; known: {', '.join(FORMATS)} and INT4_G64 ...")


GROUP_BITS = (2, 3, 4, 8)


@cache
def group_format(bits: int, group_size: int, *, symmetric: bool, scale: ScaleDtype = "F16") -> QuantFormat:
    """Integer codes with a scale, and a zero point where not symmetric, for every `group_size` columns.

    Per-channel is a group as long as the row. A block: scale, zero point (u8), codes packed densely, lowest
    bits first. Raises CheckpointError for bits or a group size that cannot be.
    """
    if bits not in GROUP_BITS or group_size < 1 or group_size * bits % 8:
        raise CheckpointError(
            f"group format of {bits} bits and group_size {group_size}: expected bits of "
            f"{', '.join(map(str, GROUP_BITS))} and a group that fills whole bytes"
        )
    name = f"INT{bits}_G{group_size}{'_SYM' if symmetric else ''}{'_F32' if scale == 'F32' else ''}"
    num_bytes = SCALE_BYTES[scale] + (not symmetric) + group_size * bits // 8
    return QuantFormat(name, None, group_size, num_bytes, GroupCodes(bits, symmetric, scale))
