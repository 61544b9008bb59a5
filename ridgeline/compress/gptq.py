"""GPTQ: round one input column at a time and let the columns not yet rounded make up for it.

Frantar et al. 2022, arXiv:2210.17323. To minimise tr(E H Eᵀ), E = W - Ŵ, H = Xᵀ X of the inputs: with
H⁻¹ = Uᵀ U, U upper triangular, column i is rounded, e = (w_i - ŵ_i) / U_ii, and the later columns become
w_j - e U_ij, those outside a small block lazily, in products (the paper's lazy blocks, halved recursively).

U needs one factorisation: with P the reversal of order, P H P = L Lᵀ gives U = P L⁻¹ P. Rows of W are
independent, so weights that read the same input share U, and are solved stacked, in one pass.

Act-order solves the columns with the largest H_ii first, while most others can still make up for it.
"static" fixes the grid of every group beforehand and leaves columns where they are; "full" (desc_act) finds
groups and their grids along the solving order, and the weight is stored in it; "none" finds a group's grid
on the already updated weights when the group starts.

Letters: N x K a weight (out x in), R groups of a row, L = K / R. Columns of W are kept as rows here: [K, N].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.compress.grids import Grid, Tensor, dequantize_codes, find_scales, groups_of, output_error
from ridgeline.errors import ConfigError
from ridgeline.logs import logger
from ridgeline.quant.groups import Groups

ActOrder = Literal["none", "static", "full"]

_MAX_DAMP = 1.0
ROWS_AT_ONCE = 1024
"""With blocks of 32 columns no step is large enough for torch to start threads, which would cost more."""


@dataclass(frozen=True, slots=True)
class GptqConfig:
    damp: float = 0.01
    """added to the diagonal of H, times its mean; grows tenfold as long as H cannot be factorised"""
    block_size: int = 32
    """columns handled one by one between two products; changes speed, and nothing but rounding errors"""
    act_order: ActOrder = "static"

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= _MAX_DAMP or self.block_size < 1:
            raise ConfigError(
                f"damp {self.damp}, block_size {self.block_size}: expected a damp of 0 to {_MAX_DAMP:g} "
                "and a positive block size"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A Hessian made ready: shared by all weights that read the same input."""

    upper: Tensor
    """U float64 [K, K] in solving order, (H + damp mean(diag H) I)⁻¹ = Uᵀ U, or the identity"""
    order: Tensor
    """int64 [K], input feature at each place of the solving order"""
    damp: float
    """the one used; infinite: the identity stands for H, which makes GPTQ round to nearest"""
    num_dead: int
    """features that were zero in all of the calibration"""


@dataclass(frozen=True, slots=True, eq=False)
class GptqResult:
    groups: Groups
    order: npt.NDArray[np.int32] | None
    """[K] with act-order "full": stored column j is input feature order[j]"""
    damp: float
    num_dead: int
    error: float
    """`output_error` under the Hessian without damping"""


def conditioned(hessian: Tensor) -> tuple[Tensor, float]:
    """H in float64 with dead features replaced, and the mean of its diagonal without them.

    A dead feature (H_ii = 0) moves no output. It is cut off from the others and gets their mean, so it is
    rounded to nearest by itself: a feature that calibration did not wake still works.
    """
    if not hessian.isfinite().all():
        raise ConfigError("a Hessian holds NaN or infinity: inputs overflowed during calibration; check them")
    diagonal = hessian.diagonal().double()
    dead = diagonal <= 0
    mean = 1.0 if dead.all() else float(diagonal[~dead].mean())
    h = torch.where(dead[:, None] | dead, 0.0, hessian.double())
    h.diagonal()[dead] = mean
    return h, mean


def factorize(hessian: Tensor, config: GptqConfig) -> Factor:
    """Factor of a Hessian [K, K] (any scale), in float64.

    Where the factorisation fails, the damping grows; at last the identity stands in. Both are logged.
    """
    h, mean = conditioned(hessian)
    num_dead = int((hessian.diagonal() <= 0).sum())
    if config.act_order == "none":
        order = torch.arange(len(h), device=h.device)
    else:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    backwards = h[order][:, order].flip(0, 1)
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device)

    damp = config.damp
    while damp <= _MAX_DAMP:
        lower, failed = torch.linalg.cholesky_ex(torch.add(backwards, identity, alpha=damp * mean))
        if not failed:
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if upper.isfinite().all():
                if damp != config.damp:
                    logger.warning(
                        "GPTQ: a Hessian of %d inputs is singular; damping raised from %g to %g",
                        len(h),
                        config.damp,
                        damp,
                    )
                return Factor(upper, order, damp, num_dead)
        damp = max(10 * damp, 1e-3)
    logger.warning(
        "GPTQ: a Hessian of %d inputs cannot be factorised even with damping %g; its weights are rounded to "
        "nearest. Give more calibration text",
        len(h),
        _MAX_DAMP,
    )
    return Factor(identity, order, math.inf, num_dead)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    config: GptqConfig | None = None,
    *,
    factor: Factor | None = None,
) -> GptqResult:
    """Codes of weight [N, K] for the Hessian [K, K] of its inputs; computed in the weight's dtype.

    `factor`: of the same Hessian and config, where several weights share it.
    """
    return gptq_stacked([weight], hessian, grid, config, factor=factor)[0]


