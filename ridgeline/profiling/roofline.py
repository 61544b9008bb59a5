"""Time from arithmetic: what a Program must read and compute, over what the machine can do.

Two answers for every instruction. The *bound* divides its bytes and FLOPs by the machine's limits and takes
the larger: no implementation can be faster (Williams, Waterman and Patterson, "Roofline: an insightful visual
performance model", 2009). The *prediction* uses the rates that our kernels reach on generic shapes (`rates`)
and adds what a step costs outside of them: it is what the engine should take, and its error is measured.

Sequences are (new tokens, tokens in the cache after the step), as in `StepShape`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from ridgeline.config import TILE_TOKENS, EngineConfig
from ridgeline.engine.executors.native import stored_weights
from ridgeline.engine.memory import plan_cache
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import record_decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.fuse import fuse, rules_named
from ridgeline.ops.packing import input_bits, kernel_name, weight_label
from ridgeline.ops.program import COLLECTIVES, Instruction, Opcode, Program, StepShape
from ridgeline.profiling.links import Link
from ridgeline.profiling.machine import MachineLimits
from ridgeline.profiling.rates import (
    AttentionRate,
    KernelRates,
    LinearRate,
    measured_activation_bytes,
    scored_pairs,
    set_of,
)

ELEMENT_KINDS = {Opcode.RMS_NORM: "norm", Opcode.GLU: "glu", Opcode.ADD: "add"}


@dataclass(frozen=True, slots=True)
class OpEstimate:
    """Instructions of one kind in one step, together."""

    name: str
    count: int
    num_bytes: int
    flops: int
    bound_s: float
    predicted_s: float | None
    """None without rates: a described device."""
    is_compute_bound: bool

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.num_bytes if self.num_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Company:
    """The other ranks, for the Program of one of them."""

    link: Link
    tp_size: int
    num_on_machine: int
    """Ranks that share the cores and the memory of one machine, each with its share of the threads"""


class Predictor:
    """Owns a fused Program with what is known about the machine that shall run it."""

    def __init__(
        self,
        program: Program,
        layout: CacheLayout,
        limits: MachineLimits,
        rates: KernelRates | None,
        company: Company | None = None,
    ) -> None:
        self.program = program
        self._company = company
        self._num_on_machine = 1 if company is None else company.num_on_machine
        self.limits = limits
        self._layout = layout
        self._kv_token_bytes = layout.num_bytes // (layout.num_layers * layout.num_slots)
        self._rates = rates
        self._model_bytes = program.weight_bytes()
        self._linear_rates: dict[tuple[str, int], Mapping[int, LinearRate]] = {}
        self._attention_rates: dict[int, Mapping[tuple[int, int], AttentionRate]] = {}
        self._known: dict[tuple[int, int, tuple[tuple[int, int], ...]], float] = {}
        self._kinds = Counter(kind_of(i, program) for i in program.instructions)
        self._examples = {kind_of(i, program): i for i in program.instructions}

    @classmethod
    def for_model(
        cls,
        model: LoadedModel,
        config: EngineConfig,
        limits: MachineLimits,
        rates: KernelRates | None = None,
        *,
        layout: CacheLayout | None = None,
        company: Company | None = None,
    ) -> Predictor:
        """For the native executor with the settings of `config`, resolved or not. Reads no weights.

        For a rank: its shard of the model, the `layout` of its cache, and the others. Raises ConfigError
        where the settings cannot run on native, for which alone there are rates.
        """
        resolved = config.resolve(model.config, unavailable={})
        if rates is not None and resolved.executor != "native":
            raise ConfigError(
                f"executor={resolved.executor!r} cannot be predicted: only the kernels of 'native' are known"
            )
        assert resolved.max_model_len
        weights = stored_weights(resolved, model) if resolved.executor == "native" else model.weights
        program = record_decoder(
            model.config, weights, max_model_len=resolved.max_model_len, shard=model.shard
        )
        if resolved.executor == "native":
            program = fuse(program, rules_named(resolved.fusion))
        return cls(program, layout or plan_cache(resolved, model.config), limits, rates, company)

    def step_s(
        self, sequences: Sequence[tuple[int, int]], num_logits: int, num_shared_keys: int = 0
    ) -> float:
        """Seconds of one engine step; the bound where there are no rates.

        Steps of about the same shape are computed once, so that a long simulation is quick.
        """
        alike = alike_step(sequences)
        key = (num_logits, num_shared_keys, alike)
        if key not in self._known:
            self._known[key] = self._step_s(StepShape(alike, num_logits, num_shared_keys))
        return self._known[key]

    def _step_s(self, shape: StepShape) -> float:
        return self.ops_s(shape) + self.overhead_s(shape)

    def ops_s(self, shape: StepShape) -> float:
        """Seconds of all instructions together."""
        return sum(e.bound_s if e.predicted_s is None else e.predicted_s for e in self.estimates(shape))

    def overhead_s(self, shape: StepShape) -> float:
        """Seconds of a step outside of the kernels."""
        if self._rates is None:
            return 0.0
        rate = self._rates.engine(among=set_of(self._step_bytes(shape), parts=2))
        num_values = shape.num_logits * self.program.buffers[self.program.output].columns
        return rate.seconds(shape.num_tokens, len(shape.sequences), num_values)

    def prefill_s(self, num_tokens: int, *, chunk: int = 512) -> float:
        """TTFT of one prompt on an idle engine, in chunks of `chunk` tokens."""
        ends = [*range(chunk, num_tokens, chunk), num_tokens]
        starts = [0, *ends[:-1]]
        return sum(
            self.step_s([(end - start, end)], int(end == num_tokens))
            for start, end in zip(starts, ends, strict=True)
        )

    def decode_s(self, batch: int, context: int) -> float:
        """TPOT: one step of `batch` sequences whose context becomes `context` tokens."""
        return self.step_s([(1, context)] * batch, batch)

    def estimates(self, shape: StepShape) -> list[OpEstimate]:
        """Every kind of instruction in the order of the Program."""
        found = []
        moved = self._moved_bytes(shape)
        for name, count in self._kinds.items():
            instruction = self._examples[name]
            if instruction.opcode in COLLECTIVES:
                found.append(self._exchange(name, count, shape))
                continue
            num_bytes = self.program.instruction_bytes(
                instruction, shape, kv_token_bytes=self._kv_token_bytes
            )
            flops = self.program.instruction_flops(instruction, shape)
            memory_s, compute_s = self._bound(instruction, shape, num_bytes, flops)
            predicted = None
            if self._rates is not None:
                predicted = self._predict(instruction, shape, num_bytes, moved / count)
            times = count * self._num_on_machine
            found.append(
                OpEstimate(
                    name=name,
                    count=count,
                    num_bytes=count * num_bytes,
                    flops=count * flops,
                    bound_s=times * max(memory_s, compute_s),
                    predicted_s=None if predicted is None else times * predicted,
                    is_compute_bound=compute_s > memory_s,
                )
            )
        return found

    def _exchange(self, name: str, count: int, shape: StepShape) -> OpEstimate:
        """Instructions that wait for other ranks: bytes that go over the link, and what that takes."""
        assert self._company is not None, "a Program of a rank is predicted with its company"
        instruction = self._examples[name]
        num_bytes = self.program.message_bytes(instruction, shape)
        seconds = count * self._company.link.seconds(instruction.opcode, num_bytes, self._company.tp_size)
        predicted_s = None if self._rates is None else seconds
        return OpEstimate(name, count, count * num_bytes, 0, seconds, predicted_s, is_compute_bound=False)

    def _step_bytes(self, shape: StepShape) -> int:
        """Weights, and the pages of the step's sequences, of all ranks that share the machine's caches."""
        num_keys = max(sum(length for _, length in shape.sequences) - shape.num_shared_keys, 0)
        own = self._model_bytes + num_keys * self._layout.num_layers * self._kv_token_bytes
        return own * self._num_on_machine

    def _moved_bytes(self, shape: StepShape) -> int:
        """What all instructions read and write, on all ranks that share the caches."""
        return self._num_on_machine * sum(
            count
            * self.program.instruction_bytes(self._examples[name], shape, kv_token_bytes=self._kv_token_bytes)
            for name, count in self._kinds.items()
        )

    def _bound(
        self, instruction: Instruction, shape: StepShape, num_bytes: int, flops: int
    ) -> tuple[float, float]:
        """Seconds of memory and of arithmetic at the machine's limits."""
        is_large = bool(instruction.matrices) or instruction.opcode is Opcode.ATTENTION
        # Weights and pages come from where a whole step's bytes fit; activations stay in the nearest cache.
        gb_s = self.limits.read_gb_s(self._step_bytes(shape) if is_large else num_bytes)
        peak = self.limits.fp32_gflop_s
        if instruction.matrices:
            peak = min(
                peak_of(weight_label(self.program.weights[w]), self.limits) for w in instruction.matrices
            )
        return num_bytes / gb_s / 1e9, flops / peak / 1e9

    def _predict(self, instruction: Instruction, shape: StepShape, num_bytes: int, between: float) -> float:
        """Seconds of one instruction with the rates of the kernels.

        between: bytes that a step moves for each instruction of this kind.
        """
        assert self._rates is not None
        if instruction.opcode is Opcode.LINEAR:
            return self._predict_linear(instruction, shape, num_bytes, between)
        if instruction.opcode is Opcode.ATTENTION:
            return self._predict_attention(instruction, shape)
        if instruction.opcode in ELEMENT_KINDS:
            elements = sum(
                self.program.num_rows(i, shape) * self.program.buffers[i].columns for i in instruction.outputs
            )
            element_s = self._rates.element_s(ELEMENT_KINDS[instruction.opcode])
            return self._barrier_s(elements) + elements * element_s
        return self._barrier_s(num_bytes // 4) + num_bytes / self.limits.read_gb_s(num_bytes) / 1e9

    def _barrier_s(self, num_elements: int) -> float:
        return self.limits.barrier_s if num_elements >= 4096 else 0.0

    def _predict_linear(
        self, instruction: Instruction, shape: StepShape, num_bytes: int, between: float
    ) -> float:
        assert self._rates is not None
        rows = self.program.num_rows(instruction.read_buffers[0], shape)
        columns = self.program.buffers[instruction.read_buffers[0]].columns
        if not rows:
            return 0.0  # the head of a chunk that is not the last
        among = set_of(self._step_bytes(shape))
        rates = []
        for w in instruction.matrices:
            weight = self.program.weights[w]
            kernel = kernel_name(weight), among
            if kernel not in self._linear_rates:
                self._linear_rates[kernel] = self._rates.linear(kernel[0], among=among)
            rates.append((_at_tokens(self._linear_rates[kernel], rows), weight.shape[0]))
        total = LinearRate.seconds(rates, columns)
        outputs = rows * sum(self.program.buffers[i].columns for i in instruction.outputs)
        if len(instruction.weights) > 6 and instruction.weights[6] is not None:
            total += rows * columns * self._rates.element_s("norm")
        if dict(instruction.attributes).get("activation") is not None:
            total += outputs * self._rates.element_s("glu")
        if len(instruction.read_buffers) > 1:
            total += outputs * self._rates.element_s("add")
        # What is read between two instructions of this kind has pushed their activations out of the caches
        # nearby; to write there is to read first.
        moved = num_bytes - sum(self.program.weights[w].num_bytes for w in instruction.read_weights)
        moved += 4 * outputs
        near = self.limits.read_gb_s(measured_activation_bytes(rows))
        far = self.limits.read_gb_s(max(between, moved))
        return total + moved * max(1 / far - 1 / near, 0.0) / 1e9

    def _predict_attention(self, instruction: Instruction, shape: StepShape) -> float:
        assert self._rates is not None
        layout = self._layout
        columns = self.program.buffers[instruction.outputs[0]].columns
        q_per_kv = columns // layout.head_dim // layout.num_kv_heads
        kernel: dict[str, Any] = {"head_dim": layout.head_dim, "q_per_kv": q_per_kv, "dtype": layout.dtype}
        among = set_of(self._step_bytes(shape), parts=2)
        if among not in self._attention_rates:
            self._attention_rates[among] = self._rates.attention(**kernel, among=among)
        num_keys = sum(length for _, length in shape.sequences)
        share = min(shape.num_shared_keys / num_keys, 1.0) if num_keys else 0.0
        window, num_sinks = instruction.attribute("window"), instruction.attribute("num_sinks")
        assert (window is None or isinstance(window, int)) and isinstance(num_sinks, int)
        decodes = tuple(s for s in shape.sequences if s[0] == 1)
        groups = [(decodes, 1, len(decodes))] if decodes else []
        groups += [((s,), s[0], 1) for s in shape.sequences if s[0] > 1]
        total = 0.0
        for sequences, num_new, num_seqs in groups:
            rate = _attention_at(self._attention_rates[among], num_new, num_seqs)
            pairs = sum(scored_pairs(*s, window=window, num_sinks=num_sinks) for s in sequences)
            fixed = min(self.limits.barrier_s, rate.call_s)
            pair_s = rate.pair_s
            if share and num_new == 1:
                shared_s = self._rates.shared_pair_s(**kernel, among=among)
                pair_s += share * (min(shared_s, pair_s) - pair_s)
            total += fixed + layout.num_kv_heads * (rate.call_s - fixed + pairs * pair_s)
        return total


def alike_step(sequences: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """One step for all those that take as long: prompts as they are, the tiles of decodes dealt out evenly.

    Attention reads whole tiles, so sequences of as many tiles in all take as long.
    """
    prefills = [(new, length) for new, length in sequences if new > 1]
    decodes = [length for new, length in sequences if new == 1]
    tiles = sum(-(-length // TILE_TOKENS) for length in decodes)
    each, more = divmod(tiles, max(len(decodes), 1))
    return (*prefills, *((1, TILE_TOKENS * (each + (i < more))) for i in range(len(decodes))))


def peak_of(label: str, limits: MachineLimits) -> float:
    """Operations (1e9 a second) of the kind that a matrix of this `weight_label` is multiplied with."""
    bits = input_bits(label, limits.isa)
    return {32: limits.fp32_gflop_s, 16: limits.int16_gop_s, 8: limits.int8_gop_s}[bits]


def kind_of(instruction: Instruction, program: Program) -> str:
    """Opcode, formats and shapes: instructions of the same kind take the same time."""
    name = instruction.opcode.name.lower()
    if instruction.matrices:
        formats = "+".join(dict.fromkeys(weight_label(program.weights[w]) for w in instruction.matrices))
        shapes = "+".join(str(program.weights[w].shape[0]) for w in instruction.matrices)
        return f"{name} {formats} {shapes} x {program.weights[instruction.matrices[0]].shape[1]}"
    if instruction.opcode is Opcode.ATTENTION:
        window = instruction.attribute("window")
        return name if window is None else f"{name} window {window}"
    if instruction.outputs:
        return f"{name} {program.buffers[instruction.outputs[0]].columns}"
    return name


def _at_tokens(rates: Mapping[int, LinearRate], tokens: int) -> LinearRate:
    """Linear between measured numbers of tokens, as tiles come one by one, and in proportion beyond them."""
    measured = sorted(rates)
    factor = max(tokens / measured[-1], 1.0)
    by_part = zip(*(astuple(rates[t]) for t in measured), strict=True)
    return LinearRate(*(factor * float(np.interp(tokens, measured, values)) for values in by_part))


def _attention_at(
    rates: Mapping[tuple[int, int], AttentionRate], num_new: int, num_seqs: int
) -> AttentionRate:
    """Between measured sizes, by their logarithms: of sequences with one new token, or of new tokens."""
    points = sorted(
        (seqs if num_new == 1 else new, rate.call_s, rate.pair_s)
        for (new, seqs), rate in rates.items()
        if (new == 1 if num_new == 1 else seqs == 1)
    )
    size = num_seqs if num_new == 1 else num_new
    at = [math.log2(p[0]) for p in points]
    x = math.log2(size)
    call_s = float(np.interp(x, at, [p[1] for p in points])) * max(1.0, size / points[-1][0])
    return AttentionRate(call_s, float(np.interp(x, at, [p[2] for p in points])))
