"""One forward pass over the calibration tokens in which every linear is quantized just before it is used.

The decoder runs once, with an interpreter of its ops that computes by chunks of sequences. Its `linear`
meets the weights in the order of the computation: what the inputs of q, k and v look like is seen (Hessian,
magnitudes), a visitor replaces the three weights, and only then are they used. So calibration, the
true-sequential order of GPTQ (Frantar et al. 2022, arXiv:2210.17323) and the propagation of errors into later
layers need no code of their own, and a layer's float weights live only while the layer is computed.

An activation is a `Stream`: it knows how to compute itself. Where a visitor has also changed what produces
its input (scales folded into a norm), that input is simply computed again.

Letters: T tokens of a chunk, N x K a weight (out x in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.compress.calibration import Calibration
from ridgeline.config import Activation
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import bind_decoder, decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.torch_ops import TorchBatch, TorchOps
from ridgeline.quant.weight import Weight

CHUNK_TOKENS = 4096
KEPT_BYTES = 256 << 20
"""An input of linears that is larger is computed again instead of being kept."""
SAMPLE_ROWS = 2048
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears of a layer that read the same input, in the order of the computation."""
Progress = Callable[[int, int, str], None]
"""Called with how many steps are done, how many there are, and what is being done."""


@dataclass(frozen=True, slots=True)
class InputStats:
    """What the input x [num_tokens, K] of some linears looks like."""

    hessian: torch.Tensor | None
    """float32 [K, K], 2/n xᵀx; None where the visitor does not want it"""
    mean_abs: torch.Tensor
    max_abs: torch.Tensor
    mean_square: torch.Tensor
    """float32 [K] each; the last is llama.cpp's importance"""
    sample: torch.Tensor
    """float32 [rows, K]: evenly spaced rows of x"""
    num_tokens: int


class Visitor(Protocol):
    """What is done to the linears of a model as the pass meets them."""

    @property
    def wants_hessian(self) -> bool: ...

    def visit(
        self, names: tuple[str, ...], inputs: InputStats, weights: Mapping[str, Weight]
    ) -> dict[str, Weight]:
        """New weights for the linears `names`, which share this input, and for what produces it.

        `weights` are the current ones of the model. A changed producer makes the input be computed again.
        """
        ...

    def finish_layer(self, index: int, residual: Callable[[], npt.NDArray[np.float32]]) -> None:
        """All weights of the layer are final; `residual` gives the input [tokens, C] of the next one."""
        ...


class Stream:
    """Rows [T, columns] of one activation for every chunk: computed when asked for, kept where that pays."""

    __slots__ = ("_chunks", "_compute")

    def __init__(self, compute: Callable[[int], torch.Tensor] | None) -> None:
        self._compute = compute
        self._chunks: list[torch.Tensor] | None = None

    def chunk(self, index: int) -> torch.Tensor:
        if self._chunks is not None:
            return self._chunks[index]
        assert self._compute is not None, "an activation of a skipped layer was asked for"
        return self._compute(index)

    def keep(self, num_chunks: int) -> None:
        if self._chunks is None:
            self._chunks = [self.chunk(i) for i in range(num_chunks)]

    def settle(self, num_chunks: int) -> None:
        """Keep for good: what it was computed from can go."""
        self.keep(num_chunks)
        self._compute = None

    def fill(self, chunks: list[torch.Tensor]) -> None:
        self._chunks, self._compute = chunks, None

    def forget(self) -> None:
        assert self._compute is not None
        self._chunks = None


class _Enough(Exception):
    """All layers that were asked for are done; unwinds the decoder, which knows no layers to stop at."""


class Handle:
    """A weight by reference: its float values exist between the first use and `release`."""

    __slots__ = ("_values", "weight")

    def __init__(self, weight: Weight | None, values: torch.Tensor | None = None) -> None:
        self.weight = weight
        self._values = values

    @property
    def name(self) -> str:
        return "" if self.weight is None else self.weight.name

    @property
    def values(self) -> torch.Tensor:
        """float32."""
        if self._values is None:
            assert self.weight is not None
            self._values = float_values(self.weight)
        return self._values

    def release(self) -> None:
        if self.weight is not None:
            self._values = None


def float_values(weight: Weight) -> torch.Tensor:
    """The values of a weight as a float32 tensor of its shape."""
    return torch.from_numpy(weight.dequantize()).to(torch.float32)