def gptq_stacked(
    weights: Sequence[Tensor],
    hessian: Tensor,
    grid: Grid,
    config: GptqConfig | None = None,
    *,
    factor: Factor | None = None,
) -> list[GptqResult]:
    """`gptq` of several weights that read the same input, in one pass over their stacked rows."""
    config = config or GptqConfig()
    k = len(hessian)
    if any(w.shape[1] != k for w in weights) or hessian.shape != (k, k):
        raise ConfigError(
            f"weights {[tuple(w.shape) for w in weights]} and Hessian {tuple(hessian.shape)} do not fit: "
            "expected [N, K] and [K, K]"
        )
    if grid.per_tensor and len(weights) > 1:
        return [r for w in weights for r in gptq_stacked([w], hessian, grid, config, factor=factor)]
    factor = factor or factorize(hessian, config)
    stacked = torch.cat(list(weights))
    codes, scales, zeros = _solve(stacked, grid, config, factor)

    # Stored place -> input feature; the inverse puts values where the Hessian has them.
    order = factor.order if config.act_order == "full" else None
    values = dequantize_codes(codes, scales, zeros)
    values = values if order is None else values[:, order.argsort()]
    results: list[GptqResult] = []
    start = 0
    for weight in weights:
        rows = slice(start, start := start + len(weight))
        results.append(
            GptqResult(
                groups_of(codes[rows], scales[rows], zeros[rows], grid),
                None if order is None else order.to(torch.int32).cpu().numpy(),
                factor.damp,
                factor.num_dead,
                output_error(weight, values[rows], hessian),
            )
        )
    return results


def _solve(weight: Tensor, grid: Grid, config: GptqConfig, factor: Factor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K] as they are stored, scales and zeros [N, R]."""
    k = weight.shape[1]
    order, upper = factor.order, factor.upper
    # e U_ij = (w - ŵ) U_ij / U_ii: divided once. An error costs U_ii⁻² (w - ŵ)².
    scaled = (upper / upper.diagonal()[:, None]).to(weight.dtype)
    cost = upper.diagonal().pow(-2).to(weight.dtype)
    group = (torch.arange(k, device=order.device) // (k // grid.num_groups(k))).tolist()
    fixed: tuple[Tensor, Tensor] | None = None
    if grid.per_tensor or config.act_order == "static":
        fixed = find_scales(weight, grid, importance=torch.empty_like(cost).index_copy_(0, order, cost))
        group = [group[j] for j in order.tolist()]

    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        w = weight[rows].t()[order].contiguous()
        grids = None if fixed is None else (fixed[0][rows], fixed[1][rows])
        found.append(solve_rows(w, scaled, cost, grid, config.block_size, group, grids))
    codes, d, z = (torch.cat(parts, 1).t().contiguous() for parts in zip(*found, strict=True))
    return codes[:, order.argsort()] if config.act_order == "static" else codes, d, z


def solve_rows(
    w: Tensor,
    scaled: Tensor,
    cost: Tensor,
    grid: Grid,
    block_size: int,
    group: list[int],
    fixed: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [K, N] of w [K, N], scales and zeros [R, N]; columns in solving order, `group` the group of each.

    `fixed`: scales and zeros [N, R]; None: found when a group starts. Overwrites w.
    """
    k, n = w.shape
    size = k // (group[-1] + 1) if fixed is None else None
    levels, errors = torch.empty_like(w), torch.empty_like(w)
    d, z = (x.t().contiguous() for x in fixed) if fixed else w.new_zeros(2, group[-1] + 1, n)
    low, high = -z, grid.max_code - z
    one_group = replace(grid, group_size=None)

    for start, middle, end in lazy_updates(0, k, block_size, size):
        if end is not None:
            w[middle:end].addmm_(scaled[start:middle, middle:end].t(), errors[start:middle], alpha=-1)
            continue
        for j in range(start, middle):
            g = group[j]
            if size is not None and j % size == 0:
                found = find_scales(w[j : j + size].t(), one_group, importance=cost[j : j + size])
                d[g], z[g] = found[0][:, 0], found[1][:, 0]
                low[g], high[g] = -z[g], grid.max_code - z[g]
            level, error = levels[j], errors[j]
            torch.div(w[j], d[g], out=level)
            torch.clamp(level.round_(), low[g], high[g], out=level)
            torch.addcmul(w[j], level, d[g], value=-1, out=error)
            w[j + 1 : middle].addr_(scaled[j, j + 1 : middle], error, alpha=-1)
    return levels.add_(z[group]).to(torch.uint8), d, z


def lazy_updates(
    start: int, end: int, block_size: int, group_size: int | None = None
) -> Iterator[tuple[int, int, int | None]]:
    """The order of work that brings columns up to date as late, and in products as large, as can be.

    (start, end, None): work on these columns one by one, each updating those behind it.
    (start, middle, end): update the columns from middle to end by those from start to middle.

    Where a group (of group_size columns, counted from 0) starts, all its columns are up to date.
    """
    whole_groups = (end - start) // group_size if group_size else 0
    if end - start <= block_size and whole_groups <= 1:
        yield start, end, None
        return
    half = (whole_groups + 1) // 2 * group_size if group_size and whole_groups > 1 else (end - start) // 2
    middle = start + half
    yield from lazy_updates(start, middle, block_size, group_size)
    yield start, middle, end
    yield from lazy_updates(middle, end, block_size, group_size)
