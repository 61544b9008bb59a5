"""`Weight`, the only kind of weight there is: raw buffers and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ridgeline.quant.formats import Array, QuantFormat
from ridgeline.quant.gguf_blocks import dequantize, quantize
from ridgeline.quant.groups import dequantize_groups


@dataclass(frozen=True, slots=True)
class ActivationQuant:
    """How the input of a linear is rounded before the product (W8A8): symmetric int8, x = d * q, |q| <= 127.

    LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), per token so that no request changes another:
    features of at least `outlier_threshold` are left out of the row's scale and multiplied as floats.
    """

    static_scale: float | None = None
    """d of every row, from calibration; None: dynamic, d = max|x| / 127 of each token's row"""
    outlier_threshold: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A named tensor as raw buffers, often memory-mapped: no tensor library, nothing unpacked.

    `buffers["data"]`: uint8 [shape[0], ..., row bytes] for block formats and BF16 as uint16; the numpy
    dtype itself for F64, F32 and F16. `buffers["order"]`, where it is there: int32 [K], stored column j
    belongs to input feature order[j] (GPTQ's act-order).
    """

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    buffers: dict[str, Array]
    activation: ActivationQuant | None = None
    """of a linear's weight: its input is rounded too"""

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
        """The values as float32 of `shape` (F64 as float64), in the order of the input features."""
        if self.format.codes is None:
            return dequantize(self.data, self.format, self.shape)
        values = dequantize_groups(self.data, self.format, self.shape)
        order = self.buffers.get("order")
        return values if order is None else values[:, np.argsort(order)]

    def converted(self, format: QuantFormat, *, importance: npt.ArrayLike | None = None) -> Weight:
        """The same values in another format that `gguf_blocks.quantize` writes, with its `importance` [K]."""
        if format is self.format:
            return self
        if not self.buffers:  # described: nothing was read, so there is nothing to convert
            return Weight(self.name, format, self.shape, {})
        data = quantize(self.dequantize(), format, importance=importance)
        return Weight(self.name, format, self.shape, {"data": data})

    def without_data(self) -> Weight:
        """Only the description: for who has packed the values elsewhere."""
        return replace(self, buffers={})
