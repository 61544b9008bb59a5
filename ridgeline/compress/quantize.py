"""A model and a recipe in, a smaller model and what it cost out: all of it in memory.

Where a recipe needs calibration, one pass over the tokens (`passes`) meets the linears in the order of the
computation, and `linears` replaces them. Embedding and head are rounded by themselves, and tied tables stay
one tensor. Training of the whole (`tuning`) comes last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ridgeline.compress.allocate import allocate
from ridgeline.compress.calibration import Calibration
from ridgeline.compress.gguf import quantize_to_mix
from ridgeline.compress.grids import Grid, rtn
from ridgeline.compress.linears import LinearQuantizer, TensorReport, assembled, packed, report_on
from ridgeline.compress.passes import CalibrationPass, InputStats, Progress, float_values
from ridgeline.compress.recipe import Recipe
from ridgeline.compress.resume import WorkDirectory, model_fingerprint
from ridgeline.compress.tuning import tune
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

__all__ = ["QuantizedModel", "TensorReport", "importance", "linear_names", "quantize_model"]


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    model: LoadedModel
    report: list[TensorReport]
    seconds: dict[str, float] = field(default_factory=dict)
    """by part of the work, "total" included"""


def quantize_model(
    model: LoadedModel,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    imatrix: Mapping[str, npt.NDArray[np.float32]] | None = None,
    on_progress: Progress | None = None,
    work_dir: Path | None = None,
    num_layers: int | None = None,
) -> QuantizedModel:
    """Quantize by a recipe. With calibration, errors of the layers' outputs are measured for every recipe.

    `imatrix`: mean x² of input columns by canonical name, for GGUF recipes instead of calibration.
    `work_dir`: finished layers are kept there, and a run that was killed continues where it was, to the same
    bits. `num_layers`: only the linears of the first so many layers, for experiments that are to take
    seconds; not for GGUF, mixed or trained recipes, which look at the whole model.

    Raises ConfigError where the recipe needs calibration and there is none, and for a group size that does
    not divide a row.
    """
    started = time.perf_counter()
    if calibration is None and recipe.needs_calibration:
        raise ConfigError(f"recipe {recipe.name!r} needs calibration tokens, and none were given")
    if num_layers is not None and (recipe.gguf_mix or recipe.is_mixed or recipe.tune_steps or work_dir):
        raise ConfigError(
            f"num_layers={num_layers} with recipe {recipe.name!r}: only recipes that treat every layer "
            "alike, without a work directory, can be stopped after some layers"
        )
    seconds: dict[str, float] = {}
    if recipe.gguf_mix is not None:
        result = _quantize_gguf(model, recipe.gguf_mix, calibration, imatrix, on_progress)
    else:
        _check_groups(model, recipe)
        result = _quantize_groups(model, recipe, calibration, on_progress, work_dir, seconds, num_layers)
    seconds["total"] = time.perf_counter() - started
    return replace(result, seconds=seconds)


def linear_names(model: LoadedModel, *, num_layers: int | None = None) -> list[str]:
    """Canonical names of the linears of all layers, or of the first so many."""
    names = [name for name in model.weights if name.startswith("layers.") and name.endswith("_proj")]
    if num_layers is None:
        return names
    if not 1 <= num_layers <= model.config.num_layers:
        raise ConfigError(f"num_layers={num_layers}: expected 1 to {model.config.num_layers}")
    return [name for name in names if int(name.split(".")[1]) < num_layers]


def importance(
    model: LoadedModel, calibration: Calibration, *, on_progress: Progress | None = None
) -> dict[str, npt.NDArray[np.float32]]:
    """Mean x² of every input column of every linear, the head included: llama.cpp's importance matrix."""
    found: dict[str, npt.NDArray[np.float32]] = {}

    class Watch:
        wants_hessian = False

        def visit(
            self, names: tuple[str, ...], inputs: InputStats, weights: Mapping[str, Weight]
        ) -> dict[str, Weight]:
            found.update({name: inputs.mean_square.numpy() for name in names})
            return {}

        def finish_layer(self, index: int, residual: Callable[[], npt.NDArray[np.float32]]) -> None:
            pass

    CalibrationPass(model, calibration, Watch(), on_progress=on_progress).run()
    return found


