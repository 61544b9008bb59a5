"""A small Program and what must come out of it: `Sketch` records ops and computes them in float64.

It carries for every number how far float32 may be off. Where a kernel rounds on purpose (`emulate`) it rounds
the same way, so tolerances are a few ulps and one wrong code fails.

Letters: T tokens, N x K a weight, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ridgeline.config import Activation, KVCacheDType
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.emulate import (
    EPS,
    Floats,
    make_weight,
    quantized_activations,
    rounded_pages,
    rounded_tokens,
)
from ridgeline.ops.fuse import fuse
from ridgeline.ops.packing import input_bits, kernel_name
from ridgeline.ops.program import Buffer, Program, StepShape
from ridgeline.ops.recorder import Recorder
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import ActivationQuant, Weight

Impl = Literal["flash", "naive"]
UNDERFLOW = 1e-34
"""What may be lost to subnormals."""


@dataclass(frozen=True, slots=True)
class BuiltCase:
    """What `KernelCase.make` makes. The last batch is the one whose output is compared."""

    program: Program
    layout: CacheLayout
    batches: tuple[ForwardBatch, ...]
    expected: Floats
    """[T or L, columns] of the Program's output"""
    tolerance: Floats
    """how far each of them may be off"""
    flops: int
    num_bytes: int
    """weights, inputs, output and visible KV of the last step, each once"""
    attention: Impl = "flash"
    rounding_error: float | None = None
    """largest difference that rounded activations make; None without a quantized matrix"""


@dataclass(frozen=True, slots=True)
class KernelCase:
    name: str
    group: str
    make: Callable[[], BuiltCase]


@dataclass(frozen=True, slots=True)
class Traced:
    """A buffer with its values [rows, columns] and how far float32 may be off."""

    buffer: Buffer
    value: Floats
    error: Floats


@dataclass(frozen=True, slots=True)
class Texts:
    """Sequences as (tokens already cached, new tokens); the cached ones are stored in a step of their own."""

    sequences: tuple[tuple[int, int], ...]
    block_size: int = 32
    num_padding: int = 0
    free_behind: int | None = None
    """give up the blocks that no query of the last step can see with this window (sinks are kept)"""
    num_sinks: int = 0


