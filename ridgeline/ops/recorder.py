"""An interpreter of `Ops` that computes nothing: it writes the decoder down as a `Program`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ridgeline.config import Activation
from ridgeline.ops.program import Buffer, Instruction, Opcode, Program, Rows
from ridgeline.quant.weight import Weight


class Recorder:
    """Tensors are `Buffer`s, handles are weight numbers, the batch is None: all of it is symbolic.

    Owns the lists that `program` freezes. Buffers are written once and never changed in place.
    """

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self._weights: dict[Weight, int] = {}
        self._constants: list[npt.NDArray[np.float64]] = []
        self._instructions: list[Instruction] = []

    def program(self, output: Buffer) -> Program:
        """What was recorded, with `output` as the logits."""
        return Program(
            tuple(self._buffers),
            tuple(self._weights),
            tuple(self._constants),
            tuple(self._instructions),
            output.index,
        )

    def _emit(
        self,
        opcode: Opcode,
        inputs: tuple[Buffer, ...],
        weights: tuple[int | None, ...] = (),
        *,
        rows: Rows = "T",
        columns: int,
        **attributes: float | int | str | None,
    ) -> Buffer:
        output = Buffer(len(self._buffers), rows, columns)
        self._buffers.append(output)
        self._append(opcode, output, inputs, weights, attributes)
        return output

    def _append(
        self,
        opcode: Opcode,
        output: Buffer | None,
        inputs: tuple[Buffer, ...],
        weights: tuple[int | None, ...],
        attributes: dict[str, float | int | str | None],
    ) -> None:
        self._instructions.append(
            Instruction(
                opcode,
                () if output is None else (output.index,),
                tuple(b.index for b in inputs),
                weights,
                tuple(attributes.items()),
            )
        )

    def _shape(self, handle: int) -> tuple[int, ...]:
        return tuple(self._weights)[handle].shape

    def bind(self, weight: Weight) -> int:
        return self._weights.setdefault(weight, len(self._weights))

    def bind_constant(self, values: npt.NDArray[np.float64]) -> int:
        self._constants.append(values)
        return len(self._constants) - 1

    def embed(self, table: int, batch: None, *, first_row: int = 0) -> Buffer:
        columns = self._shape(table)[1]
        if not first_row:
            return self._emit(Opcode.EMBED, (), (table,), columns=columns)
        return self._emit(Opcode.EMBED, (), (table,), columns=columns, first_row=first_row)

    def scale(self, x: Buffer, factor: float) -> Buffer:
        return self._emit(Opcode.SCALE, (x,), rows=x.rows, columns=x.columns, factor=factor)

    def rms_norm(self, x: Buffer, weight: int, *, eps: float, offset: float) -> Buffer:
        assert x.columns % self._shape(weight)[0] == 0
        return self._emit(
            Opcode.RMS_NORM, (x,), (weight,), rows=x.rows, columns=x.columns, eps=eps, offset=offset
        )

    def linear(self, x: Buffer, weight: int, bias: int | None = None) -> Buffer:
        num_out, num_in = self._shape(weight)
        assert x.columns == num_in, (x, num_in)
        weights = (weight,) if bias is None else (weight, None, None, bias)
        return self._emit(Opcode.LINEAR, (x,), weights, rows=x.rows, columns=num_out)

    def rope_cos_sin(
        self,
        inv_freq: int,
        batch: None,
        *,
        attention_factor: float,
        max_position: int | None = None,
    ) -> Buffer:
        return self._emit(
            Opcode.ROPE_COS_SIN,
            (),
            columns=2 * len(self._constants[inv_freq]),
            constant=inv_freq,
            attention_factor=attention_factor,
            max_position=max_position,
        )

    def rope(self, x: Buffer, cos_sin: Buffer, *, head_dim: int) -> Buffer:
        assert x.columns % head_dim == 0 and cos_sin.columns <= head_dim
        return self._emit(Opcode.ROPE, (x, cos_sin), columns=x.columns, head_dim=head_dim)

    def store_kv(self, layer: int, k: Buffer, v: Buffer, batch: None) -> None:
        self._append(Opcode.STORE_KV, None, (k, v), (), {"layer": layer})

    def attention(
        self,
        layer: int,
        q: Buffer,
        batch: None,
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        q_sinks: Buffer | None = None,
        num_sinks: int = 0,
    ) -> Buffer:
        inputs = (q,) if q_sinks is None else (q, q_sinks)
        return self._emit(
            Opcode.ATTENTION,
            inputs,
            columns=q.columns,
            layer=layer,
            head_dim=head_dim,
            scale=scale,
            window=window,
            num_sinks=num_sinks,
        )

    def glu(self, gate: Buffer, up: Buffer, *, activation: Activation) -> Buffer:
        return self._emit(Opcode.GLU, (gate, up), rows=gate.rows, columns=gate.columns, activation=activation)

    def add(self, x: Buffer, y: Buffer) -> Buffer:
        assert (x.rows, x.columns) == (y.rows, y.columns)
        return self._emit(Opcode.ADD, (x, y), rows=x.rows, columns=x.columns)

    def gather_logit_rows(self, x: Buffer, batch: None) -> Buffer:
        return self._emit(Opcode.GATHER_ROWS, (x,), rows="L", columns=x.columns)

    def all_reduce(self, x: Buffer) -> Buffer:
        return self._emit(Opcode.ALL_REDUCE, (x,), rows=x.rows, columns=x.columns)

    def all_gather(self, x: Buffer, *, columns: int) -> Buffer:
        assert x.columns < columns
        return self._emit(Opcode.ALL_GATHER, (x,), rows=x.rows, columns=columns)

    def send(self, x: Buffer) -> None:
        assert x.rows == "T"
        self._append(Opcode.SEND, None, (x,), (), {})

    def receive(self, batch: None, *, columns: int) -> Buffer:
        return self._emit(Opcode.RECEIVE, (), columns=columns)
