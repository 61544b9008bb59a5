"""Better codes and scales for a weight that is quantized already, under the Hessian of its inputs.

All of it lowers f(Ŵ) = tr(E (H + damp mean(diag H) I) Eᵀ), E = W - Ŵ, the output error that GPTQ lowers
greedily. Nothing here ever raises it: rows are independent, and one that came out worse keeps what it had.

`refine`: coordinate descent. With all other codes fixed, f is a parabola in one weight with its minimum at
ŵ_j + (E H)_j / H_jj, so the nearest code to that is optimal; sweeps over the columns alternate with the
scales that fit the codes best: f is quadratic in the R scales of a row, too.

`learned_rounding`: AdaRound (Nagel et al. 2020, arXiv:2004.10568) on f: every weight chooses between its code
and the neighbour on the side of that minimum through a rectified sigmoid, which a regulariser drives to 0 or
1 while gradient descent moves all weights at once. Coordinate descent then finishes what it found.

Letters: N x K a weight (out x in), R groups of a row, L = K / R. Sweeps keep columns as rows: [K, N].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.compress.gptq import ROWS_AT_ONCE, conditioned, lazy_updates
from ridgeline.compress.grids import Tensor, as_float16, tensors_of
from ridgeline.quant.groups import Groups

Order = npt.NDArray[np.int32]

_BLOCK = 32
_STRETCH = 0.1  # AdaRound's zeta - 1 = -gamma: how far the sigmoid reaches beyond 0 and 1


def refine(
    weight: Tensor,
    hessian: Tensor,
    groups: Groups,
    *,
    sweeps: int = 4,
    damp: float = 0.01,
    order: Order | None = None,
) -> Groups:
    """Groups of weight [N, K] for the Hessian [K, K] with f no larger in any row; in the weight's dtype.

    `order` int32 [K] of a weight stored in act-order. A sweep visits each column once and refits the scales.
    """
    return _swept(_State.of(weight, hessian, groups, damp, order), sweeps).groups(groups)


def learned_rounding(
    weight: Tensor,
    hessian: Tensor,
    groups: Groups,
    *,
    steps: int = 50,
    learning_rate: float = 0.05,
    damp: float = 0.01,
    order: Order | None = None,
    sweeps: int = 2,
) -> Groups:
    """Groups of weight [N, K] with f no larger in any row: AdaRound from these groups on, then `refine`."""
    state = _State.of(weight, hessian, groups, damp, order)
    learned = _swept(_learn(state, steps, learning_rate), sweeps)
    better = learned.cost() < state.cost()
    return state.replaced_where(better, learned).groups(groups)


def _swept(state: _State, sweeps: int) -> _State:
    product = state.product()
    for _ in range(sweeps):
        state.descend(product)
        product = state.refit_scales()
    return state


@dataclass(slots=True, eq=False)
class _State:
    """A weight and the codes and scales found so far. Owns these; w, h and zeros are only read."""

    w: Tensor
    """[N, K], columns as stored"""
    h: Tensor
    """[K, K] with damping, rows and columns as stored"""
    levels: Tensor
    """[N, K] floats, q - z"""
    scales: Tensor
    zeros: Tensor
    """[N, R]"""
    max_code: int

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor, groups: Groups, damp: float, order: Order | None) -> _State:
        h, mean = conditioned(hessian)
        h.diagonal().add_(damp * mean)
        h = h.to(weight.dtype)
        if order is not None:
            places = torch.from_numpy(order).to(weight.device, torch.int64)
            weight, h = weight[:, places], h[places][:, places]
        codes, scales, zeros = tensors_of(groups, weight)
        levels = codes.view(*scales.shape, -1) - zeros[..., None]
        return cls(weight, h, levels.view(weight.shape), scales, zeros, (1 << groups.bits) - 1)

    def values(self) -> Tensor:
        """Ŵ [N, K]."""
        return (self.levels.view(*self.scales.shape, -1) * self.scales[..., None]).view(self.w.shape)

    def product(self) -> Tensor:
        """E H [N, K]."""
        return (self.w - self.values()) @ self.h

    def cost(self, product: Tensor | None = None) -> Tensor:
        """f of every row [N]; product: E H where that is known."""
        product = self.product() if product is None else product
        return (product * (self.w - self.values())).sum(1)

    def replaced_where(self, better: Tensor, other: _State) -> _State:
        """This state with the rows of another."""
        return replace(
            self,
            levels=torch.where(better[:, None], other.levels, self.levels),
            scales=torch.where(better[:, None], other.scales, self.scales),
        )

    def groups(self, like: Groups) -> Groups:
        codes = self.levels.view(*self.scales.shape, -1) + self.zeros[..., None]
        return replace(
            like,
            q=codes.view(self.w.shape).to(torch.uint8).cpu().numpy(),
            scales=self.scales.float().cpu().numpy(),
        )

    def descend(self, product: Tensor) -> None:
        """Visit every column once and move each weight to the best code given all others; product: E H."""
        rows = (self.values(), product, self.scales, self.zeros)
        parts = zip(*(torch.split(x, ROWS_AT_ONCE) for x in rows), strict=True)
        self.levels = torch.cat([self._descend_rows(*part) for part in parts])

    def _descend_rows(self, values: Tensor, gradient: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """New levels [N, K] of some rows, from Ŵ and E H [N, K]."""
        values, gradient, d, z = (x.t().contiguous() for x in (values, gradient, scales, zeros))
        k = len(values)
        size = k // len(d)
        low, high = -z, self.max_code - z
        levels, moves = torch.empty_like(values), torch.empty_like(values)
        inverse_curvature = (1 / self.h.diagonal()).tolist()
        for start, middle, end in lazy_updates(0, k, _BLOCK):
            if end is not None:
                gradient[middle:end].addmm_(
                    self.h[start:middle, middle:end].t(), moves[start:middle], alpha=-1
                )
                continue
            for j in range(start, middle):
                g, level, move = j // size, levels[j], moves[j]
                torch.add(values[j], gradient[j], alpha=inverse_curvature[j], out=level)
                torch.clamp(level.div_(d[g]).round_(), low[g], high[g], out=level)
                torch.mul(level, d[g], out=move).sub_(values[j])
                gradient[j + 1 : middle].addr_(self.h[j, j + 1 : middle], move, alpha=-1)
        return levels.t()

    def refit_scales(self) -> Tensor:
        """Take the scales that fit the codes best: d + t, (Cᵀ H C) t = Cᵀ H e, C [K, R] the row's levels.

        A row keeps its scales where rounding to float16 made the new ones worse. Returns E H.
        """
        n, num_groups = self.scales.shape
        size = self.w.shape[1] // num_groups
        product = self.product()
        normal = self.w.new_zeros(n, num_groups, num_groups)
        for g in range(num_groups):
            part, behind = slice(g * size, (g + 1) * size), slice(g * size, None)
            products = (self.levels[:, part] @ self.h[part, behind]).mul_(self.levels[:, behind])
            normal[:, g, g:] = products.view(n, num_groups - g, size).sum(2)
        normal += normal.triu(1).transpose(1, 2)
        slope = (product * self.levels).view(n, num_groups, size).sum(2)

        diagonal = normal.diagonal(dim1=1, dim2=2)
        empty = diagonal <= 0  # all levels 0: any scale will do
        diagonal += torch.where(empty, 1.0, 1e-6 * diagonal)
        fitted = self.scales + torch.linalg.solve(normal.double(), slope.double()).to(self.w.dtype)
        usable = (fitted > 0) & fitted.isfinite()
        other = replace(self, scales=torch.where(usable, as_float16(fitted), self.scales))
        other_product = other.product()
        better = (other.cost(other_product) < self.cost(product))[:, None]
        self.scales = torch.where(better, other.scales, self.scales)
        return torch.where(better, other_product, product)


def _learn(state: _State, steps: int, learning_rate: float) -> _State:
    """AdaRound: choices between levels and their neighbours, by gradient descent on f and a regulariser."""
    rest = state.w - state.values()
    d = state.scales.repeat_interleave(state.w.shape[1] // state.scales.shape[1], 1)
    z = state.zeros.repeat_interleave(state.w.shape[1] // state.scales.shape[1], 1)
    wish = (rest @ state.h) / state.h.diagonal() / d  # in levels, from where it is
    neighbour = (state.levels + torch.where(wish >= 0, 1.0, -1.0)).clamp_(-z, state.max_code - z)
    step = (neighbour - state.levels) * d

    # h = 0 stays, h = 1 moves; it starts where the wish is, short of the middle.
    share = wish.abs().clamp_(0.0, 0.5).mul_(0.98)
    v = torch.logit((share + _STRETCH) / (1 + 2 * _STRETCH)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=learning_rate)
    # A row's whole error counts as much as the regulariser of its weights does.
    unit = state.w.shape[1] / state.cost()[:, None].clamp(min=torch.finfo(v.dtype).tiny)
    for i in range(steps):
        with torch.enable_grad():
            h = (v.sigmoid() * (1 + 2 * _STRETCH) - _STRETCH).clamp(0, 1)
            progress = i / steps
            sharpness = 20 - 18 * progress  # from a regulariser of the undecided to one of all
            loss = (1 - (2 * h - 1).abs().pow(sharpness)).sum() * (0.1 * (progress > 0.2))
            slope = -2 * ((rest - step * h.detach()) @ state.h) * step * unit
            optimizer.zero_grad()
            (loss + (slope * h).sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    moved = (v.detach() > 0).to(d.dtype)
    return replace(state, levels=torch.lerp(state.levels, neighbour, moved).round_())
