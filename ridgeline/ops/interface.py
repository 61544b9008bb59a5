"""The ops a decoder is made of. The model is written once against `Ops`; what runs it is an interpreter.

`torch_ops` computes them (the definition of correct), `recorder` writes them down as a Program, which
the native executor replays. A tensor here is always [rows, columns]; rows are the T tokens of the step,
or the L rows whose logits are wanted.

Letters: T tokens, L logit rows, C hidden, N x K a weight (out x in), H query heads, G KV heads,
D head_dim, R rotated features of a head.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ridgeline.config import Activation
from ridgeline.quant.weight import Weight

Tensor = TypeVar("Tensor")
"""An activation: a torch tensor, or a recorder's buffer."""
Handle = TypeVar("Handle")
"""A weight as the interpreter holds it: dequantized, repacked or numbered."""
Batch = TypeVar("Batch", contravariant=True)
"""The step's `ForwardBatch`: arrays, torch tensors of the same fields, or symbols."""


class Ops(Protocol[Tensor, Handle, Batch]):
    """Meaning, shapes and dtypes of every op. Interpreters add no op of their own."""

    def bind(self, weight: Weight) -> Handle:
        """Take over a weight. The same weight object gives the same handle."""
        ...

    def bind_constant(self, values: npt.NDArray[np.float64]) -> Handle:
        """Take over numbers that are no weight (RoPE frequencies), in float32 at least."""
        ...

    def embed(self, table: Handle, batch: Batch, *, first_row: int = 0) -> Tensor:
        """Rows of table [V, C] at batch.token_ids - first_row -> [T, C]; zeros where the table has none.

        A vocabulary-parallel table holds the rows from first_row on.
        """
        ...

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """x * factor, with the factor first rounded to x's dtype, as Hugging Face Gemma does."""
        ...

    def rms_norm(self, x: Tensor, weight: Handle, *, eps: float, offset: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) * (offset + weight), over each run of len(weight) columns.

        A weight as long as the row norms the row; one of head_dim norms every head (QK-norm).
        Zhang & Sennrich 2019, arXiv:1910.07467.
        """
        ...

    def linear(self, x: Tensor, weight: Handle, bias: Handle | None = None) -> Tensor:
        """x [rows, K] @ weight [N, K]ᵀ (+ bias [N]) -> [rows, N]."""
        ...

    def rope_cos_sin(
        self,
        inv_freq: Handle,
        batch: Batch,
        *,
        attention_factor: float,
        max_position: int | None = None,
    ) -> Tensor:
        """cos and sin of batch.positions * inv_freq, times attention_factor -> [T, R]: R/2 cosines and sines.

        Positions above max_position count as max_position (attention sinks). Computed once per step and
        kind of layer. The angle is a product in float32, or in float64 where ops compute in float64.
        """
        ...

    def rope(self, x: Tensor, cos_sin: Tensor, *, head_dim: int) -> Tensor:
        """Rotate the first R features of every head of x [T, heads*D]: pairs (i, i + R/2).

        Su et al. 2021, arXiv:2104.09864, in the half-split order of Hugging Face.
        """
        ...

    def store_kv(self, layer: int, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Write k, v [T, G*D] into the layer's pages at batch.slot_mapping; slot -1 is skipped."""
        ...

    def attention(
        self,
        layer: int,
        q: Tensor,
        batch: Batch,
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        q_sinks: Tensor | None = None,
        num_sinks: int = 0,
    ) -> Tensor:
        """softmax(scale * q·K) V over the pages of the row's sequence -> [T, H*D].

        A query at position p sees the keys at 0..p; with a window w only the last w of them, itself
        included, and the first num_sinks keys, which are scored with q_sinks instead of q. A padding
        row of an empty sequence gives zeros. Query heads of one group read the same KV head.
        """
        ...

    def glu(self, gate: Tensor, up: Tensor, *, activation: Activation) -> Tensor:
        """activation(gate) * up. Shazeer 2020, arXiv:2002.05202."""
        ...

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        ...

    def gather_logit_rows(self, x: Tensor, batch: Batch) -> Tensor:
        """The rows of x [T, C] at batch.logit_rows -> [L, C]."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of x [rows, N] over the tp ranks, in the order of their ranks: the same bits on all of them."""
        ...

    def all_gather(self, x: Tensor, *, columns: int) -> Tensor:
        """x [rows, N_r] of every tp rank side by side, by rank -> [rows, columns]; N_r may differ."""
        ...

    def send(self, x: Tensor) -> None:
        """Hand x [T, C] to the same tp rank of the next stage."""
        ...

    def receive(self, batch: Batch, *, columns: int) -> Tensor:
        """What the same tp rank of the stage before sent for this step -> [T, columns]."""
        ...
