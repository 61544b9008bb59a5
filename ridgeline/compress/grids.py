"""Grids: the scales and zero points that a weight's codes are counted in, and rounding to the nearest code.

w ≈ d * (q - z) with integer codes 0 <= q < 2^bits, one d and z for each group of consecutive inputs of a row.
Scales are rounded to float16 before any code is chosen, so what is stored is what was optimised. Zero always
lies on an asymmetric grid, as in GPTQ (AWQ leaves it out): a zero point is stored in as many bits as a code,
so one outside 0..2^bits-1 could not be written to a checkpoint, and pruned weights stay zero.

Observers choose the range that the codes span. `minmax`: all of it (Frantar et al. 2022, arXiv:2210.17323: a
symmetric grid is d = 2 max|w| / (2^bits - 1), z = 2^(bits-1)). `percentile`: the outermost values may clip.
`mse`: the shrunken range, as it is or its scale refitted by least squares, with the least squared error; with
the Hessian as importance this is AWQ's clip search (Lin et al. 2023, arXiv:2306.00978). `kl`: the range that
keeps the distribution of values (Migacz 2017, TensorRT), for long rows and activations.

Letters: N x K a weight (out x in), R groups of a row, L = K / R, M rows of values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ridgeline.errors import ConfigError
from ridgeline.quant.formats import GROUP_BITS
from ridgeline.quant.groups import Groups

Observer = Literal["minmax", "percentile", "mse", "kl"]
Tensor = torch.Tensor

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16
_ELEMENTS_AT_ONCE = 1 << 17  # a search passes over its values many times: keep them in cache
_SHRINKS = {
    bits: np.linspace(1, least, 9).tolist() for bits, least in ((2, 0.3), (3, 0.5), (4, 0.65), (8, 0.85))
}
_KL_BINS = 4096


@dataclass(frozen=True, slots=True)
class Grid:
    """Which codes a weight gets."""

    bits: int
    group_size: int | None = 64
    """inputs of a row that share a scale; None: the whole row"""
    symmetric: bool = False
    observer: Observer = "minmax"
    percentile: float = 99.9
    """of the `percentile` observer: this share of the values, in percent, lies inside the range"""
    per_tensor: bool = False
    """one scale for all rows (with group_size None)"""

    def __post_init__(self) -> None:
        if self.bits not in GROUP_BITS:
            raise ConfigError(f"bits {self.bits}: expected one of {', '.join(map(str, GROUP_BITS))}")
        if self.group_size is not None and (self.group_size < 1 or self.per_tensor):
            raise ConfigError(f"group_size {self.group_size}: expected a positive number, None if per_tensor")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile {self.percentile}: expected more than 50 and at most 100")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """Zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def num_groups(self, num_inputs: int) -> int:
        """R of a row; a last group that is not full is refused, since no checkpoint format agrees on it."""
        size = self.group_size or num_inputs
        if num_inputs % size:
            fitting = [s for s in (128, 96, 64, 48, 32, 16) if num_inputs % s == 0]
            raise ConfigError(
                f"group_size {size} does not divide the {num_inputs} inputs of this weight; "
                f"use {', '.join(map(str, fitting)) or 'a divisor'}, or None for one scale a row"
            )
        return num_inputs // size