def _quantize_gguf(
    model: LoadedModel,
    mix: str,
    calibration: Calibration | None,
    imatrix: Mapping[str, npt.NDArray[np.float32]] | None,
    on_progress: Progress | None,
) -> QuantizedModel:
    columns = dict(imatrix or {})
    if not columns and calibration is not None:
        columns = importance(model, calibration, on_progress=on_progress)
    if model.weights["lm_head"] is model.weights["embed_tokens"] and "lm_head" in columns:
        columns["embed_tokens"] = columns["lm_head"]
    quantized = quantize_to_mix(model, mix, importance=columns, on_progress=on_progress)
    report = [
        report_on(weight, float_values(model.weights[name]))
        for name, weight in quantized.weights.items()
        if len(weight.shape) == 2 and (name != "lm_head" or weight is not quantized.weights["embed_tokens"])
    ]
    return QuantizedModel(quantized, report)


def _quantize_groups(
    model: LoadedModel,
    recipe: Recipe,
    calibration: Calibration | None,
    on_progress: Progress | None,
    work_dir: Path | None,
    seconds: dict[str, float],
    num_layers: int | None,
) -> QuantizedModel:
    began = time.perf_counter()
    weights, report = _quantize_tables(model, recipe)
    seconds["tables"] = time.perf_counter() - began
    original = model
    model = assembled(model, weights)

    directory = None
    if work_dir is not None and calibration is not None:
        identity = {
            "model": model_fingerprint(original),
            "recipe": repr(replace(recipe, name="", summary="")),
            "calibration": calibration.fingerprint(),
        }
        directory = WorkDirectory(work_dir, identity)

    grids = {name: recipe.grid(name) for name in linear_names(model, num_layers=num_layers)}
    if recipe.is_mixed:
        began = time.perf_counter()
        grids = _allocated(model, recipe, calibration, on_progress, directory)
        seconds["allocate"] = time.perf_counter() - began

    began = time.perf_counter()
    if calibration is None:
        for done, (name, grid) in enumerate(grids.items()):
            if on_progress is not None:
                on_progress(done, len(grids), name)
            at = time.perf_counter()
            values = float_values(model.weights[name])
            weights[name] = packed(name, rtn(values, grid), recipe.dynamic_activation)
            report.append(report_on(weights[name], values, seconds=time.perf_counter() - at))
        model = assembled(model, weights)
    else:
        quantizer = LinearQuantizer(model, recipe, grids, directory)
        first_layer, state = quantizer.resume()
        pass_ = CalibrationPass(quantizer.model, calibration, quantizer, on_progress=on_progress)
        pass_.run(first_layer=first_layer, state=state, num_layers=num_layers)
        model = assembled(model, pass_.weights)
        report += quantizer.report
    seconds["linears"] = time.perf_counter() - began

    if recipe.tune_steps:
        assert calibration is not None
        began = time.perf_counter()
        model = tune(original, model, calibration, steps=recipe.tune_steps, on_progress=on_progress)
        seconds["tune"] = time.perf_counter() - began
    return QuantizedModel(model, report)


def _allocated(
    model: LoadedModel,
    recipe: Recipe,
    calibration: Calibration | None,
    on_progress: Progress | None,
    directory: WorkDirectory | None,
) -> dict[str, Grid]:
    assert calibration is not None
    if directory is None:
        return allocate(model, recipe, calibration, on_progress=on_progress)
    found = directory.remembered(
        "grids",
        lambda: {
            name: asdict(grid)
            for name, grid in allocate(model, recipe, calibration, on_progress=on_progress).items()
        },
    )
    return {name: Grid(**fields) for name, fields in found.items()}


def _quantize_tables(model: LoadedModel, recipe: Recipe) -> tuple[dict[str, Weight], list[TensorReport]]:
    """Embedding and head, by name; a tied head is no tensor of its own."""
    weights: dict[str, Weight] = {}
    report = []
    for name in ("embed_tokens", "lm_head"):
        weight = model.weights[name]
        if name == "lm_head" and weight is model.weights["embed_tokens"]:
            continue
        began = time.perf_counter()
        values = float_values(weight)
        if recipe.head_grid is not None:
            grid = _fitting(recipe.head_grid, weight.shape[1])
            weights[name] = packed(name, rtn(values, grid))
        elif recipe.head_format == "f16":
            weights[name] = weight.converted(FORMATS["F16"])
        else:
            weights[name] = weight
        report.append(report_on(weights[name], values, seconds=time.perf_counter() - began))
    return weights, report


def _fitting(grid: Grid, num_columns: int) -> Grid:
    """The grid with its group size raised to the next divisor of the row: the head format is a default."""
    if grid.group_size is None or grid.group_size >= num_columns:
        return replace(grid, group_size=None)
    size = grid.group_size
    while num_columns % size:
        size += 1
    return replace(grid, group_size=size)


def _check_groups(model: LoadedModel, recipe: Recipe) -> None:
    for name in linear_names(model):
        recipe.grid(name).num_groups(model.weights[name].shape[1])
