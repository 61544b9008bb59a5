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
    """The ops of `Ops`; csrc/ridgeline.h has the same numbers (a test compares them)."""

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
    ALL_REDUCE = 11
    ALL_GATHER = 12
    SEND = 13
    RECEIVE = 14


@dataclass(frozen=True, slots=True)
class Buffer:
    """An activation, float32 on native."""

    index: int
    rows: Rows
    columns: int

    def __str__(self) -> str:
        return f"%{self.index}[{self.rows}, {self.columns}]"


ROLES: dict[Opcode, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Opcode.EMBED: ((), ("table",)),
    Opcode.SCALE: (("x",), ()),
    Opcode.RMS_NORM: (("x", "residual"), ("weight",)),
    Opcode.LINEAR: (("x", "residual"), ("weight", "weight", "weight", "bias", "bias", "bias", "norm")),
    Opcode.ROPE_COS_SIN: ((), ()),
    Opcode.ROPE: (("x", "cos_sin"), ()),
    Opcode.STORE_KV: (("k", "v"), ()),
    Opcode.ATTENTION: (("q", "q_sinks", "k", "v", "cos_sin"), ("q_norm", "k_norm")),
    Opcode.GLU: (("x", "x"), ()),
    Opcode.ADD: (("x", "x"), ()),
    Opcode.GATHER_ROWS: (("x",), ()),
    Opcode.ALL_REDUCE: (("x", "residual"), ()),
    Opcode.ALL_GATHER: (("x",), ()),
    Opcode.SEND: (("x",), ()),
    Opcode.RECEIVE: ((), ()),
}
"""What the inputs and weights of an instruction are, by place; csrc/interpreter.cpp says the same.

`residual` is added to the output. A LINEAR has up to three matrices on one input, each with an output and
perhaps a bias; `norm` is an RMSNorm of x. An ATTENTION with k, v and cos_sin norms, rotates and stores first,
and its q_sinks is then the cos_sin of the sinks. The recorder uses none of this: `fuse` does.
"""


