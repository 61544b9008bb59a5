"""Mixed precision: which linear gets how many bits, so that they buy the least divergence.

What a rounded weight costs is predicted for every linear and candidate grid from two measurements. The
Hessian H of its inputs says how far the outputs move: d = E x for the error E = W - Ŵ. Gradients of the
log-probability of tokens that the model itself draws say how much a moved output matters: to second order
KL = 1/2 dᵀ F d, F the Fisher information, of which the diagonal g² is kept (as Kronecker-factored curvature
does: Martens & Grosse 2015, arXiv:1503.05671). So

    KL = 1/2 sum_n mean(g_n²) (E mean(x xᵀ) Eᵀ)_nn

added up over all linears. One forward-backward pass gives all g, one calibration pass all H. The sum is then
scaled by what a model rounded that way really diverges by, and linears are upgraded in the order of
divergence saved for each bit, along the lower hull of every linear's choices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.compress.calibration import Calibration
from ridgeline.compress.differentiable import Values, window_logits
from ridgeline.compress.grids import Grid, dequantized, rtn
from ridgeline.compress.passes import CalibrationPass, InputStats, Progress, float_values
from ridgeline.compress.recipe import Recipe
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel
from ridgeline.quant.formats import group_format
from ridgeline.quant.weight import Weight

FISHER_WINDOWS = 4
CHECK_WINDOWS = 4
CHECK_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Choice:
    """One grid for one linear."""

    grid: Grid
    bits: float
    """of the whole tensor"""
    divergence: float
    """predicted, nats per token"""


def candidates(recipe: Recipe) -> list[Grid]:
    """The grids that a mixed recipe chooses from: its own, one of half the group, other bits.

    Without a search of ranges, which would take longest here and changes little in how they compare.
    """
    own = Grid(recipe.bits, recipe.group_size, symmetric=recipe.symmetric)
    found = [replace(own, bits=bits) for bits in (2, 3, 4)]
    if own.group_size is not None and own.group_size % 64 == 0:
        found += [replace(grid, group_size=own.group_size // 2) for grid in found]
    return [*found, Grid(8, recipe.group_size, symmetric=True)]


def allocate(
    model: LoadedModel, recipe: Recipe, calibration: Calibration, *, on_progress: Progress | None = None
) -> dict[str, Grid]:
    """A grid for every linear, by canonical name: at most `recipe.target_bpw` bits a weight over all of
    them, or the fewest bits at which the divergence is at most `recipe.max_kl`.

    Raises ConfigError where no mixture can keep the limit.
    """
    choices = sensitivities(model, candidates(recipe), calibration, on_progress=on_progress)
    if recipe.target_bpw is not None:
        num_weights = sum(model.weights[name].num_elements for name in choices)
        return _observed(upgrade(choices, max_bits=recipe.target_bpw * num_weights), recipe)
    assert recipe.max_kl is not None
    check = replace_windows(calibration, CHECK_WINDOWS)
    factor = 1.0
    for _ in range(CHECK_ROUNDS):
        grids = upgrade(choices, max_divergence=recipe.max_kl / factor)
        predicted = sum(
            choice.divergence
            for name, found in choices.items()
            for choice in found
            if choice.grid == grids[name]
        )
        factor = measured_divergence(model, grids, check) / max(predicted, 1e-12)
    return _observed(upgrade(choices, max_divergence=recipe.max_kl / factor), recipe)


def _observed(grids: dict[str, Grid], recipe: Recipe) -> dict[str, Grid]:
    """With the recipe's search of ranges for those of few bits."""
    return {
        name: grid if grid.bits == 8 else replace(grid, observer=recipe.observer)
        for name, grid in grids.items()
    }


def replace_windows(calibration: Calibration, count: int) -> Calibration:
    return replace(calibration, token_ids=calibration.token_ids[:count])


def sensitivities(
    model: LoadedModel,
    grids: list[Grid],
    calibration: Calibration,
    *,
    on_progress: Progress | None = None,
) -> dict[str, list[Choice]]:
    """Bits and predicted divergence of every linear on every grid that divides its rows."""
    fisher = output_fisher(model, replace_windows(calibration, FISHER_WINDOWS))
    choices: dict[str, list[Choice]] = {}

    class Measure:
        wants_hessian = True

        def visit(
            self, names: tuple[str, ...], inputs: InputStats, weights: Mapping[str, Weight]
        ) -> dict[str, Weight]:
            assert inputs.hessian is not None
            for name in names:
                if name not in fisher:
                    continue
                values = float_values(weights[name])
                choices[name] = []
                for grid in grids:
                    error = values - dequantized(rtn(values, grid), values)
                    # The Hessian is 2/n xᵀx, the formula wants the mean of x xᵀ: 1/2 · 1/2.
                    moved = ((error @ inputs.hessian) * error).sum(1)
                    divergence = float((moved * fisher[name]).sum()) / 4
                    choices[name].append(Choice(grid, _num_bits(values, grid), divergence))
            return {}

        def finish_layer(self, index: int, residual: Callable[[], npt.NDArray[np.float32]]) -> None:
            pass

    CalibrationPass(model, calibration, Measure(), on_progress=on_progress).run()
    return choices


