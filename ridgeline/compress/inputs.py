"""What some linears of a model read: their inputs over calibration tokens, without changing anything.

For looking before quantizing: which features are large, how they depend on each other (the Hessian), how many
tokens it takes to know. The pass ends behind the last layer that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from ridgeline.compress.calibration import Calibration
from ridgeline.compress.passes import CalibrationPass, InputStats, Progress
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel
from ridgeline.quant.weight import Weight


class _Watch:
    """The visitor that keeps what it sees of the linears it was asked for."""

    wants_hessian = True

    def __init__(self, names: Iterable[str]) -> None:
        self.found: dict[str, InputStats] = {}
        self._names = frozenset(names)

    def visit(
        self, names: tuple[str, ...], inputs: InputStats, weights: Mapping[str, Weight]
    ) -> dict[str, Weight]:
        self.found.update({name: inputs for name in names if name in self._names})
        return {}

    def finish_layer(self, index: int, residual: Callable[[], npt.NDArray[np.float32]]) -> None:
        pass


def inputs_of(
    model: LoadedModel, calibration: Calibration, names: Iterable[str], *, on_progress: Progress | None = None
) -> dict[str, InputStats]:
    """Statistics of the inputs of linears, by canonical name; linears with the same input share one object.

    Raises ConfigError for a name that is no linear of a layer.
    """
    wanted = list(names)
    for name in wanted:
        if name not in model.weights or not (name.startswith("layers.") and name.endswith("_proj")):
            raise ConfigError(f"{name!r} is no linear of this model; expected one like 'layers.0.q_proj'")
    if not wanted:
        return {}
    watch = _Watch(wanted)
    last = max(int(name.split(".")[1]) for name in wanted)
    CalibrationPass(model, calibration, watch, on_progress=on_progress).run(num_layers=last + 1)
    return {name: watch.found[name] for name in wanted}
