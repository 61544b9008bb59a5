"""Scales that move difficulty from one side of a product to the other and leave the product as it was.

    x @ Wᵀ = (x / s) @ (W * s)ᵀ        s [K], one number for each input feature

The division costs nothing when whatever produces x is divided instead: the gain of a norm for q, k, v and
gate, up; the rows of up_proj for down_proj, which the gate only multiplies; the rows of v_proj for o_proj,
since attention only averages them. Under GQA several query heads read one KV head, so that their features
share a scale: `Producer.rows` says which feature comes from which row, and statistics are reduced along it.

- SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): s = max|x|^a / max|W|^(1-a), for 8-bit activations.
- AWQ (Lin et al. 2023, arXiv:2306.00978): s = mean|x|^a / mean|w|^(1-a), for few-bit weights; the second
  factor ("duo scaling", where |w| is relative to its group's largest) is a later addition of most tools.

Both exponents are searched by the error of the layers' outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ridgeline.compress.grids import Grid, find_scales, quantize_to
from ridgeline.compress.passes import InputStats, float_values
from ridgeline.config import ModelConfig
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.groups import Groups, pack_groups, unpack_groups
from ridgeline.quant.weight import Weight

AWQ_STEPS = 20
SMOOTH_STEPS = 10
SMOOTH_ROWS = 512
MIN_SCALE = 1e-4


@dataclass(frozen=True, slots=True)
class Producer:
    """What an input is made of: dividing row rows[j] of the weight `name` divides feature j."""

    name: str
    rows: torch.Tensor
    """int64 [K]"""
    num_rows: int
    offset: float
    """of a norm, which multiplies by offset + weight"""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Scales of a producer's rows, and what they were chosen for."""

    scales: torch.Tensor
    """float32 [rows of the producer]; features divide by scales[producer.rows]"""
    alpha: float | None
    """None: all ones were best"""
    error: float
    """squared error of the outputs, in units of that without scales"""


def producer_of(config: ModelConfig, names: Sequence[str]) -> Producer | None:
    """Of the linears `names`, which read one input; None for the head, whose norm may serve a tied table."""
    prefix, _, kind = names[0].rpartition(".")
    if kind in ("q_proj", "gate_proj"):
        norm = "input_norm" if kind == "q_proj" else "mlp_norm"
        rows = torch.arange(config.hidden_size)
        return Producer(f"{prefix}.{norm}", rows, config.hidden_size, config.norm_offset)
    if kind == "down_proj":
        rows = torch.arange(config.intermediate_size)
        return Producer(f"{prefix}.up_proj", rows, config.intermediate_size, 0.0)
    if kind == "o_proj":
        heads = torch.arange(config.num_heads) // config.num_q_per_kv
        rows = heads[:, None] * config.head_dim + torch.arange(config.head_dim)
        return Producer(f"{prefix}.v_proj", rows.flatten(), config.num_kv_heads * config.head_dim, 0.0)
    return None


def divide_producer(
    producer: Producer, scales: torch.Tensor, weights: Mapping[str, Weight]
) -> dict[str, Weight]:
    """The producer, and its bias, with every row divided by its scale.

    Rows of integer codes keep them: their group scales are divided, and rounded as they are stored.
    """
    weight = weights[producer.name]
    changed = {producer.name: _divided(weight, scales, producer.offset)}
    bias = f"{producer.name}.bias"
    if bias in weights:
        changed[bias] = _divided(weights[bias], scales, 0.0)
    return changed


def _divided(weight: Weight, scales: torch.Tensor, offset: float) -> Weight:
    if weight.format.codes is not None:
        groups = unpack_groups(weight.data, weight.format)
        divided = groups.scales / scales.numpy()[:, None]
        stored = weight.format.codes.scale
        if stored == "F16":
            divided = divided.astype(np.float16).astype(np.float32)
        groups = Groups(groups.bits, groups.q, divided, groups.zeros)
        return replace(weight, buffers={**weight.buffers, "data": pack_groups(groups, stored)[1]})
    values = float_values(weight)
    rows = scales if values.dim() == 1 else scales[:, None]
    values = (values + offset) / rows - offset
    return Weight(weight.name, FORMATS["F32"], weight.shape, {"data": values.numpy()}, weight.activation)


def scaled_inputs(inputs: InputStats, scales: torch.Tensor) -> InputStats:
    """The statistics of x / s for s [K]."""
    hessian = inputs.hessian
    if hessian is not None:
        hessian = hessian / scales[:, None] / scales
    return replace(
        inputs,
        hessian=hessian,
        mean_abs=inputs.mean_abs / scales,
        max_abs=inputs.max_abs / scales,
        mean_square=inputs.mean_square / scales.square(),
        sample=inputs.sample / scales,
    )


def _largest(values: torch.Tensor, producer: Producer) -> torch.Tensor:
    return torch.zeros(producer.num_rows).scatter_reduce(0, producer.rows, values, "amax")


def _mean(values: torch.Tensor, producer: Producer) -> torch.Tensor:
    start = torch.zeros(producer.num_rows)
    return start.scatter_reduce(0, producer.rows, values, "mean", include_self=False)