def _num_bits(values: torch.Tensor, grid: Grid) -> float:
    fmt = group_format(grid.bits, grid.group_size or values.shape[1], symmetric=grid.symmetric)
    return values.numel() * fmt.bits_per_weight


def output_fisher(model: LoadedModel, calibration: Calibration) -> dict[str, torch.Tensor]:
    """mean(g²) [N] of the outputs of every linear: g the gradient of one token's log-probability.

    Tokens are drawn from the model's own predictions, which makes this the Fisher information and not the
    gradient of a loss that training has made small.
    """
    found: dict[str, torch.Tensor] = {}
    constants: dict[int, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(calibration.seed)

    def values(weight: Weight) -> Values:
        tensor = constants.setdefault(id(weight), float_values(weight))
        return lambda: tensor

    def watch(weight: Weight, output: torch.Tensor) -> None:
        if not output.requires_grad:
            output.requires_grad_()  # nothing before it does: no weight is trained here
        zero = torch.zeros(output.shape[1])

        def add(gradient: torch.Tensor) -> None:
            found[weight.name] = found.get(weight.name, zero) + gradient.square().sum(0)

        if weight.name.startswith("layers."):
            output.register_hook(add)  # type: ignore[no-untyped-call]

    logits = window_logits(model, values, max_model_len=calibration.length, watch=watch)
    for window in calibration.token_ids:
        log_p = logits([window]).log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()  # type: ignore[no-untyped-call]
    return {name: total / calibration.num_tokens for name, total in found.items()}


def measured_divergence(model: LoadedModel, grids: Mapping[str, Grid], calibration: Calibration) -> float:
    """Mean KL(model || model with its linears rounded to nearest on these grids)."""
    constants: dict[str, torch.Tensor] = {}

    def original(weight: Weight) -> Values:
        tensor = constants.setdefault(weight.name, float_values(weight))
        return lambda: tensor

    def rounded(weight: Weight) -> Values:
        tensor = constants[weight.name]
        if weight.name in grids:
            tensor = dequantized(rtn(tensor, grids[weight.name]), tensor)
        return lambda: tensor

    with torch.no_grad():
        base = window_logits(model, original, max_model_len=calibration.length)
        other = window_logits(model, rounded, max_model_len=calibration.length)
        total = 0.0
        for window in calibration.token_ids:
            p, q = base([window]).log_softmax(-1), other([window]).log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
    return total / calibration.num_tokens


def upgrade(
    choices: Mapping[str, list[Choice]],
    *,
    max_bits: float = math.inf,
    max_divergence: float = 0.0,
) -> dict[str, Grid]:
    """The grids reached by taking, from the smallest on, the upgrade that saves most for its bits.

    Stops before `max_bits` would be passed, skipping what is too large, and once the divergence is at most
    `max_divergence`. Raises ConfigError where no choice keeps the limits.
    """
    hulls = {name: _lower_hull(found) for name, found in choices.items()}
    current = dict.fromkeys(hulls, 0)
    bits = sum(hull[0].bits for hull in hulls.values())
    divergence = sum(hull[0].divergence for hull in hulls.values())
    if bits > max_bits:
        raise ConfigError(
            f"the smallest formats of this recipe take {bits / max_bits:.2f} times the allowed bits; "
            "raise the target"
        )
    steps = sorted(
        (
            ((before.divergence - after.divergence) / (after.bits - before.bits), name, i + 1)
            for name, hull in hulls.items()
            for i, (before, after) in enumerate(itertools.pairwise(hull))
        ),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    for _, name, i in steps:
        if divergence <= max_divergence:
            break
        before, after = hulls[name][current[name]], hulls[name][i]
        # Where a step was too large, those after it in the same linear start from further down.
        if bits + after.bits - before.bits <= max_bits:
            bits += after.bits - before.bits
            divergence += after.divergence - before.divergence
            current[name] = i
    if math.isinf(max_bits) and divergence > max_divergence:
        raise ConfigError(
            f"with the finest formats the predicted divergence is {divergence:.4g}, above the allowed "
            f"{max_divergence:.4g}; allow more"
        )
    return {name: hull[current[name]].grid for name, hull in hulls.items()}


def _lower_hull(choices: list[Choice]) -> list[Choice]:
    """Those that are best for some price of a bit, from the smallest to the largest."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.divergence)):
        if hull and choice.divergence >= hull[-1].divergence:
            continue
        while len(hull) > 1 and _slope(hull[-2], choice) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(before: Choice, after: Choice) -> float:
    return (before.divergence - after.divergence) / (after.bits - before.bits)