class Sketch:
    """`Ops` that records a Program and computes it in float64, over the rows of all steps at once.

    Row by row everything but attention is independent, so the steps are simply concatenated; attention looks
    up the rows of its sequence by position.
    """

    def __init__(self, texts: Texts, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.recorder = Recorder()
        self.kv: tuple[Traced, Traced] | None = None
        self.page_dtype: KVCacheDType = "float32"
        self.rounding_error: float | None = None
        self.weight_bytes = self.input_columns = 0
        self.texts = texts
        self.batches = self._make_batches()
        sizes = [len(b.token_ids) for b in self.batches]
        self.num_rows, self.last = sum(sizes), slice(sum(sizes[:-1]), sum(sizes))
        self.positions = np.concatenate([b.positions for b in self.batches])
        self.is_stored = np.concatenate([b.slot_mapping for b in self.batches]) >= 0
        self.sequence = np.concatenate(tuple(self._sequences()))

    def _make_batches(self) -> tuple[ForwardBatch, ...]:
        texts, size = self.texts, self.texts.block_size
        counts = [-(-(start + new) // size) for start, new in texts.sequences]
        self.num_blocks = sum(counts) + 3
        ids = iter(self.rng.permutation(self.num_blocks).tolist())
        blocks = [tuple(next(ids) for _ in range(count)) for count in counts]
        both = list(zip(texts.sequences, blocks, strict=True))
        cached = [Row((0,) * start, 0, table, 0) for (start, _), table in both if start]
        self._cached = [i for i, (start, _) in enumerate(texts.sequences) if start]
        new = [
            Row((0,) * new, start, self._kept(start, table), new, texts.num_padding)
            for (start, new), table in both
        ]
        batches, base = [], 0
        for rows in (cached, new):
            if not rows:
                continue
            batch = ForwardBatch.from_rows(rows, block_size=size)
            batch.token_ids[:] = base + np.arange(len(batch.token_ids))
            base += len(batch.token_ids)
            batches.append(batch)
        return tuple(batches)

    def _kept(self, start: int, table: tuple[int, ...]) -> tuple[int, ...]:
        """The block table with -1 for blocks that lie behind the window of the first new token."""
        texts = self.texts
        if texts.free_behind is None:
            return table
        first = max(0, start - texts.free_behind + 1)
        return tuple(
            block if (i + 1) * texts.block_size > first or i * texts.block_size < texts.num_sinks else -1
            for i, block in enumerate(table)
        )

    def _sequences(self) -> Iterator[npt.NDArray[np.int64]]:
        numbers = [self._cached, list(range(len(self.texts.sequences)))][-len(self.batches) :]
        for batch, names in zip(self.batches, numbers, strict=True):
            yield np.repeat(names, np.diff(batch.query_start_loc))

    def weight(
        self,
        name: str,
        *shape: int,
        format: str = "F32",
        std: float = 1.0,
        activation: ActivationQuant | None = None,
        is_ordered: bool = False,
    ) -> Weight:
        """Random numbers; counted in the bytes that the step reads."""
        made = make_weight(
            name, *shape, format=format, std=std, rng=self.rng, activation=activation, is_ordered=is_ordered
        )
        self.weight_bytes += made.num_bytes
        return made

    def input(self, name: str, columns: int, values: npt.NDArray[np.float32] | None = None) -> Traced:
        """Given or normal numbers, looked up in a float32 table: the way into a Program."""
        if values is None:
            values = self.rng.standard_normal((self.num_rows, columns), np.float32)
        self.input_columns += columns
        table = Weight(name, FORMATS["F32"], values.shape, {"data": values})
        buffer = self.recorder.embed(self.recorder.bind(table), None)
        return Traced(buffer, values.astype(np.float64), np.zeros(values.shape))

    def embed(self, table: Weight, factor: float, *, first_row: int = 0) -> Traced:
        """Token ids count up, so row t - first_row of the table comes out at token t."""
        buffer = self.recorder.embed(self.recorder.bind(table), None, first_row=first_row)
        rows = table.dequantize().astype(np.float64)
        num_after = max(0, self.num_rows - first_row - len(rows))
        value = np.pad(rows, ((first_row, num_after), (0, 0)))[: self.num_rows]
        # A zero and a min are applied in two roundings, one of which may cancel.
        traced = Traced(buffer, value, 2 * EPS * np.abs(value) + 4 * EPS * np.abs(value).max())
        return traced if factor == 1.0 else self.scale(traced, factor)

    def scale(self, x: Traced, factor: float) -> Traced:
        factor = float(np.float32(factor))
        value = x.value * factor
        buffer = self.recorder.scale(x.buffer, factor)
        return Traced(buffer, value, x.error * abs(factor) + EPS * np.abs(value))

    def add(self, x: Traced, y: Traced) -> Traced:
        value = x.value + y.value
        return Traced(self.recorder.add(x.buffer, y.buffer), value, x.error + y.error + EPS * np.abs(value))

    def rms_norm(self, x: Traced, weight: Weight, *, eps: float, offset: float) -> Traced:
        gain = weight.dequantize().astype(np.float64) + offset
        groups = x.value.reshape(len(x.value), -1, len(gain))
        inverse = 1 / np.sqrt((groups**2).mean(-1, keepdims=True) + float(np.float32(eps)))
        value = (groups * inverse * gain).reshape(x.value.shape)
        own = 8 * EPS * np.abs(value)
        largest = np.abs(x.error.reshape(groups.shape)).max(-1, keepdims=True)
        passed_on = (2 * largest * inverse * np.abs(gain) + 0 * groups).reshape(value.shape)
        buffer = self.recorder.rms_norm(x.buffer, self.recorder.bind(weight), eps=eps, offset=offset)
        return Traced(buffer, value, own + passed_on)

    def linear(self, x: Traced, weight: Weight, bias: Weight | None = None) -> Traced:
        handles = [self.recorder.bind(w) for w in (weight, bias) if w is not None]
        w = weight.dequantize().astype(np.float64)
        order = weight.buffers.get("order", np.arange(w.shape[1]))
        w, given, x_error = w[:, order], x.value[:, order], x.error[:, order]
        rounded, bits = given, input_bits(kernel_name(weight), "generic")
        is_quantized = bits < 32
        if is_quantized or weight.activation:
            if weight.activation:
                rounded, step, is_near_tie = rounded_tokens(given, x_error, weight.activation)
            else:
                rounded, step, is_near_tie = quantized_activations(given, x_error, (1 << (bits - 1)) - 1)
            x_error = np.where(is_near_tie, step, 0) + np.where(x_error > 0, 8 * EPS * np.abs(rounded), 0)
            error = float(np.abs((rounded - given) @ w.T)[self.last].max())
            self.rounding_error = max(error, self.rounding_error or 0.0)
        value = rounded @ w.T
        magnitude = np.abs(rounded) @ np.abs(w).T
        # Float32 sums in order: K roundings of partial sums (twice as many without FMA), or a few per block
        # of a quantized matrix. Its mins and scales are rounded too: a part of the row's largest weight.
        spread = np.abs(rounded).sum(-1, keepdims=True) * np.abs(w).max(-1)
        error = EPS * ((1 if is_quantized else 4) * magnitude + spread) + x_error @ np.abs(w).T
        if bias is not None:
            value = value + bias.dequantize().astype(np.float64)
            error = error + EPS * np.abs(value)
        return Traced(self.recorder.linear(x.buffer, *handles), value, error)

    def glu(self, gate: Traced, up: Traced, activation: Activation) -> Traced:
        x = gate.value
        if activation == "silu":
            activated = x / (1 + np.exp(-x))
        else:
            activated = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        value = activated * up.value
        # Slopes of both are below 1.13; exp's argument is rounded, so its error grows with |x|³ at most.
        own = 8 * EPS * np.abs(value) * (1 + np.abs(x)) + 4 * EPS * np.abs(value) * np.abs(x) ** 3 * 0.1
        error = own + 1.2 * gate.error * np.abs(up.value) + np.abs(activated) * up.error
        error += 1e-35 * np.abs(up.value)  # exp stops at -87
        return Traced(self.recorder.glu(gate.buffer, up.buffer, activation=activation), value, error)

    def cos_sin(self, inv_freq: Floats, *, factor: float = 1.0, max_position: int | None = None) -> Traced:
        positions = self.positions if max_position is None else np.minimum(self.positions, max_position)
        # The product is float32 by definition: models are trained with its rounding.
        angles = (positions.astype(np.float32)[:, None] * inv_freq.astype(np.float32)).astype(np.float64)
        value = np.concatenate((np.cos(angles), np.sin(angles)), -1) * float(np.float32(factor))
        buffer = self.recorder.rope_cos_sin(
            self.recorder.bind_constant(inv_freq), None, attention_factor=factor, max_position=max_position
        )
        return Traced(buffer, value, np.full(value.shape, 2 * EPS * factor))

    def rope(self, x: Traced, cos_sin: Traced, head_dim: int) -> Traced:
        half = cos_sin.value.shape[1] // 2
        cos, sin = cos_sin.value[:, None, :half], cos_sin.value[:, None, half:]

        def heads(a: Floats) -> tuple[Floats, Floats, Floats]:
            a = a.reshape(len(a), -1, head_dim)
            return a[..., :half], a[..., half : 2 * half], a[..., 2 * half :]

        a, b, rest = heads(x.value)
        value = np.concatenate((a * cos - b * sin, b * cos + a * sin, rest), -1).reshape(x.value.shape)
        a, b, rest = (np.abs(part) for part in heads(x.value))
        e, f, rest_error = heads(x.error)
        slack = cos_sin.error.max() + 2 * EPS * np.abs(cos_sin.value).max()
        most = np.abs(cos_sin.value).max()
        both = (a + b) * slack + (e + f) * most
        error = np.concatenate((both, both, rest_error), -1).reshape(x.value.shape)
        return Traced(self.recorder.rope(x.buffer, cos_sin.buffer, head_dim=head_dim), value, error)

    def store_kv(self, k: Traced, v: Traced, dtype: KVCacheDType, head_dim: int) -> None:
        self.recorder.store_kv(0, k.buffer, v.buffer, None)
        held = [Traced(x.buffer, *rounded_pages(x.value, x.error, dtype, head_dim)) for x in (k, v)]
        self.kv = held[0], held[1]
        self.page_dtype, self.head_dim = dtype, head_dim

    def attention(
        self,
        q: Traced,
        *,
        scale: float,
        window: int | None = None,
        num_sinks: int = 0,
        q_sinks: Traced | None = None,
    ) -> Traced:
        """For the last step only; other rows are zero."""
        assert self.kv is not None
        k, v = self.kv
        shape = (self.num_rows, -1, self.head_dim)
        value, error = np.zeros(q.value.shape), np.zeros(q.value.shape)
        scale = float(np.float32(scale))
        group = q.value.shape[1] // k.value.shape[1]
        for s in range(len(self.texts.sequences)):
            is_mine = self.sequence == s
            queries = np.flatnonzero(is_mine)
            queries = queries[queries >= self.last.start]
            keys = np.flatnonzero(is_mine & self.is_stored)
            keys = keys[np.argsort(self.positions[keys])]
            at, seen = self.positions[queries][:, None], self.positions[keys]
            is_sink = seen < num_sinks
            visible = seen <= at
            if window is not None:
                visible &= (seen > at - window) | is_sink
            # [H, M, N]; a KV head serves `group` query heads.
            rows, errors = q.value.reshape(shape)[queries], q.error.reshape(shape)[queries]
            their_k, their_v = (np.repeat(x.value.reshape(shape)[keys], group, 1) for x in (k, v))
            k_error, v_error = (np.repeat(x.error.reshape(shape)[keys], group, 1) for x in (k, v))

            def dot(x: Floats, y: Floats) -> Floats:
                product: Floats = np.matmul(x.transpose(1, 0, 2), y.transpose(1, 2, 0))
                return product

            scores = dot(rows, their_k)
            size = dot(np.abs(rows), np.abs(their_k))
            off = dot(errors, np.abs(their_k)) + dot(np.abs(rows), k_error)
            if q_sinks is not None and num_sinks:
                other = q_sinks.value.reshape(shape)[queries]
                scores = np.where(is_sink, dot(other, their_k), scores)
                size = np.where(is_sink, dot(np.abs(other), np.abs(their_k)), size)
            scores = np.where(visible, scores * scale, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            delta = np.where(visible, off + 2 * EPS * size, 0).max(-1, keepdims=True) * scale + 8 * EPS

            def weigh(p: Floats, x: Floats) -> Floats:
                product: Floats = np.matmul(p, x.transpose(1, 0, 2))
                return product.transpose(1, 0, 2).reshape(len(p[0]), -1)

            value[queries] = weigh(weights, their_v)
            error[queries] = weigh(2 * delta * weights, np.abs(their_v)) + weigh(weights, v_error)
        buffer = self.recorder.attention(
            0,
            q.buffer,
            None,
            head_dim=self.head_dim,
            scale=scale,
            window=window,
            q_sinks=None if q_sinks is None else q_sinks.buffer,
            num_sinks=num_sinks,
        )
        self._window, self._num_sinks = window, num_sinks
        return Traced(buffer, value, error)

    def gather(self, x: Traced) -> Traced:
        """Logit rows of the last step; those of earlier steps stay in front, where `build` cuts them off."""
        rows = self.last.start + self.batches[-1].logit_rows
        pick = np.concatenate((np.arange(self.last.start), rows))
        return Traced(self.recorder.gather_logit_rows(x.buffer, None), x.value[pick], x.error[pick])

    def build(self, output: Traced, *, fused: bool = False, impl: Impl = "flash") -> BuiltCase:
        """The case whose output is `output`."""
        program = self.recorder.program(output.buffer)
        kv_columns = self.kv[0].value.shape[1] if self.kv is not None else 32
        head_dim = self.head_dim if self.kv is not None else 32
        layout = CacheLayout(
            num_layers=1,
            num_kv_heads=kv_columns // head_dim,
            head_dim=head_dim,
            dtype=self.page_dtype,
            block_size=self.texts.block_size,
            num_blocks=self.num_blocks,
        )
        shape = StepShape(
            tuple((new + self.texts.num_padding, start + new) for start, new in self.texts.sequences),
            len(self.batches[-1].logit_rows),
        )
        expected, tolerance = output.value[self.last.start :], UNDERFLOW + output.error[self.last.start :]
        num_bytes = self.weight_bytes + 4 * self.input_columns * shape.num_tokens + 4 * expected.size
        if self.kv is not None:
            token = layout.num_bytes // layout.num_slots
            num_bytes += token * sum(start for start, _ in self.texts.sequences)
        return BuiltCase(
            fuse(program) if fused else program,
            layout,
            self.batches,
            expected,
            tolerance,
            program.flops(shape),
            num_bytes,
            impl,
            self.rounding_error,
        )


def rows_of(count: int) -> Texts:
    """For ops that look at a row alone: positions 0, 1, 2, ..."""
    return Texts(((0, count),))