def find_scales(weight: Tensor, grid: Grid, *, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and zero points [N, R] of weight [N, K] in its dtype; scales are float16 numbers.

    `importance`, used by `mse`: what a squared error counts for each input [K], or the Hessian [K, K], of
    which the diagonal block of each group is used.
    """
    if not weight.isfinite().all():
        raise ConfigError("a weight holds NaN or infinity; quantize finite weights")
    n, k = weight.shape
    if grid.per_tensor:
        if importance is not None:
            diagonal = importance.diagonal() if importance.ndim == 2 else importance
            importance = diagonal.repeat(n)
        scales, zeros = _observe(weight.reshape(1, 1, n * k), grid, importance)
        return scales.expand(n, 1).contiguous(), zeros.expand(n, 1).contiguous()

    grouped = weight.reshape(n, grid.num_groups(k), -1)
    if grid.observer == "minmax":
        return _affine(*_extremes(grouped), grid)
    parts = torch.split(grouped, max(_ELEMENTS_AT_ONCE // k, 1))
    found = [_observe(part, grid, importance) for part in parts]
    return torch.cat([s for s, _ in found]), torch.cat([z for _, z in found])


def quantize_to(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Nearest codes uint8 [N, K] of weight [N, K] on the grid of scales, zeros [N, R]."""
    grouped = weight.reshape(*scales.shape, -1)
    levels = nearest_levels(grouped, scales[..., None], zeros[..., None], (1 << bits) - 1)
    return levels.add_(zeros[..., None]).to(torch.uint8).reshape(weight.shape)


def nearest_levels(values: Tensor, scales: Tensor, zeros: Tensor, max_code: int) -> Tensor:
    """q - z of the nearest codes, as floats: round(w / d) kept between -z and max_code - z."""
    return torch.div(values, scales).round_().clamp_(-zeros, max_code - zeros)


def dequantize_codes(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """d * (q - z) [N, K] in the dtype of the scales."""
    grouped = codes.reshape(*scales.shape, -1).to(scales.dtype)
    return (grouped.sub_(zeros[..., None]) * scales[..., None]).reshape(codes.shape)


def groups_of(codes: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Groups:
    """What was found, in the form that is packed."""
    return Groups(
        grid.bits,
        codes.to(torch.uint8).cpu().numpy(),
        scales.float().cpu().numpy(),
        None if grid.symmetric else zeros.to(torch.uint8).cpu().numpy(),
    )


def tensors_of(groups: Groups, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse: codes uint8 [N, K], scales and zeros [N, R] in dtype and on the device of `like`."""
    scales = torch.from_numpy(groups.scales).to(like)
    if groups.zeros is None:
        zeros = torch.full_like(scales, 1 << (groups.bits - 1))
    else:
        zeros = torch.from_numpy(groups.zeros).to(like)
    return torch.from_numpy(groups.q).to(like.device), scales, zeros


def rtn(weight: Tensor, grid: Grid, *, importance: Tensor | None = None) -> Groups:
    """Round to nearest: every weight [N, K] by itself."""
    scales, zeros = find_scales(weight, grid, importance=importance)
    return groups_of(quantize_to(weight, scales, zeros, grid.bits), scales, zeros, grid)


def dequantized(groups: Groups, like: Tensor) -> Tensor:
    """The values [N, K] of groups, in dtype and on the device of `like`."""
    return dequantize_codes(*tensors_of(groups, like))


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """‖X (W - Ŵ)ᵀ‖ / ‖X Wᵀ‖ = sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)). 0 where X Wᵀ is 0."""
    h = hessian.to(weight.dtype)
    rest = weight - quantized
    error = float(((rest @ h) * rest).sum(dtype=torch.float64))
    reference = float(((weight @ h) * weight).sum(dtype=torch.float64))
    return math.sqrt(max(error, 0.0) / reference) if reference > 0 else 0.0


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(values, dim=-1)
    return low, high


def _affine(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zeros of the grid that spans low..high and 0. Where that is nothing, the smallest scale."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        scales = as_float16(2 * torch.maximum(-low, high) / grid.max_code)
        return scales, torch.full_like(scales, grid.middle)
    scales = as_float16((high - low) / grid.max_code)
    return scales, (-low / scales).round_().clamp_(0, grid.max_code)


def as_float16(scales: Tensor) -> Tensor:
    """The nearest positive float16 numbers."""
    return scales.clamp(_SMALLEST, _LARGEST).to(torch.float16).to(scales.dtype)


def _observe(values: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and zeros [n, R] of values [n, R, L]."""
    if grid.observer == "minmax":
        return _affine(*_extremes(values), grid)
    if grid.observer == "percentile":
        return _affine(*_percentiles(values, grid), grid)
    if grid.observer == "kl":
        return _least_divergence(values, grid)
    return _least_squares(values, grid, importance)


def _percentiles(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range that holds `percentile` of the values: of |w| on a symmetric grid, else cut at both ends.

    Linear between order statistics, as numpy's; torch.quantile is limited to 16 M values.
    """

    def quantile(ordered: Tensor, fraction: float) -> Tensor:
        place = fraction * (ordered.shape[-1] - 1)
        below = int(place)
        above = min(below + 1, ordered.shape[-1] - 1)
        return torch.lerp(ordered[..., below], ordered[..., above], place - below)

    share = grid.percentile / 100
    if grid.symmetric:
        bound = quantile(values.abs().sort(dim=-1).values, share)
        return -bound, bound
    ordered = values.sort(dim=-1).values
    return quantile(ordered, (1 - share) / 2), quantile(ordered, (1 + share) / 2)


def _least_squares(values: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of shrunken ranges, and of the scales that fit their codes best, the one of least weighted error.

    With levels c = q - z and the rest r = w - d c, a scale d + t has the error rᵀHr - 2t cᵀHr + t² cᵀHc,
    least at t = cᵀHr / cᵀHc. H is diagonal; with the blocks of a Hessian only the shrunken ranges themselves
    are judged, since rounding to nearest again, at another scale, need not lower such an error.
    """
    num_groups, size = values.shape[1:]
    blocks: Tensor | None = None
    diagonal: Tensor | None = None
    if importance is not None and importance.ndim == 2:
        blocks = torch.stack(
            [importance[i : i + size, i : i + size] for i in range(0, num_groups * size, size)]
        )
    elif importance is not None:
        diagonal = importance.view(1, num_groups, size)

    def weighted(x: Tensor) -> Tensor:
        if blocks is not None:
            return torch.einsum("nrl,rlm->nrm", x, blocks)
        return x if diagonal is None else x * diagonal

    low, high = _extremes(values)
    best = torch.full_like(low, torch.inf)
    scales, zeros = _affine(low, high, grid)
    for shrink in _SHRINKS[grid.bits]:
        d, z = _affine(low * shrink, high * shrink, grid)
        levels = nearest_levels(values, d[..., None], z[..., None], grid.max_code)
        rest = torch.addcmul(values, levels, d[..., None], value=-1)
        h_rest = weighted(rest)
        error = _dot(rest, h_rest)
        if blocks is None:
            slope, curvature = _dot(levels, h_rest), _dot(levels, weighted(levels))
            fitted = as_float16(d + slope / curvature.clamp(min=torch.finfo(d.dtype).tiny))
            change = fitted - d
            d, error = fitted, error - change * (2 * slope - change * curvature)
        better = error < best
        best = torch.where(better, error, best)
        scales, zeros = torch.where(better, d, scales), torch.where(better, z, zeros)
    return scales, zeros


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def _least_divergence(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Of shrunken ranges, the one whose codes keep most of the distribution: least KL(P ‖ Q).

    P is the histogram of the values clipped to the range, Q the same histogram of the values inside it, with
    the bins of one code levelled (empty bins stay empty).
    """
    n, num_groups, size = values.shape
    rows = values.reshape(-1, size)
    low, high = _extremes(rows)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    span = (high - low).clamp(min=torch.finfo(rows.dtype).tiny)
    num_bins = max(min(_KL_BINS, 1 << (grid.bits + 6)), 1 << grid.bits)
    bins = ((rows - low[:, None]) / span[:, None] * num_bins).long().clamp_(0, num_bins - 1)
    counts = torch.zeros(len(rows), num_bins, dtype=rows.dtype, device=rows.device)
    counts.scatter_add_(1, bins, torch.ones_like(rows))

    best = torch.full_like(low, torch.inf)
    kept = torch.ones_like(low)
    for shrink in np.linspace(1.0, 0.1, 91).tolist():
        divergence = _divergence(counts, shrink, (-low / span * num_bins), grid)
        better = divergence < best
        best, kept = torch.where(better, divergence, best), torch.where(better, shrink, kept)
    return _affine((low * kept).view(n, num_groups), (high * kept).view(n, num_groups), grid)


def _divergence(counts: Tensor, shrink: float, zero_bin: Tensor, grid: Grid) -> Tensor:
    """KL [M] between what is inside `shrink` of the range, outliers put on its ends, and its coded form."""
    num_bins = counts.shape[1]
    width = max(round(shrink * num_bins), grid.max_code + 1)
    first = (zero_bin * (1 - width / num_bins)).round_().long().clamp_(0, num_bins - width)
    inside = counts.gather(1, first[:, None] + torch.arange(width, device=counts.device))
    sums = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    below = sums.gather(1, first[:, None])[:, 0]
    above = sums[:, -1] - sums.gather(1, first[:, None] + width)[:, 0]

    codes = torch.arange(width, device=counts.device) * (grid.max_code + 1) // width
    filled = (inside > 0).to(counts.dtype)
    empty = torch.zeros(len(counts), grid.max_code + 1, dtype=counts.dtype, device=counts.device)
    mass = empty.index_add(1, codes, inside) / empty.index_add(1, codes, filled).clamp_(min=1)
    q = mass[:, codes] * filled
    p = inside.clone()
    p[:, 0] += below
    p[:, -1] += above
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True).clamp_(min=1)
    # An end with outliers only has q = 0: a floor keeps the sum finite and dear.
    return torch.where(p > 0, p * (p / q.clamp(min=1e-9)).log(), 0.0).sum(1)
