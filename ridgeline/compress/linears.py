"""The linears of a recipe, as the calibration pass meets them: scales, then codes, then what was measured.

`LinearQuantizer` is the visitor of a pass (`passes`). For each input it looks for scales that make its
linears easier to round (`scaling`), folds them into what produces the input, and chooses the codes of
linears that share a grid at once (`grids`, `gptq`, `rounding`), for the Hessian of the scaled input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.compress.gptq import gptq_stacked
from ridgeline.compress.grids import Grid, output_error, rtn
from ridgeline.compress.keys import smooth_keys
from ridgeline.compress.passes import InputStats, float_values
from ridgeline.compress.recipe import Recipe
from ridgeline.compress.resume import WorkDirectory
from ridgeline.compress.rounding import learned_rounding, refine
from ridgeline.compress.scaling import (
    Producer,
    Scaling,
    divide_producer,
    producer_of,
    scaled_inputs,
    search_awq,
    search_smooth,
    smooth_scales,
)
from ridgeline.models.load import LoadedModel
from ridgeline.quant.groups import Groups, pack_groups
from ridgeline.quant.weight import ActivationQuant, Weight

STATIC_STEPS = 40


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What was done to one tensor."""

    name: str
    format: str
    bits_per_weight: float
    weight_error: float
    """‖W - Ŵ‖ / ‖W‖, of the weights after scaling"""
    output_error: float | None = None
    """‖X (W - Ŵ)ᵀ‖ / ‖X Wᵀ‖ over the calibration tokens; None without calibration"""
    damp: float | None = None
    """of GPTQ, as finally used"""
    num_dead: int | None = None
    """inputs that no calibration token has"""
    alpha: float | None = None
    """exponent of the scales; None: unscaled"""
    seconds: float = 0.0


def assembled(model: LoadedModel, weights: Mapping[str, Weight]) -> LoadedModel:
    """The model with these weights in place of its own; a tied head follows the embedding."""
    is_tied = model.weights["lm_head"] is model.weights["embed_tokens"]
    changed = {**model.weights, **weights}
    if is_tied:
        changed["lm_head"] = changed["embed_tokens"]
    return replace(model, weights=changed)


def packed(name: str, groups: Groups, activation: ActivationQuant | None = None, **buffers: Any) -> Weight:
    fmt, rows = pack_groups(groups)
    return Weight(name, fmt, groups.q.shape, {"data": rows, **buffers}, activation)


def report_on(
    weight: Weight,
    values: torch.Tensor,
    quantized: torch.Tensor | None = None,
    *,
    seconds: float = 0.0,
    **measured: Any,
) -> TensorReport:
    """On what `values` became; `quantized`: the values of the weight, where they are known already."""
    difference = float(((float_values(weight) if quantized is None else quantized) - values).norm())
    return TensorReport(
        weight.name,
        weight.format.name,
        8 * weight.num_bytes / weight.num_elements,
        difference / max(float(values.norm()), 1e-30),
        seconds=seconds,
        **measured,
    )


