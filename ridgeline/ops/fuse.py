"""Fusion: fewer instructions that do the same, as a pass over a Program.

Every rule is a function from Program to Program and can be left out, so its effect can be seen
(`Program.text` before and after) and measured. No rule changes a result: the fused kernel runs the same
arithmetic in the same order, it only saves passes over memory and thread barriers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from ridgeline.errors import ConfigError
from ridgeline.ops.program import Instruction, Opcode, Program


def rules_named(text: str | None) -> tuple[str, ...]:
    """Rule names from a setting: None means all, "none" none, else names with commas between."""
    if text is None:
        return tuple(RULES)
    return () if text == "none" else tuple(name.strip() for name in text.split(","))


def fuse(program: Program, rules: Iterable[str] | None = None) -> Program:
    """Apply the named rules, in the order of `RULES`; None means all.

    Raises ConfigError for an unknown rule.
    """
    chosen = set(RULES if rules is None else rules)
    if unknown := chosen - set(RULES):
        raise ConfigError(f"unknown fusion rules {sorted(unknown)}; known: {', '.join(RULES)}")
    for name, rule in RULES.items():
        if name in chosen:
            program = rule(program)
    return program


class _Graph:
    """Who makes and who reads each buffer, by instruction number; edits that are applied at the end."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.instructions: list[Instruction | None] = list(program.instructions)
        self.maker = {o: n for n, i in enumerate(program.instructions) for o in i.outputs}
        self.readers: dict[int, list[int]] = {b.index: [] for b in program.buffers}
        for number, instruction in enumerate(program.instructions):
            for buffer in instruction.read_buffers:
                self.readers[buffer].append(number)

    def made_by(self, buffer: int | None, *opcodes: Opcode) -> tuple[int, Instruction] | None:
        """The instruction that makes `buffer`, if it has one of these opcodes and is still there."""
        number = None if buffer is None else self.maker.get(buffer)
        instruction = None if number is None else self.instructions[number]
        if number is None or instruction is None or instruction.opcode not in opcodes:
            return None
        return number, instruction

    def only_read_by(self, buffer: int, *readers: int) -> bool:
        return buffer != self.program.output and set(self.readers[buffer]) <= set(readers)

    def of(self, opcode: Opcode) -> Iterable[tuple[int, Instruction]]:
        for number, instruction in enumerate(list(self.instructions)):
            if instruction is not None and instruction.opcode is opcode:
                current = self.instructions[number]
                if current is not None:
                    yield number, current

    def finish(self) -> Program:
        return replace(self.program, instructions=tuple(i for i in self.instructions if i is not None))


def _scaled_embedding(program: Program) -> Program:
    """embed, scale -> embed with a factor."""
    graph = _Graph(program)
    for number, scale in graph.of(Opcode.SCALE):
        embed = graph.made_by(scale.inputs[0], Opcode.EMBED)
        if embed and graph.only_read_by(embed[1].outputs[0], number):
            graph.instructions[embed[0]] = replace(
                embed[1],
                outputs=scale.outputs,
                attributes=(*embed[1].attributes, *scale.attributes),
            )
            graph.instructions[number] = None
    return graph.finish()


def _attention_with_rope(program: Program) -> Program:
    """QK-norm, rope of q and k, store_kv, attention -> attention that does all of it per token."""
    graph = _Graph(program)
    stores = {store.attribute("layer"): (number, store) for number, store in graph.of(Opcode.STORE_KV)}
    for number, attention in graph.of(Opcode.ATTENTION):
        store_number, store = stores[attention.attribute("layer")]
        q_rope = graph.made_by(attention.inputs[0], Opcode.ROPE)
        k_rope = graph.made_by(store.inputs[0], Opcode.ROPE)
        has_sinks = len(attention.inputs) > 1
        sinks_rope = graph.made_by(attention.inputs[1], Opcode.ROPE) if has_sinks else None
        if q_rope is None or k_rope is None or (has_sinks and sinks_rope is None):
            continue
        if q_rope[1].inputs[1] != k_rope[1].inputs[1]:
            continue
        if sinks_rope is not None and sinks_rope[1].inputs[0] != q_rope[1].inputs[0]:
            continue
        ropes = [rope for rope in (q_rope, k_rope, sinks_rope) if rope is not None]
        readers = {q_rope[0]: number, k_rope[0]: store_number}
        if not all(graph.only_read_by(r.outputs[0], readers.get(n, number)) for n, r in ropes):
            continue
        q, k = q_rope[1].inputs[0], k_rope[1].inputs[0]
        assert q is not None and k is not None
        gone = [n for n, _ in ropes] + [store_number]
        weights: tuple[int | None, ...] = ()
        norms: tuple[tuple[str, float | int | str | None], ...] = ()
        q_norm, k_norm = graph.made_by(q, Opcode.RMS_NORM), graph.made_by(k, Opcode.RMS_NORM)
        if (
            q_norm
            and k_norm
            and q_norm[1].attributes == k_norm[1].attributes
            and graph.only_read_by(q, *gone)
            and graph.only_read_by(k, *gone)
            and all(
                program.weights[n.read_weights[0]].shape == (attention.attribute("head_dim"),)
                for _, n in (q_norm, k_norm)
            )
        ):
            weights = (q_norm[1].weights[0], k_norm[1].weights[0])
            norms = tuple((f"norm_{name}", value) for name, value in q_norm[1].attributes)
            q, k = q_norm[1].inputs[0], k_norm[1].inputs[0]
            gone += [q_norm[0], k_norm[0]]
        inputs = (q, sinks_rope[1].inputs[1] if sinks_rope else None, k, store.inputs[1], q_rope[1].inputs[1])
        graph.instructions[number] = Instruction(
            Opcode.ATTENTION, attention.outputs, inputs, weights, (*attention.attributes, *norms)
        )
        for n in gone:
            graph.instructions[n] = None
    return graph.finish()