class CalibrationPass:
    """Interpreter of `Ops` that runs a model over calibration tokens and lets a visitor change it on the way.

    Owns the current weights of the model (`weights`, by canonical name).
    """

    def __init__(
        self,
        model: LoadedModel,
        calibration: Calibration,
        visitor: Visitor,
        *,
        on_progress: Progress | None = None,
    ) -> None:
        self.weights: dict[str, Weight] = dict(model.weights)
        self._model = model
        self._visitor = visitor
        self._on_progress = on_progress
        length = calibration.length
        per_chunk = max(1, CHUNK_TOKENS // length)
        self._batches = [
            _batch(calibration.token_ids[start : start + per_chunk])
            for start in range(0, len(calibration.token_ids), per_chunk)
        ]
        config = model.config
        layout = CacheLayout(
            num_layers=1,  # K and V are read in the layer that wrote them, and then overwritten
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype="float32",
            block_size=length,
            num_blocks=per_chunk,
        )
        self._length = length
        self._num_tokens = calibration.num_tokens
        self._ops = TorchOps(layout, dtype="float32", device="cpu", attention="sdpa")
        self._handles: dict[int, Handle] = {}
        self._by_name: dict[str, Handle] = {}
        self._key_values: tuple[Stream, Stream] | None = None
        self._visited: set[str] = set()
        self._skip_to = 0
        self._end: int | None = None
        self._state: npt.NDArray[np.float32] | None = None
        self._num_done = 0
        self._num_steps = config.num_layers * len(GROUPS) + 1

    @torch.no_grad()
    def run(
        self,
        *,
        first_layer: int = 0,
        state: npt.NDArray[np.float32] | None = None,
        num_layers: int | None = None,
    ) -> None:
        """Go through the model. `first_layer` and its input `state` [tokens, C] continue an earlier pass,
        whose weights are those of the model that was given. `num_layers`: stop behind so many layers."""
        self._skip_to, self._state = first_layer, state
        self._num_done = first_layer * len(GROUPS)
        self._end = num_layers
        if num_layers is not None:
            self._num_steps = num_layers * len(GROUPS)
        handles = bind_decoder(self, self._model.config, self.weights, max_model_len=self._length)
        try:
            decoder(self, self._model.config, handles, None)
        except _Enough:
            return

    # What the decoder calls, in the order of `ops.interface`.

    def bind(self, weight: Weight) -> Handle:
        handle = self._handles.setdefault(id(weight), Handle(weight))
        self._by_name[weight.name] = handle
        return handle

    def bind_constant(self, values: npt.NDArray[np.float64]) -> Handle:
        return Handle(None, torch.from_numpy(values).to(torch.float32))

    def embed(self, table: Handle, batch: None, *, first_row: int = 0) -> Stream:
        if self._skip_to:
            return Stream(None)
        # The whole table in floats is several times the rows that are needed.
        x = Stream(lambda c: self._ops.embed(table.values, self._batches[c]))
        x.settle(len(self._batches))
        table.release()
        return x

    def scale(self, x: Stream, factor: float) -> Stream:
        return Stream(lambda c: self._ops.scale(x.chunk(c), factor))

    def rms_norm(self, x: Stream, weight: Handle, *, eps: float, offset: float) -> Stream:
        kind = weight.name.rpartition(".")[2]
        if kind in ("input_norm", "norm"):
            self._begin_layer(x, weight.name)
        if kind in ("input_norm", "mlp_norm", "norm") and not self._skipping:
            x.settle(len(self._batches))
        return Stream(lambda c: self._ops.rms_norm(x.chunk(c), weight.values, eps=eps, offset=offset))

    def linear(self, x: Stream, weight: Handle, bias: Handle | None = None) -> Stream:
        if not self._skipping and weight.name not in self._visited:
            self._visit(x, weight.name)
        return Stream(
            lambda c: self._ops.linear(x.chunk(c), weight.values, None if bias is None else bias.values)
        )

    def rope_cos_sin(
        self, inv_freq: Handle, batch: None, *, attention_factor: float, max_position: int | None = None
    ) -> Stream:
        return Stream(
            lambda c: self._ops.rope_cos_sin(
                inv_freq.values,
                self._batches[c],
                attention_factor=attention_factor,
                max_position=max_position,
            )
        )

    def rope(self, x: Stream, cos_sin: Stream, *, head_dim: int) -> Stream:
        return Stream(lambda c: self._ops.rope(x.chunk(c), cos_sin.chunk(c), head_dim=head_dim))

    def store_kv(self, layer: int, k: Stream, v: Stream, batch: None) -> None:
        self._key_values = (k, v)

    def attention(
        self,
        layer: int,
        q: Stream,
        batch: None,
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        q_sinks: Stream | None = None,
        num_sinks: int = 0,
    ) -> Stream:
        assert self._key_values is not None
        k, v = self._key_values

        def compute(c: int) -> torch.Tensor:
            self._ops.store_kv(0, k.chunk(c), v.chunk(c), self._batches[c])
            return self._ops.attention(
                0,
                q.chunk(c),
                self._batches[c],
                head_dim=head_dim,
                scale=scale,
                window=window,
                q_sinks=None if q_sinks is None else q_sinks.chunk(c),
                num_sinks=num_sinks,
            )

        return Stream(compute)

    def glu(self, gate: Stream, up: Stream, *, activation: Activation) -> Stream:
        return Stream(lambda c: self._ops.glu(gate.chunk(c), up.chunk(c), activation=activation))

    def add(self, x: Stream, y: Stream) -> Stream:
        return Stream(None) if self._skipping else Stream(lambda c: self._ops.add(x.chunk(c), y.chunk(c)))

    def gather_logit_rows(self, x: Stream, batch: None) -> Stream:
        return x  # the head reads every row; nothing asks for the logits

    # Only whole models are calibrated: `TorchOps` without ranks refuses these.

    def all_reduce(self, x: Stream) -> Stream:
        return Stream(lambda c: self._ops.all_reduce(x.chunk(c)))

    def all_gather(self, x: Stream, *, columns: int) -> Stream:
        return Stream(lambda c: self._ops.all_gather(x.chunk(c), columns=columns))

    def send(self, x: Stream) -> None:
        self._ops.send(x.chunk(0))

    def receive(self, batch: None, *, columns: int) -> Stream:
        return Stream(lambda c: self._ops.receive(self._batches[c], columns=columns))

    @property
    def _skipping(self) -> bool:
        return self._skip_to > 0

    def _begin_layer(self, residual: Stream, norm_name: str) -> None:
        """A residual stream is complete: the layer before it is finished."""
        num_layers = self._model.config.num_layers
        index = num_layers if norm_name == "norm" else int(norm_name.split(".")[1])
        num_chunks = len(self._batches)
        if self._skipping:
            if index < self._skip_to:
                return
            assert self._state is not None
            sizes = [len(batch.token_ids) for batch in self._batches]
            residual.fill(list(torch.split(torch.from_numpy(self._state), sizes)))
            self._skip_to, self._state = 0, None
            return
        residual.settle(num_chunks)
        if index:
            prefix = f"layers.{index - 1}."
            for name, handle in self._by_name.items():
                if name.startswith(prefix):
                    handle.release()
            self._visitor.finish_layer(
                index - 1, lambda: torch.cat([residual.chunk(c) for c in range(num_chunks)]).numpy()
            )
        if index == self._end:
            raise _Enough

    def _visit(self, x: Stream, name: str) -> None:
        prefix, _, kind = name.rpartition(".")
        members = [member for group in GROUPS if kind in group for member in group]
        # A tied head goes by the name of the embedding.
        names = tuple(f"{prefix}.{member}" for member in members) or ("lm_head",)
        if self._on_progress is not None:
            label = ", ".join(member.removesuffix("_proj") for member in members)
            self._on_progress(self._num_done, self._num_steps, f"{prefix} {label}" if members else "lm_head")
        num_columns = self.weights[name].shape[1]
        is_small = self._num_tokens * num_columns * 4 <= KEPT_BYTES
        if is_small:
            x.keep(len(self._batches))
        inputs = self._observe(x, num_columns)
        changed = self._visitor.visit(names, inputs, self.weights)
        for changed_name, weight in changed.items():
            self.weights[changed_name] = weight
            handle = self._by_name[changed_name]
            handle.weight = weight
            handle.release()
        if is_small and set(changed) - set(names):
            x.forget()
            x.keep(len(self._batches))
        self._visited.update((name, *names))
        self._num_done += 1
        if self._on_progress is not None and self._num_done == self._num_steps:
            self._on_progress(self._num_done, self._num_steps, "done")

    def _observe(self, x: Stream, num_columns: int) -> InputStats:
        n = self._num_tokens
        wants_hessian = self._visitor.wants_hessian
        hessian = torch.zeros(num_columns, num_columns) if wants_hessian else None
        sum_abs, sum_squares, max_abs = (torch.zeros(num_columns) for _ in range(3))
        step = max(1, n // SAMPLE_ROWS)
        rows = []
        for c in range(len(self._batches)):
            part = x.chunk(c)
            magnitude = part.abs()
            sum_abs += magnitude.sum(0)
            max_abs = torch.maximum(max_abs, magnitude.amax(0))
            if hessian is not None:
                hessian.addmm_(part.T, part)
            else:
                sum_squares += part.square().sum(0)
            rows.append(part[::step].clone())
        if hessian is not None:
            sum_squares = hessian.diagonal().clone()
            hessian *= 2.0 / n
        return InputStats(hessian, sum_abs / n, max_abs, sum_squares / n, torch.cat(rows), n)


def _batch(windows: list[list[int]]) -> TorchBatch:
    """Each window a sequence with a block of its own."""
    rows = [Row(window, 0, [i], 0) for i, window in enumerate(windows)]
    return TorchBatch.from_host(ForwardBatch.from_rows(rows, block_size=len(windows[0])), "cpu")
