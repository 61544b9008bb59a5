"""What a tensor's bytes mean: the table of formats.

A format stores `block_size` consecutive elements of a row in `block_bytes` bytes. The GGUF names and
numbers are ggml's (ggml-common.h); the layouts are spelled out in `quant.gguf_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ridgeline.errors import CheckpointError

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """Layout of one tensor's bytes."""

    name: str
    ggml_type: int | None
    block_size: int
    block_bytes: int

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
    """The format called `name`; an unknown name lists the known ones."""
    if name not in FORMATS:
        raise CheckpointError(f"unknown tensor format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