def _read_alike(program: Program, first: Instruction, second: Instruction) -> bool:
    """Whether two linears round their input in the same way and read its features in the same order."""
    one, other = (program.weights[i.matrices[0]] for i in (first, second))
    orders = [w.buffers.get("order") for w in (one, other)]
    same_order = (orders[0] is None) == (orders[1] is None) and (
        orders[0] is None or orders[1] is None or np.array_equal(orders[0], orders[1])
    )
    return one.activation == other.activation and same_order


def _merged_linears(program: Program) -> Program:
    """Up to three linears that read one input alike -> one, which reads it once."""
    graph = _Graph(program)
    for number, first in graph.of(Opcode.LINEAR):
        x = first.read_buffers[0]
        others = [n for n in graph.readers[x] if n > number]
        found = [(n, graph.instructions[n]) for n in others]
        alike = [
            i
            for _, i in found
            if i is not None and i.opcode is Opcode.LINEAR and _read_alike(program, first, i)
        ]
        group = [first, *alike[:2]]
        if len(group) == 1 or any(len(i.matrices) > 1 or len(i.inputs) > 1 for i in group):
            continue
        for n, instruction in found:
            if any(instruction is member for member in group):
                graph.instructions[n] = None
        matrices = [i.weights[0] for i in group] + [None] * (3 - len(group))
        biases = [i.weights[3] if len(i.weights) > 3 else None for i in group]
        weights = (*matrices, *biases) if any(b is not None for b in biases) else tuple(matrices)
        graph.instructions[number] = replace(
            first, outputs=tuple(i.outputs[0] for i in group), weights=weights
        )
    return graph.finish()


def _gated_linear(program: Program) -> Program:
    """linear of gate and up, glu -> one linear whose output is activation(gate) · up."""
    graph = _Graph(program)
    for number, glu in graph.of(Opcode.GLU):
        linear = graph.made_by(glu.inputs[0], Opcode.LINEAR)
        if (
            linear
            and linear[1].outputs == glu.inputs
            and not any(w is not None for w in linear[1].weights[2:])
            and all(graph.only_read_by(o, number) for o in linear[1].outputs)
            and len({program.weights[w].shape for w in linear[1].matrices}) == 1
        ):
            graph.instructions[linear[0]] = replace(
                linear[1], outputs=glu.outputs, attributes=(*linear[1].attributes, *glu.attributes)
            )
            graph.instructions[number] = None
    return graph.finish()


def _normed_linear(program: Program) -> Program:
    """rms_norm of a whole row that only one linear reads -> linear that norms its input."""
    graph = _Graph(program)
    for number, linear in graph.of(Opcode.LINEAR):
        norm = graph.made_by(linear.inputs[0], Opcode.RMS_NORM)
        if norm is None or len(norm[1].inputs) > 1 or not graph.only_read_by(norm[1].outputs[0], number):
            continue
        weight = norm[1].read_weights[0]
        if program.weights[weight].shape != (program.buffers[norm[1].outputs[0]].columns,):
            continue
        weights = (*linear.weights, *[None] * (6 - len(linear.weights)), weight)
        norms = tuple((f"norm_{name}", value) for name, value in norm[1].attributes)
        graph.instructions[number] = replace(
            linear,
            inputs=(norm[1].inputs[0], *linear.inputs[1:]),
            weights=weights,
            attributes=(*linear.attributes, *norms),
        )
        graph.instructions[norm[0]] = None
    return graph.finish()


def _residual(program: Program) -> Program:
    """linear, rms_norm or all_reduce, add -> the same with the residual added as it is written."""
    graph = _Graph(program)
    for number, add in graph.of(Opcode.ADD):
        residual, y = add.read_buffers
        made = graph.made_by(y, Opcode.LINEAR, Opcode.RMS_NORM, Opcode.ALL_REDUCE)
        if made is None or not graph.only_read_by(y, number) or residual == y:
            continue
        at, instruction = made
        if len(instruction.outputs) > 1 or len(instruction.matrices) > 1 or len(instruction.inputs) > 1:
            continue
        if graph.maker[residual] > at:
            continue
        graph.instructions[at] = replace(
            instruction, outputs=add.outputs, inputs=(instruction.inputs[0], residual)
        )
        graph.instructions[number] = None
    return graph.finish()


RULES: dict[str, Callable[[Program], Program]] = {
    "scaled_embedding": _scaled_embedding,
    "attention_with_rope": _attention_with_rope,
    "merged_linears": _merged_linears,
    "gated_linear": _gated_linear,
    "normed_linear": _normed_linear,
    "residual": _residual,
}
"""In order: later rules build on what earlier ones made."""