def smooth_scales(
    inputs: InputStats, weights: Sequence[torch.Tensor], producer: Producer, *, alpha: float
) -> torch.Tensor:
    """SmoothQuant's scales [rows of the producer] at an exponent, their geometric mean brought to 1.

    Features that never occur keep 1.
    """
    largest_x = _largest(inputs.max_abs, producer)
    largest_w = _largest(torch.cat([w.abs() for w in weights]).amax(0), producer)
    scales = largest_x.pow(alpha) / largest_w.clamp(min=1e-5).pow(1 - alpha)
    alive = (largest_x > 0) & (largest_w > 0)
    scales = scales.clamp(min=1e-5) / scales[alive].log().mean().exp()
    return torch.where(alive, scales, 1.0)


def search_smooth(
    inputs: InputStats,
    weights: Sequence[torch.Tensor],
    grids: Sequence[Grid],
    producer: Producer,
    *,
    is_static: bool,
) -> Scaling:
    """The exponent at which the product of rounded inputs and rounded weights is nearest to the exact one."""
    x = inputs.sample[:: max(1, len(inputs.sample) // SMOOTH_ROWS)]

    def error(scales: torch.Tensor) -> float:
        per_feature = scales[producer.rows]
        divided = x / per_feature
        largest = (inputs.max_abs / per_feature).amax() if is_static else divided.abs().amax(1, keepdim=True)
        d = largest.clamp(min=1e-12) / 127
        rounded = (divided / d).round().clamp(-127, 127) * d
        total = 0.0
        for weight, grid in zip(weights, grids, strict=True):
            exact = x @ weight.T
            total += float((rounded @ fake_quantize(weight * per_feature, grid).T - exact).square().sum())
        return total

    ones = torch.ones(producer.num_rows)
    return _best(
        ones,
        [
            (i / SMOOTH_STEPS, smooth_scales(inputs, weights, producer, alpha=i / SMOOTH_STEPS))
            for i in range(SMOOTH_STEPS + 1)
        ],
        error,
    )


def awq_scales(
    inputs: InputStats,
    weights: Sequence[torch.Tensor],
    grids: Sequence[Grid],
    producer: Producer,
    *,
    alpha: float,
) -> torch.Tensor:
    """AWQ's scales [rows of the producer] with duo scaling, normalised to sqrt(largest * smallest) = 1."""
    mean_x = _mean(inputs.mean_abs, producer)
    mean_w = _mean(
        torch.cat([_relative(w, g) for w, g in zip(weights, grids, strict=True)]).mean(0), producer
    )
    scales = (mean_x.pow(alpha) / (mean_w.pow(1 - alpha) + 1e-4)).clamp(min=MIN_SCALE)
    scales = scales / (scales.amax() * scales.amin()).sqrt()
    return torch.where(mean_x > 0, scales, 1.0)


def _relative(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """|w| over the largest of its group."""
    groups = weight.abs().view(len(weight), -1, grid.group_size or weight.shape[1])
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).view_as(weight)


def search_awq(
    inputs: InputStats, weights: Sequence[torch.Tensor], grids: Sequence[Grid], producer: Producer
) -> Scaling:
    """The exponent with the smallest error of the outputs, tr(E H Eᵀ) with E = Q(W s)/s - W, summed over
    the linears; each is weighed by the size of its output."""
    hessian = inputs.hessian
    assert hessian is not None
    # Ranges are searched after the scales, as in the paper: both at once would take twenty times as long.
    grids = [replace(grid, observer="minmax") for grid in grids]
    sizes = [max(float(((w @ hessian) * w).sum()), 1e-30) for w in weights]

    def error(scales: torch.Tensor) -> float:
        per_feature = scales[producer.rows]
        total = 0.0
        for weight, grid, size in zip(weights, grids, sizes, strict=True):
            difference = fake_quantize(weight * per_feature, grid) / per_feature - weight
            total += float(((difference @ hessian) * difference).sum()) / size
        return total

    candidates = [
        (i / AWQ_STEPS, awq_scales(inputs, weights, grids, producer, alpha=i / AWQ_STEPS))
        for i in range(AWQ_STEPS)
    ]
    return _best(torch.ones(producer.num_rows), candidates, error)


def _best(
    ones: torch.Tensor, candidates: list[tuple[float, torch.Tensor]], error: Callable[[torch.Tensor], float]
) -> Scaling:
    baseline = max(error(ones), 1e-30)
    best = Scaling(ones, None, 1.0)
    for alpha, scales in candidates:
        found = error(scales) / baseline
        if found < best.error:
            best = Scaling(scales, alpha, found)
    return best


def fake_quantize(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round to nearest on a grid and back: float32 [N, K]."""
    scales, zeros = find_scales(weight, grid)
    codes = quantize_to(weight, scales, zeros, grid.bits)
    grouped = codes.to(torch.float32).view(*scales.shape, -1)
    return ((grouped - zeros[:, :, None]) * scales[:, :, None]).view_as(weight)
