"""Training a quantized model as a whole, on how far its predictions are from those of the original.

Layer-wise methods make each output right by itself. Some hundred steps of end-to-end training then let all
layers make up for each other's errors. Group scales and norms are trained by Adam, as in the second stage of
EfficientQAT (Chen et al. 2024, arXiv:2407.11062). Codes are trained by the sign of their gradient through
the rounding, with a rate that falls to zero, as in AutoRound (Cheng et al. 2023, arXiv:2309.05516): each has
a position in units of its scale, starts in the middle of its cell, and only steady pressure moves it out.
The loss is the mean KL(original || quantized) of the next token over calibration windows: no labels, and
nothing to overfit but the original itself. The format stays; scales are rounded to what is stored.

Letters: N x K a weight, R groups of a row, L = K / R.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.compress.calibration import Calibration
from ridgeline.compress.differentiable import Values, window_logits
from ridgeline.compress.passes import CalibrationPass, InputStats, Progress, float_values
from ridgeline.models.load import LoadedModel
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.groups import Groups, pack_groups, unpack_groups
from ridgeline.quant.weight import Weight

WINDOWS_PER_STEP = 2
SCALE_RATE = 1e-3
"""Of Adam, relative to the value that is trained."""
CODE_NOISE = 0.15
"""Where gradients of random sign bring a position, as a standard deviation: its cell ends at 0.5."""
WARM_UP = 0.05


class _Trained:
    """A norm or a quantized matrix: values = start * (1 + change), times the levels q - z of a matrix."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self._groups: Groups | None = None
        self.positions: torch.Tensor | None = None
        if weight.format.codes is None:
            start = float_values(weight)
        else:
            self._groups = groups = unpack_groups(weight.data, weight.format)
            middle = weight.format.codes.middle
            zeros = np.full_like(groups.scales, middle) if groups.zeros is None else groups.zeros
            self._zeros = torch.from_numpy(zeros.astype(np.float32))[:, :, None]
            codes = torch.from_numpy(groups.q).view(*groups.scales.shape, -1).to(torch.float32)
            self.positions = (codes - self._zeros).requires_grad_()
            start = torch.from_numpy(groups.scales)
        self._start = start
        self.change = torch.zeros_like(start, requires_grad=True)

    def __call__(self) -> torch.Tensor:
        factors = self._start * (1 + self.change)
        if self.positions is None:
            return factors
        levels = self.positions + (self.positions.detach().round() - self.positions.detach())
        return (levels * factors[:, :, None]).view(self.weight.shape)

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """One step of the positions against the sign of their gradient, kept inside the codes."""
        assert self.positions is not None and self.positions.grad is not None and self._groups is not None
        self.positions.sub_(self.positions.grad.sign_(), alpha=rate)
        self.positions.copy_(
            torch.clamp(self.positions, -self._zeros, (1 << self._groups.bits) - 1 - self._zeros)
        )
        self.positions.grad = None

    @torch.no_grad()
    def trained(self) -> Weight:
        """In its format again."""
        values = (self._start * (1 + self.change)).numpy()
        if self._groups is None or self.positions is None:
            return replace(self.weight, format=FORMATS["F32"], buffers={"data": values})
        assert self.weight.format.codes is not None
        stored = self.weight.format.codes.scale
        if stored == "F16":
            values = values.astype(np.float16).astype(np.float32)
        codes = (self.positions.round() + self._zeros).to(torch.uint8).view(self.weight.shape).numpy()
        rows = pack_groups(Groups(self._groups.bits, codes, values, self._groups.zeros), stored)[1]
        return replace(self.weight, buffers={**self.weight.buffers, "data": rows})


def tune(
    original: LoadedModel,
    model: LoadedModel,
    calibration: Calibration,
    *,
    steps: int,
    on_progress: Progress | None = None,
) -> LoadedModel:
    """`model`, a quantized `original`, trained for `steps` steps of two windows.

    Embedding and head stay as they are, and so do linears stored in act-order. Products are computed in
    bfloat16 where the processor has matrix units for it.
    """
    trained = {
        name: _Trained(weight)
        for name, weight in model.weights.items()
        if (weight.format.codes is not None and name.startswith("layers.")) or name.endswith("norm")
        if "order" not in weight.buffers
    }
    fixed: dict[int, torch.Tensor] = {}

    def values(weight: Weight) -> Values:
        if weight.name in trained:
            return trained[weight.name]
        tensor = fixed.setdefault(id(weight), float_values(weight))
        return lambda: tensor

    logits = window_logits(model, values, max_model_len=calibration.length)
    teacher = _Teacher(original, calibration)
    optimizer = torch.optim.Adam([t.change for t in trained.values()], betas=(0.9, 0.95))
    rng = np.random.default_rng(calibration.seed)
    windows: list[int] = []
    per_step = min(WINDOWS_PER_STEP, len(calibration.token_ids))
    has_matrix_units = torch.cpu.get_capabilities().get("amx_bf16", False)
    for step in range(steps):
        if len(windows) < per_step:
            windows = rng.permutation(len(calibration.token_ids)).tolist()
        chosen, windows = windows[:per_step], windows[per_step:]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_matrix_units):
            found = logits([calibration.token_ids[i] for i in chosen])
        loss = torch.nn.functional.kl_div(
            found.float().log_softmax(-1), teacher(chosen), log_target=True, reduction="batchmean"
        )
        loss.backward()  # type: ignore[no-untyped-call]
        warm = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
        for group in optimizer.param_groups:
            group["lr"] = SCALE_RATE * warm * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        # The sum of steps r (1 - t/n) with random signs has the variance r² n / 3.
        code_rate = CODE_NOISE * math.sqrt(3 / steps) * (1 - step / steps)
        for tensor in trained.values():
            if tensor.positions is not None:
                tensor.move(code_rate)
        if on_progress is not None:
            on_progress(step + 1, steps, f"tune, divergence {loss.item():.4f}")
    return replace(model, weights={**model.weights, **{name: t.trained() for name, t in trained.items()}})


class _Teacher:
    """Log-probabilities of the original model, from its last hidden states, which are all that is stored."""

    def __init__(self, original: LoadedModel, calibration: Calibration) -> None:
        hidden: list[npt.NDArray[np.float32]] = []
        last = original.config.num_layers - 1

        class Watch:
            wants_hessian = False

            def visit(
                self, names: tuple[str, ...], inputs: InputStats, weights: Mapping[str, Weight]
            ) -> dict[str, Weight]:
                return {}

            def finish_layer(self, index: int, residual: Callable[[], npt.NDArray[np.float32]]) -> None:
                if index == last:
                    hidden.append(residual())

        CalibrationPass(original, calibration, Watch()).run()
        config = original.config
        x = torch.from_numpy(hidden[0])
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
        x = x * (float_values(original.weights["norm"]) + config.norm_offset)
        self._hidden = x.view(len(calibration.token_ids), calibration.length, -1)
        self._head = float_values(original.weights["lm_head"])

    @torch.no_grad()
    def __call__(self, windows: list[int]) -> torch.Tensor:
        return (self._hidden[windows].flatten(0, 1) @ self._head.T).log_softmax(-1)