COLLECTIVES = (Opcode.ALL_REDUCE, Opcode.ALL_GATHER, Opcode.SEND, Opcode.RECEIVE)
"""Instructions that wait for other ranks."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One op: buffers and weights by the places of `ROLES`, None for an absent one, and its plain numbers."""

    opcode: Opcode
    outputs: tuple[int, ...]
    inputs: tuple[int | None, ...]
    weights: tuple[int | None, ...] = ()
    attributes: tuple[tuple[str, float | int | str | None], ...] = ()

    def attribute(self, name: str) -> float | int | str | None:
        return dict(self.attributes)[name]

    @property
    def read_buffers(self) -> tuple[int, ...]:
        return tuple(i for i in self.inputs if i is not None)

    @property
    def read_weights(self) -> tuple[int, ...]:
        return tuple(w for w in self.weights if w is not None)

    @property
    def matrices(self) -> tuple[int, ...]:
        """Weights that are matrices of a LINEAR."""
        return tuple(w for w in self.weights[:3] if w is not None) if self.opcode is Opcode.LINEAR else ()


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of one step: for each sequence its (new tokens, tokens in the cache after the step)."""

    sequences: tuple[tuple[int, int], ...]
    num_logits: int
    num_shared_keys: int = 0
    """of all sequences, those in blocks that another one of them reads as well"""

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

    def num_cached_read(self, window: int | None, num_sinks: int) -> int:
        """Tokens whose K and V some query of the step sees, each counted once for its sequence."""
        if window is None:
            return sum(seq_len for _, seq_len in self.sequences)
        return sum(min(seq_len, num_new - 1 + window + num_sinks) for num_new, seq_len in self.sequences)


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
            out = ", ".join(str(self.buffers[i]) for i in instruction.outputs)
            input_roles, weight_roles = ROLES[instruction.opcode]
            named = [
                (role, f"%{i}")
                for role, i in zip(input_roles, instruction.inputs, strict=False)
                if i is not None
            ]
            for role, w in zip(weight_roles, instruction.weights, strict=False):
                if w is not None:
                    named.append((role, f"{self.weights[w].name}:{self.weights[w].format.name}"))
            operands = [
                text if role in ("x", "weight", "table") else f"{role}={text}" for role, text in named
            ]
            operands += [
                f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in instruction.attributes
            ]
            arrow = f"{out} = " if out else ""
            lines.append(f"{number:4d}  {arrow}{instruction.opcode.name.lower()}({', '.join(operands)})")
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
            num_elements = sum(self.weights[w].num_elements for w in instruction.matrices)
            return 2 * self.num_rows(instruction.read_buffers[0], shape) * num_elements
        if instruction.opcode is Opcode.ATTENTION:
            window, num_sinks = instruction.attribute("window"), instruction.attribute("num_sinks")
            assert (window is None or isinstance(window, int)) and isinstance(num_sinks, int)
            return 4 * self.buffers[instruction.outputs[0]].columns * shape.num_visible(window, num_sinks)
        return 0

    def bytes(self, shape: StepShape, *, kv_token_bytes: int) -> int:
        """Bytes that a step of `shape` reads and writes, instruction by instruction.

        `kv_token_bytes`: K and V of one token in one layer, in the cache's type.
        """
        return sum(
            self.instruction_bytes(instruction, shape, kv_token_bytes=kv_token_bytes)
            for instruction in self.instructions
        )

    def instruction_bytes(self, instruction: Instruction, shape: StepShape, *, kv_token_bytes: int) -> int:
        """Each weight once in its file's format, float32 activations in and out, K and V read and written.

        An embedding reads the rows of its tokens only. Attention reads what its queries see once for each
        sequence: the least that a kernel could do, and what one does whose query tiles stay in the cache.
        """
        outputs = sum(4 * self.num_rows(i, shape) * self.buffers[i].columns for i in instruction.outputs)
        inputs = sum(4 * self.num_rows(i, shape) * self.buffers[i].columns for i in instruction.read_buffers)
        weights = sum(self.weights[w].num_bytes for w in instruction.read_weights)
        if instruction.outputs and not outputs:
            return 0  # a head without rows
        match instruction.opcode:
            case Opcode.EMBED:
                table = self.weights[instruction.read_weights[0]]
                return outputs + shape.num_tokens * table.num_bytes // table.shape[0]
            case Opcode.GATHER_ROWS:
                return 2 * outputs
            case Opcode.STORE_KV:
                return inputs + shape.num_tokens * kv_token_bytes
            case Opcode.ATTENTION:
                window, num_sinks = instruction.attribute("window"), instruction.attribute("num_sinks")
                assert (window is None or isinstance(window, int)) and isinstance(num_sinks, int)
                stores = len(instruction.inputs) > 2 and instruction.inputs[2] is not None
                num_moved = shape.num_cached_read(window, num_sinks) + stores * shape.num_tokens
                return inputs + weights + outputs + num_moved * kv_token_bytes
        return inputs + weights + outputs

    def communication_bytes(self, shape: StepShape, *, element_size: int = 4) -> int:
        """What the collectives count in a step of `shape`: the results that this rank gets, what it sends.

        `element_size`: of an activation, 4 on native.
        """
        return sum(
            self.message_bytes(instruction, shape, element_size=element_size)
            for instruction in self.instructions
            if instruction.opcode in COLLECTIVES
        )

    def message_bytes(self, instruction: Instruction, shape: StepShape, *, element_size: int = 4) -> int:
        """The same of one of the COLLECTIVES."""
        buffer = (*instruction.outputs, *instruction.read_buffers)[0]
        return element_size * self.num_rows(buffer, shape) * self.buffers[buffer].columns

    def activation_bytes(self, *, max_tokens: int, max_logits: int) -> int:
        """Bytes of the planned float32 buffers for the largest step."""
        plan = self.plan_buffers()
        rows = {"T": max_tokens, "L": max_logits}
        return sum(4 * rows[kind] * columns for kind, columns in plan.arenas)

    def plan_buffers(self) -> BufferPlan:
        """Give buffers whose lifetimes do not overlap the same memory: first fit over the program order."""
        last_use = {
            i: number
            for number, instruction in enumerate(self.instructions)
            for i in instruction.read_buffers
        }
        last_use[self.output] = len(self.instructions)
        arenas: list[tuple[Rows, int]] = []
        free: list[int] = []
        place: dict[int, int] = {}
        for number, instruction in enumerate(self.instructions):
            for output in instruction.outputs:
                buffer = self.buffers[output]
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
                place[output] = chosen
            for i in {*instruction.read_buffers, *instruction.outputs}:
                if last_use.get(i, number) == number:
                    free.append(place[i])
        return BufferPlan(tuple(arenas), tuple(place.get(b.index, -1) for b in self.buffers))


@dataclass(frozen=True, slots=True)
class BufferPlan:
    """`arenas`: (rows, columns) of each piece of memory; `place[i]`: the arena of buffer i, -1 if unused."""

    arenas: tuple[tuple[Rows, int], ...]
    place: Sequence[int]
