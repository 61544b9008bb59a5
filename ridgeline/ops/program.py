"""A decoder written down: a flat list of instructions over numbered buffers, weights and constants.

`recorder` makes one by running the decoder once with symbols. A Program is data: the native executor replays
it with one C call per step, and FLOPs, bytes and memory are computed from it without running anything.

A buffer is [rows, columns] where rows is "T" (tokens of the step) or "L" (rows whose logits are wanted), so
one Program serves every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from ridgeline.quant.weight import Weight

Rows = Literal["T", "L"]


class Opcode(IntEnum):
    """The ops of `Ops`; csrc/program.h has the same numbers (a test compares them)."""

    EMBED = 0
    SCALE = 1
    RMS_NORM = 2
    LINEAR = 3
    ROPE_COS_SIN = 4
    ROPE = 5
    STORE_KV = 6
    ATTENTION = 7
    GLU = 8
    ADD = 9
    GATHER_ROWS = 10


@dataclass(frozen=True, slots=True)
class Buffer:
    """An activation, float32 on native."""

    index: int
    rows: Rows
    columns: int

    def __str__(self) -> str:
        return f"%{self.index}[{self.rows}, {self.columns}]"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One op. `attributes` are its plain numbers, in the order in which csrc reads them."""

    opcode: Opcode
    output: int | None
    inputs: tuple[int, ...]
    weights: tuple[int, ...] = ()
    attributes: tuple[tuple[str, float | int | str | None], ...] = ()

    def attribute(self, name: str) -> float | int | str | None:
        return dict(self.attributes)[name]


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of one step: for each sequence its (new tokens, tokens in the cache after the step)."""

    sequences: tuple[tuple[int, int], ...]
    num_logits: int

    @classmethod
    def prefill(cls, num_tokens: int) -> StepShape:
        return cls(((num_tokens, num_tokens),), 1)

    @classmethod
    def decode(cls, batch: int, context: int) -> StepShape:
        """`batch` sequences, each computing one token that makes its context `context` long."""
        return cls(((1, context),) * batch, batch)

    @property
    def num_tokens(self) -> int:
        return sum(num_new for num_new, _ in self.sequences)

    def num_visible(self, window: int | None, num_sinks: int) -> int:
        """Query-key pairs that attention must score: causal, inside the window or sinks."""
        total = 0
        for num_new, seq_len in self.sequences:
            for position in range(seq_len - num_new, seq_len):
                seen = position + 1
                if window is not None and seen > window + num_sinks:
                    seen = window + num_sinks
                total += seen
        return total


@dataclass(frozen=True, slots=True)
class Program:
    """The decoder of one model. `output` is the buffer of the logits."""

    buffers: tuple[Buffer, ...]
    weights: tuple[Weight, ...]
    constants: tuple[npt.NDArray[np.float64], ...]
    instructions: tuple[Instruction, ...]
    output: int

    def text(self) -> str:
        """One line an instruction, then the totals: for people, documentation and golden tests."""
        lines = []
        for number, instruction in enumerate(self.instructions):
            out = "" if instruction.output is None else f"{self.buffers[instruction.output]} = "
            operands = [f"%{i}" for i in instruction.inputs]
            operands += [f"{self.weights[w].name}:{self.weights[w].format.name}" for w in instruction.weights]
            operands += [
                f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in instruction.attributes
            ]
            lines.append(f"{number:4d}  {out}{instruction.opcode.name.lower()}({', '.join(operands)})")
        lines.append(
            f"{len(self.instructions)} instructions, {len(self.buffers)} buffers, "
            f"{len(self.weights)} weights, {self.weight_bytes():,} weight bytes"
        )
        return "\n".join(lines)

    def num_rows(self, buffer: int, shape: StepShape) -> int:
        return shape.num_tokens if self.buffers[buffer].rows == "T" else shape.num_logits

    def weight_bytes(self) -> int:
        """Bytes of all weights, a tied one counted once: what a decode step reads, but for embed's table."""
        return sum(weight.num_bytes for weight in self.weights)

    def flops(self, shape: StepShape) -> int:
        """Floating point operations that `shape` cannot do without, a multiply-add counted as two.

        Matrix products and attention only, as torch's flop counter does; attention counts visible pairs.
        """
        return sum(self.instruction_flops(instruction, shape) for instruction in self.instructions)

    def instruction_flops(self, instruction: Instruction, shape: StepShape) -> int:
        if instruction.opcode is Opcode.LINEAR:
            num_out, num_in = self.weights[instruction.weights[0]].shape
            return 2 * self.num_rows(instruction.inputs[0], shape) * num_out * num_in
        if instruction.opcode is Opcode.ATTENTION:
            window, num_sinks = instruction.attribute("window"), instruction.attribute("num_sinks")
            assert (window is None or isinstance(window, int)) and isinstance(num_sinks, int)
            return 4 * self.buffers[instruction.inputs[0]].columns * shape.num_visible(window, num_sinks)
        return 0

    def activation_bytes(self, *, max_tokens: int, max_logits: int) -> int:
        """Bytes of the planned float32 buffers for the largest step."""
        plan = self.plan_buffers()
        rows = {"T": max_tokens, "L": max_logits}
        return sum(4 * rows[kind] * columns for kind, columns in plan.arenas)

    def plan_buffers(self) -> BufferPlan:
        """Give buffers whose lifetimes do not overlap the same memory: first fit over the program order."""
        last_use = {
            i: number for number, instruction in enumerate(self.instructions) for i in instruction.inputs
        }
        last_use[self.output] = len(self.instructions)
        arenas: list[tuple[Rows, int]] = []
        free: list[int] = []
        place: dict[int, int] = {}
        for number, instruction in enumerate(self.instructions):
            if instruction.output is not None:
                buffer = self.buffers[instruction.output]
                fitting = [a for a in free if arenas[a][0] == buffer.rows]
                if fitting:
                    # The smallest that is large enough, else the largest, which then grows.
                    large = [a for a in fitting if arenas[a][1] >= buffer.columns]
                    chosen = (
                        min(large, key=lambda a: arenas[a][1])
                        if large
                        else max(fitting, key=lambda a: arenas[a][1])
                    )
                    free.remove(chosen)
                    arenas[chosen] = (buffer.rows, max(arenas[chosen][1], buffer.columns))
                else:
                    chosen = len(arenas)
                    arenas.append((buffer.rows, buffer.columns))
                place[instruction.output] = chosen
            for i in set(instruction.inputs):
                if last_use[i] == number:
                    free.append(place[i])
        return BufferPlan(tuple(arenas), tuple(place[b.index] for b in self.buffers))


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """`arenas`: (rows, columns) of each piece of memory; `place[i]`: the arena of buffer i."""

    arenas: tuple[tuple[Rows, int], ...]
    place: Sequence[int]
