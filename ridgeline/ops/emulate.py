"""What native kernels round on purpose, in numpy: inputs of quantized matrices, K and V in their pages.

The reference of `sketch` rounds the same way. Every function also tells which results the float32 error of
what it is given may move, and how far.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ridgeline.config import KVCacheDType
from ridgeline.ops.packing import ROUNDED
from ridgeline.quant.formats import format_named
from ridgeline.quant.gguf_blocks import random_blocks
from ridgeline.quant.groups import Groups, pack_groups
from ridgeline.quant.weight import ActivationQuant, Weight

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
EPS = float(np.finfo(np.float32).eps)
FLOAT_MAX = float(np.finfo(np.float32).max)


def make_weight(
    name: str,
    *shape: int,
    format: str,
    rng: np.random.Generator,
    std: float = 1.0,
    activation: ActivationQuant | None = None,
    is_ordered: bool = False,
) -> Weight:
    """Random values of about `std` in any format, of a linear that rounds its input if the name ends so.

    `is_ordered`: with its columns in an order of its own.
    """
    if format.endswith(ROUNDED):
        format, activation = format.removesuffix(ROUNDED), activation or ActivationQuant()
    fmt = format_named(format)
    if fmt.codes is not None:
        groups = _random_groups(shape, fmt.codes.bits, fmt.block_size, std, rng)
        if fmt.codes.symmetric:
            groups = Groups(groups.bits, groups.q, groups.scales, None)
        buffers: dict[str, npt.NDArray[np.generic]] = {"data": pack_groups(groups, fmt.codes.scale)[1]}
        if is_ordered:
            buffers["order"] = rng.permutation(shape[1]).astype(np.int32)
        return Weight(name, fmt, shape, buffers, activation)
    count = int(np.prod(shape)) // fmt.block_size
    data: npt.NDArray[np.generic] = random_blocks(fmt, count, rng, std=std)
    if fmt.block_size == 1:
        data = data.reshape(-1).view({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[format])
    data = data.reshape(shape[0], -1) if len(shape) == 2 else data
    return Weight(name, fmt, shape, {"data": data}, activation)


def _random_groups(
    shape: tuple[int, ...], bits: int, group_size: int, std: float, rng: np.random.Generator
) -> Groups:
    """Any code and scales around what gives `std`; zero points around the middle."""
    n, k = shape
    q = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
    unit_std = ((4.0**bits - 1) / 12) ** 0.5
    scales = (rng.uniform(0.75, 1.25, (n, k // group_size)) * std / unit_std).astype(np.float16)
    middle, reach = 1 << (bits - 1), max(1, 1 << bits >> 3)
    zeros = rng.integers(middle - reach, middle + reach, scales.shape, endpoint=True).astype(np.uint8)
    return Groups(bits, q, scales.astype(np.float32), zeros)


def quantized_activations(x: Floats, error: Floats, levels: int) -> tuple[Floats, Floats, Bools]:
    """x rounded as csrc/matmul.h does, per 32 columns; the step; and which codes `error` may move by one."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 32)
    most = np.abs(blocks).max(-1, keepdims=True)
    d = most / np.float32(levels)
    # A tiny block has no finite inverse: nothing is left of it.
    inverse = np.divide(np.float32(levels), most, out=np.zeros_like(most), where=most > levels / FLOAT_MAX)
    codes = blocks * inverse
    step = (d.astype(np.float64) + 0 * blocks).reshape(x.shape)
    rounded = (np.rint(codes).astype(np.float64) * d).reshape(x.shape)
    with np.errstate(invalid="ignore"):
        slack = np.where(step > 0, error / step, 0).reshape(blocks.shape)
    # An error of the largest value moves every code of its block.
    slack = np.where(slack > 0, slack + slack.max(-1, keepdims=True) + levels * EPS, 0)
    is_near_tie = np.abs(np.abs(codes - np.trunc(codes)) - 0.5) < slack
    return rounded, step, is_near_tie.reshape(x.shape)


def rounded_tokens(x: Floats, error: Floats, how: ActivationQuant) -> tuple[Floats, Floats, Bools]:
    """The same by one scale a token, as `ActivationQuant` says; outliers stay what they are."""
    values = x.astype(np.float32)
    is_kept = np.abs(values) < np.float32(np.inf if how.outlier_threshold is None else how.outlier_threshold)
    if how.static_scale is None:
        most = np.abs(np.where(is_kept, values, 0)).max(-1, keepdims=True)
        d = most / np.float32(127)
        inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 127 / FLOAT_MAX)
    else:
        d = np.full((len(x), 1), how.static_scale, np.float32)
        inverse = np.float32(1) / d
    codes = np.clip(values * inverse, np.float32(-127), np.float32(127))
    rounded = np.where(is_kept, np.rint(codes).astype(np.float64) * d, values)
    step = np.where(is_kept, d.astype(np.float64), 0)
    slack = np.divide(error, step, out=np.zeros(x.shape), where=step > 0)
    slack = np.where(slack > 0, slack + slack.max(-1, keepdims=True) + 127 * EPS, 0)
    is_near_tie = is_kept & (np.abs(np.abs(codes - np.trunc(codes)) - 0.5) < slack)
    return rounded, step, is_near_tie


def rounded_pages(value: Floats, error: Floats, dtype: KVCacheDType, head_dim: int) -> tuple[Floats, Floats]:
    """K or V as the pages hold them, and how far off they may be."""
    if dtype == "float32":
        return value, error
    exact = value.astype(np.float32)
    if dtype == "float16":
        held = exact.astype(np.float16).astype(np.float64)
        step = np.abs(held) * 2.0**-10
    else:
        heads = exact.reshape(len(exact), -1, head_dim)
        most = np.abs(heads).max(-1, keepdims=True)
        inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
        scales = (most / np.float32(127)).astype(np.float64)
        held = (np.rint(heads * inverse) * scales).reshape(exact.shape)
        step = (scales + 0 * heads).reshape(exact.shape)
    rounding = EPS * np.abs(held) if dtype == "int8" else 0
    return held, np.where(error > 0, error + step, 0) + rounding
