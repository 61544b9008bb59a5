"""The decoder as a differentiable function of its weights: whole windows, no cache.

`TorchOps` writes K and V into pages in place, which autograd cannot look through. Here they go from
`store_kv` to `attention` as tensors; everything else is `TorchOps`. Weights are whatever `values` gives for
them, at every use: trainable tensors, or integers that are multiplied out again.

Letters: S windows of L tokens, H query and G KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.config import ModelConfig
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import bind_decoder, decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.torch_ops import TorchBatch, TorchOps, sdpa_attention
from ridgeline.quant.weight import Weight

Values = Callable[[], torch.Tensor]
"""Gives the float values of a weight: the same tensor, or one computed from what is trained."""
Watch = Callable[[Weight, torch.Tensor], None]
"""Called with every linear's weight and its outputs [S * L, N]."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A weight, or a constant without one, and what gives its values."""

    weight: Weight | None
    values: Values


class DifferentiableOps:
    """Interpreter of `Ops` for windows of one length."""

    def __init__(
        self, config: ModelConfig, values: Callable[[Weight], Values], watch: Watch | None = None
    ) -> None:
        layout = CacheLayout(
            num_layers=0, num_kv_heads=1, head_dim=1, dtype="float32", block_size=1, num_blocks=0
        )
        self._ops = TorchOps(layout, dtype="float32", device="cpu", attention="sdpa")
        self._num_kv_heads = config.num_kv_heads
        self._values = values
        self._watch = watch
        self._key_values: tuple[torch.Tensor, torch.Tensor] | None = None

    def bind(self, weight: Weight) -> Bound:
        return Bound(weight, self._values(weight))

    def bind_constant(self, values: npt.NDArray[np.float64]) -> Bound:
        constant = torch.from_numpy(values).to(torch.float32)
        return Bound(None, lambda: constant)

    def embed(self, table: Bound, batch: TorchBatch, *, first_row: int = 0) -> torch.Tensor:
        return self._ops.embed(table.values(), batch, first_row=first_row)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return self._ops.scale(x, factor)

    def rms_norm(self, x: torch.Tensor, weight: Bound, *, eps: float, offset: float) -> torch.Tensor:
        return self._ops.rms_norm(x, weight.values(), eps=eps, offset=offset)

    def linear(self, x: torch.Tensor, weight: Bound, bias: Bound | None = None) -> torch.Tensor:
        output = torch.nn.functional.linear(x, weight.values(), None if bias is None else bias.values())
        if self._watch is not None and weight.weight is not None:
            self._watch(weight.weight, output)
        return output

    def rope_cos_sin(self, inv_freq: Bound, batch: TorchBatch, **options: Any) -> torch.Tensor:
        return self._ops.rope_cos_sin(inv_freq.values(), batch, **options)

    def rope(self, x: torch.Tensor, cos_sin: torch.Tensor, *, head_dim: int) -> torch.Tensor:
        return self._ops.rope(x, cos_sin, head_dim=head_dim)

    def store_kv(self, layer: int, k: torch.Tensor, v: torch.Tensor, batch: TorchBatch) -> None:
        self._key_values = (k, v)

    def attention(
        self,
        layer: int,
        q: torch.Tensor,
        batch: TorchBatch,
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        q_sinks: torch.Tensor | None = None,
        num_sinks: int = 0,
    ) -> torch.Tensor:
        assert self._key_values is not None and (q_sinks is None or len(q) == 0)
        num_windows = len(batch.seq_lens)
        length = len(q) // num_windows
        positions = torch.arange(length)
        k, v = (x.view(num_windows, length, -1, head_dim).transpose(1, 2) for x in self._key_values)
        heads = q.view(num_windows, length, self._num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
        attended = [
            sdpa_attention(
                heads[s], k[s], v[s], positions, positions, scale=scale, window=window, num_sinks=num_sinks
            )
            for s in range(num_windows)
        ]
        return torch.stack(attended).permute(0, 3, 1, 2, 4).reshape(len(q), -1)

    def glu(self, gate: torch.Tensor, up: torch.Tensor, *, activation: Any) -> torch.Tensor:
        return self._ops.glu(gate, up, activation=activation)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._ops.add(x, y)

    def gather_logit_rows(self, x: torch.Tensor, batch: TorchBatch) -> torch.Tensor:
        return x

    # Only whole models are differentiated: `TorchOps` without ranks refuses these.

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.all_reduce(x)

    def all_gather(self, x: torch.Tensor, *, columns: int) -> torch.Tensor:
        return self._ops.all_gather(x, columns=columns)

    def send(self, x: torch.Tensor) -> None:
        self._ops.send(x)

    def receive(self, batch: TorchBatch, *, columns: int) -> torch.Tensor:
        return self._ops.receive(batch, columns=columns)


def windows_batch(windows: list[list[int]]) -> TorchBatch:
    """Each window a sequence of its own, all of one length; every row has logits."""
    length = len(windows[0])
    rows = [Row(window, 0, [i], length) for i, window in enumerate(windows)]
    return TorchBatch.from_host(ForwardBatch.from_rows(rows, block_size=length), "cpu")


def window_logits(
    model: LoadedModel,
    values: Callable[[Weight], Values],
    *,
    max_model_len: int,
    watch: Watch | None = None,
) -> Callable[[list[list[int]]], torch.Tensor]:
    """The function from windows to the logits [windows * L, V] of all their rows."""
    ops = DifferentiableOps(model.config, values, watch)
    handles = bind_decoder(ops, model.config, model.weights, max_model_len=max_model_len)
    return lambda windows: decoder(ops, model.config, handles, windows_batch(windows))
