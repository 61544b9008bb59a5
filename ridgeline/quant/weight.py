"""`Weight`, the only kind of weight there is: raw buffers and what they mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ridgeline.quant.formats import Array, QuantFormat
from ridgeline.quant.gguf_blocks import dequantize, quantize


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A named tensor as raw buffers, often memory-mapped: no tensor library, nothing unpacked.

    `buffers["data"]`: uint8 [shape[0], ..., row bytes] for block formats and BF16 as uint16; the numpy
    dtype itself for F64, F32 and F16.
    """

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    buffers: dict[str, Array]

    @property
    def data(self) -> Array:
        return self.buffers["data"]

    @property
    def num_bytes(self) -> int:
        return self.format.num_bytes(self.shape)

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values as float32 of `shape` (F64 as float64)."""
        return dequantize(self.data, self.format, self.shape)

    def converted(self, format: QuantFormat) -> Weight:
        """The same values in another format that `gguf_blocks.quantize` writes."""
        if format is self.format:
            return self
        return Weight(self.name, format, self.shape, {"data": quantize(self.dequantize(), format)})

    def without_data(self) -> Weight:
        """Only the description: for who has packed the values elsewhere."""
        return Weight(self.name, self.format, self.shape, {})