class LinearQuantizer:
    """The visitor of a recipe: owns what is known about the linears that are done."""

    wants_hessian = True

    def __init__(
        self, model: LoadedModel, recipe: Recipe, grids: Mapping[str, Grid], directory: WorkDirectory | None
    ) -> None:
        self.model = model
        self.report: list[TensorReport] = []
        self._recipe = recipe
        self._grids = grids
        self._directory = directory
        self._layer: dict[str, Weight] = {}
        self._num_stored = 0

    def resume(self) -> tuple[int, npt.NDArray[np.float32] | None]:
        """Take over finished layers -> the first one to do and its input."""
        if self._directory is None:
            return 0, None
        first_layer, weights, reports, state = self._directory.load()
        self.model = assembled(self.model, weights)
        self.report = [TensorReport(**entry) for entry in reports]
        self._num_stored = len(self.report)
        return first_layer, state

    def visit(
        self, names: tuple[str, ...], inputs: InputStats, weights: Mapping[str, Weight]
    ) -> dict[str, Weight]:
        if names == ("lm_head",):
            return {}
        changed: dict[str, Weight] = {}
        if self._recipe.smooth_keys and names[0].endswith(".q_proj"):
            changed = smooth_keys(self.model.config, names[0].rpartition(".")[0], inputs, weights)
        values = [float_values(changed.get(name) or weights[name]) for name in names]
        scaling = None
        if self._recipe.scaling != "none":
            producer = producer_of(self.model.config, names)
            assert producer is not None
            scaling = self._scaling(names, values, inputs, producer)
            if scaling.alpha is not None:
                changed.update(divide_producer(producer, scaling.scales, weights))
                per_feature = scaling.scales[producer.rows]
                values = [v * per_feature for v in values]
                inputs = scaled_inputs(inputs, per_feature)
        activation = self._activation(inputs)
        for grid in dict.fromkeys(self._grids[name] for name in names):
            members = [i for i, name in enumerate(names) if self._grids[name] == grid]
            changed.update(
                self._solve(
                    [names[i] for i in members],
                    [values[i] for i in members],
                    grid,
                    inputs,
                    scaling,
                    activation,
                )
            )
        self._layer.update(changed)
        return changed

    def finish_layer(self, index: int, residual: Callable[[], npt.NDArray[np.float32]]) -> None:
        if self._directory is not None:
            reports = [asdict(entry) for entry in self.report[self._num_stored :]]
            self._directory.store(index, self._layer.values(), reports, residual)
        self._layer = {}
        self._num_stored = len(self.report)

    def _scaling(
        self,
        names: tuple[str, ...],
        values: list[torch.Tensor],
        inputs: InputStats,
        producer: Producer,
    ) -> Scaling:
        recipe, grids = self._recipe, [self._grids[name] for name in names]
        if recipe.scaling == "awq":
            return search_awq(inputs, values, grids, producer)
        if recipe.alpha is not None:
            return Scaling(smooth_scales(inputs, values, producer, alpha=recipe.alpha), recipe.alpha, 1.0)
        return search_smooth(inputs, values, grids, producer, is_static=recipe.activation == "static")

    def _activation(self, inputs: InputStats) -> ActivationQuant | None:
        if self._recipe.activation != "static":
            return self._recipe.dynamic_activation
        return ActivationQuant(static_scale=_static_scale(inputs))

    def _solve(
        self,
        names: list[str],
        values: list[torch.Tensor],
        grid: Grid,
        inputs: InputStats,
        scaling: Scaling | None,
        activation: ActivationQuant | None,
    ) -> dict[str, Weight]:
        """Codes of linears with the same input and grid, together: they share the factorised Hessian."""
        recipe, hessian = self._recipe, inputs.hessian
        assert hessian is not None
        began = time.perf_counter()
        order = damp = num_dead = None
        errors: list[float | None] = [None] * len(names)
        if recipe.method == "gptq":
            results = gptq_stacked(values, hessian, grid, recipe.gptq_config)
            found = [result.groups for result in results]
            order, damp, num_dead = results[0].order, results[0].damp, results[0].num_dead
            errors = [result.error for result in results]
        else:
            weighing = hessian if grid.observer == "mse" else None
            found = [rtn(value, grid, importance=weighing) for value in values]
        if recipe.refine_sweeps or recipe.rounding_steps:
            found = [self._improved(value, hessian, g, order) for value, g in zip(values, found, strict=True)]
            errors = [None] * len(names)
        elapsed = (time.perf_counter() - began) / len(names)

        changed = {}
        for name, part, value, error in zip(names, found, values, errors, strict=True):
            buffers = {} if order is None else {"order": order}
            changed[name] = packed(name, part, activation, **buffers)
            quantized = float_values(changed[name])
            self.report.append(
                report_on(
                    changed[name],
                    value,
                    quantized,
                    seconds=elapsed,
                    output_error=output_error(value, quantized, hessian) if error is None else error,
                    damp=damp,
                    num_dead=num_dead,
                    alpha=None if scaling is None else scaling.alpha,
                )
            )
        return changed

    def _improved(self, values: torch.Tensor, hessian: torch.Tensor, groups: Groups, order: Any) -> Groups:
        recipe = self._recipe
        if recipe.refine_sweeps:
            groups = refine(
                values, hessian, groups, sweeps=recipe.refine_sweeps, damp=recipe.damp, order=order
            )
        if recipe.rounding_steps:
            with torch.enable_grad():
                groups = learned_rounding(values, hessian, groups, steps=recipe.rounding_steps, order=order)
        return groups


def _static_scale(inputs: InputStats) -> float:
    """The scale of symmetric int8 with the least squared error over the sampled rows."""
    largest = float(inputs.max_abs.amax())
    best, best_error = max(largest, 1e-12) / 127, torch.inf
    for step in range(STATIC_STEPS):
        scale = max(largest, 1e-12) / 127 * (1 - step / STATIC_STEPS)
        rounded = (inputs.sample / scale).round().clamp(-127, 127) * scale
        error = float((rounded - inputs.sample).square().sum())
        if error < best_error:
            best, best_error = scale, error
    return float(np.float32(best))
