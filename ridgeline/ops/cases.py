"""Kernel cases: the list that is the test of the native kernels and says what they support.

A case is a small Program with its inputs and what must come out. `Sketch` records the Program and computes
the same ops in float64, straight from their definitions, and carries for every number how far float32 may
be off. Where a kernel rounds on purpose (activations of a quantized matrix to 8 or 16 bits, K and V to the
type of the pages) the reference rounds the same way, so tolerances are a few ulps and one wrong code fails.

Letters: T tokens, N x K a weight, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ridgeline.config import Activation, KVCacheDType
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.fuse import fuse
from ridgeline.ops.native import PAGE_DTYPES, NativeProgram, encode_instructions
from ridgeline.ops.packing import WEIGHT_FORMATS
from ridgeline.ops.program import Buffer, Program, StepShape
from ridgeline.ops.recorder import Recorder
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.gguf_blocks import random_blocks
from ridgeline.quant.weight import Weight

Floats = npt.NDArray[np.float64]
Impl = Literal["flash", "naive"]
EPS = float(np.finfo(np.float32).eps)
FLOAT_MAX = float(np.finfo(np.float32).max)
UNDERFLOW = 1e-34
"""What may be lost to subnormals."""
POISON = 0xFF
"""Every byte of the pages before the first step: NaN as float32, as float16, and as the scale of int8."""
FILE_MAGIC = b"RLCASE01"


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
class CaseResult:
    """`error` and `tolerance` of the element that is closest to failing, or fails most."""

    name: str
    group: str
    isa: str
    error: float
    tolerance: float
    rounding_error: float | None
    passed: bool


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

    def weight(self, name: str, *shape: int, format: str = "F32", std: float = 1.0) -> Weight:
        """Random blocks; counted in the bytes that the step reads."""
        made = make_weight(name, *shape, format=format, std=std, rng=self.rng)
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

    def embed(self, table: Weight, factor: float) -> Traced:
        """Token ids count up, so row t of the table comes out at token t."""
        buffer = self.recorder.embed(self.recorder.bind(table), None)
        value = table.dequantize().astype(np.float64)[: self.num_rows]
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
        rounded, x_error = x.value, x.error
        is_quantized = weight.format.name.startswith("Q")
        if is_quantized:
            levels = 32767 if weight.format.name == "Q8_0" else 127
            rounded, step, is_near_tie = quantized_activations(x.value, x.error, levels)
            x_error = np.where(is_near_tie, step, 0) + np.where(x.error > 0, 8 * EPS * np.abs(rounded), 0)
            exact = x.value @ w.T
            error = float(np.abs(rounded @ w.T - exact)[self.last].max())
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
        self.kv = through_pages(k, dtype, head_dim), through_pages(v, dtype, head_dim)
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


def make_weight(name: str, *shape: int, format: str, rng: np.random.Generator, std: float = 1.0) -> Weight:
    """Random values of about `std` in any format."""
    fmt = FORMATS[format]
    count = int(np.prod(shape)) // fmt.block_size
    data: npt.NDArray[np.generic] = random_blocks(fmt, count, rng, std=std)
    if fmt.block_size == 1:
        data = data.reshape(-1).view({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[format])
    return Weight(name, fmt, shape, {"data": data.reshape(shape[0], -1) if len(shape) == 2 else data})


def quantized_activations(
    x: Floats, error: Floats, levels: int
) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """x rounded as csrc/matmul.h does, per 32 columns; the step; and which codes `error` may move by one."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 32)
    most = np.abs(blocks).max(-1, keepdims=True)
    d = most / np.float32(levels)
    # A tiny block has no finite inverse: nothing is left of it.
    inverse = np.divide(np.float32(levels), most, out=np.zeros_like(most), where=most > levels / FLOAT_MAX)
    codes = blocks * inverse
    step = (d.astype(np.float64) + 0 * blocks).reshape(x.shape)
    rounded = (np.rint(codes).astype(np.float64) * d).reshape(x.shape)
    with np.errstate(invalid="ignore"):
        slack = np.where(step > 0, error / step, 0).reshape(blocks.shape)
    # An error of the largest value moves every code of its block.
    slack = np.where(slack > 0, slack + slack.max(-1, keepdims=True) + levels * EPS, 0)
    is_near_tie = np.abs(np.abs(codes - np.trunc(codes)) - 0.5) < slack
    return rounded, step, is_near_tie.reshape(x.shape)


def through_pages(x: Traced, dtype: KVCacheDType, head_dim: int) -> Traced:
    """K or V as the pages hold them."""
    if dtype == "float32":
        return x
    exact = x.value.astype(np.float32)
    if dtype == "float16":
        value = exact.astype(np.float16).astype(np.float64)
        step = np.abs(value) * 2.0**-10
    else:
        heads = exact.reshape(len(exact), -1, head_dim)
        most = np.abs(heads).max(-1, keepdims=True)
        inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
        scales = (most / np.float32(127)).astype(np.float64)
        value = (np.rint(heads * inverse) * scales).reshape(exact.shape)
        step = (scales + 0 * heads).reshape(exact.shape)
    is_uncertain = x.error > 0
    rounding = EPS * np.abs(value) if dtype == "int8" else 0
    return Traced(x.buffer, value, np.where(is_uncertain, x.error + step, 0) + rounding)


def run_case(case: KernelCase, isa: str | None = None, *, num_threads: int = 2) -> CaseResult:
    """Run every step on the library for `isa` (None: the best) and compare the output of the last one."""
    built = case.make()
    native = NativeProgram(
        built.program,
        built.layout,
        max_tokens=max(len(b.token_ids) for b in built.batches),
        max_logits=1,
        num_threads=num_threads,
        attention=built.attention,
        isa=isa,
    )
    native.pages.fill(POISON)
    for batch in built.batches:
        native.step(batch)
    output = native.read_buffer(built.program.output, len(built.expected)).astype(np.float64)
    native.close()
    error = np.abs(output - built.expected)
    error = np.where(np.isfinite(error), error, np.inf)
    worst = int(np.argmax(error - built.tolerance))
    return CaseResult(
        case.name,
        case.group,
        native.isa,
        float(error.flat[worst]),
        float(built.tolerance.flat[worst]),
        built.rounding_error,
        bool((error <= built.tolerance).all()),
    )


def dump_case(case: KernelCase, folder: Path) -> Path:
    """Write the case as one little-endian file, which csrc/run_cases.cpp reads and runs without Python."""
    built = case.make()
    program, layout = built.program, built.layout
    out = bytearray(FILE_MAGIC)

    def ints(*values: int) -> None:
        out.extend(struct.pack(f"<{len(values)}i", *values))

    def blob(data: bytes) -> None:
        out.extend(struct.pack("<q", len(data)) + data)

    blob(case.name.encode())
    ints(len(program.instructions))
    out.extend(bytes(encode_instructions(program, built.attention)))
    ints(len(program.buffers))
    for buffer in program.buffers:
        ints(int(buffer.rows == "L"), buffer.columns)
    ints(len(program.weights))
    for weight in program.weights:
        rows, columns = (*weight.shape, 1)[:2]
        assert weight.format.ggml_type is not None
        ints(len(weight.shape), weight.format.ggml_type, rows, columns)
        blob(np.ascontiguousarray(weight.data).tobytes())
    ints(len(program.constants))
    for constant in program.constants:
        blob(constant.astype(np.float32).tobytes())
    ints(PAGE_DTYPES[layout.dtype], layout.num_layers, layout.num_blocks, layout.block_size)
    ints(layout.num_kv_heads, layout.head_dim)
    out.extend(struct.pack("<q", layout.num_bytes))
    ints(len(built.batches))
    for b in built.batches:
        ints(len(b.token_ids), len(b.seq_lens), b.block_tables.shape[1], len(b.logit_rows))
        for array in (
            *(b.token_ids, b.positions, b.slot_mapping, b.query_start_loc),
            *(b.seq_lens, b.block_tables, b.logit_rows),
        ):
            blob(np.ascontiguousarray(array, np.int32).tobytes())
    ints(program.output)
    expected = built.expected.astype(np.float32)
    blob(expected.tobytes())
    slack = np.abs(built.expected) * EPS  # of writing it as float32
    blob((built.tolerance + slack).astype(np.float32).tobytes())
    path = folder / (case.name.replace(" ", "_").replace("/", "-") + ".case")
    path.write_bytes(out)
    return path


def _rows(count: int) -> Texts:
    """For ops that look at a row alone: positions 0, 1, 2, ..."""
    return Texts(((0, count),))


def _linear(
    format: str, count: int, n: int, k: int, *, bias: bool = False, seed: int = 1, rows: str = "normal"
) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(_rows(count), seed)
        x = s.input("x", k, _activations(s.rng, count, k, rows))
        w = s.weight("w", n, k, format=format)
        return s.build(s.linear(x, w, s.weight("bias", n) if bias else None))

    return make


def _activations(rng: np.random.Generator, count: int, k: int, kind: str) -> npt.NDArray[np.float32]:
    x = rng.standard_normal((count, k), np.float32)
    if kind == "zero":
        x[::2] = 0
        x[1::2, :32] = 0
    elif kind == "outlier":
        x[:, ::37] *= 1000
    elif kind == "tiny":
        x[::2] *= np.float32(1e-39)
    return x


def _merged(formats: Sequence[str], count: int, output: int, *, bias: bool) -> Callable[[], BuiltCase]:
    """q, k and v of one input in one instruction; the case looks at one of the outputs."""

    def make() -> BuiltCase:
        s = Sketch(_rows(count), 2)
        x = s.input("x", 256)
        outputs = []
        for name, n, format in zip("qkv", (53, 16, 19), formats, strict=False):
            w = s.weight(name, n, 256, format=format)
            outputs.append(s.linear(x, w, s.weight(f"{name}.bias", n) if bias else None))
        return s.build(outputs[output], fused=True)

    return make


def _mlp(
    formats: tuple[str, str], activation: Activation, count: int, *, norm: bool, k: int = 256
) -> Callable[[], BuiltCase]:
    """rms_norm, gate and up, glu: fused into one linear."""

    def make() -> BuiltCase:
        s = Sketch(_rows(count), 3)
        x = s.input("x", k)
        if norm:
            x = s.rms_norm(x, s.weight("norm", k), eps=1e-5, offset=1.0)
        gate, up = (
            s.linear(x, s.weight(name, 37, k, format=format, std=0.1))
            for name, format in zip(("gate", "up"), formats, strict=True)
        )
        return s.build(s.glu(gate, up, activation), fused=True)

    return make


def _normed(
    format: str, count: int, k: int, *, residual: bool, bias: bool = False
) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(_rows(count), 4)
        x = s.input("x", k)
        old = s.input("residual", 37) if residual else None
        y = s.rms_norm(x, s.weight("norm", k), eps=1e-5, offset=0.0)
        y = s.linear(y, s.weight("w", 37, k, format=format), s.weight("bias", 37) if bias else None)
        return s.build(y if old is None else s.add(old, y), fused=True)

    return make


def _norm(
    columns: int, size: int, count: int, *, offset: float, residual: bool = False
) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(_rows(count), 5)
        x = s.input("x", columns)
        old = s.input("residual", columns) if residual else None
        y = s.rms_norm(x, s.weight("norm", size), eps=1e-6, offset=offset)
        return s.build(y if old is None else s.add(old, y), fused=residual)

    return make


def _rope(
    head_dim: int, rotated: int, *, max_position: int | None = None, factor: float = 1.0
) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(Texts(((600, 3), (0, 5), (31, 2))), 6)
        inv_freq = 10000.0 ** -(np.arange(rotated // 2) / (rotated // 2))
        cos_sin = s.cos_sin(inv_freq, factor=factor, max_position=max_position)
        return s.build(s.rope(s.input("x", 3 * head_dim), cos_sin, head_dim))

    return make


def _glu(activation: Activation, columns: int, spread: float) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(_rows(9), 7)
        gate = s.scale(s.input("gate", columns), spread)
        return s.build(s.glu(gate, s.input("up", columns), activation))

    return make


def _embed(format: str, count: int, *, factor: float = 1.0) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(_rows(count), 8)
        table = s.weight("table", count + 2, 256, format=format)
        return s.build(s.gather(s.embed(table, factor)), fused=True)

    return make


def _gather() -> BuiltCase:
    """Only the last row of each text, with padding between."""
    s = Sketch(Texts(((0, 5), (0, 1), (0, 3)), num_padding=2), 9)
    x = s.input("x", 19)
    batch = s.batches[-1]
    ends = batch.query_start_loc[1:] - 3
    s.batches = (
        ForwardBatch(
            *(batch.token_ids, batch.positions, batch.slot_mapping, batch.query_start_loc, batch.seq_lens),
            *(batch.block_tables, ends.astype(np.int32), batch.max_query_len, batch.max_seq_len),
        ),
    )
    return s.build(s.gather(x))


def _add() -> BuiltCase:
    s = Sketch(_rows(33), 10)
    return s.build(s.add(s.input("x", 37), s.input("y", 37)))


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int


def _attention(
    texts: Texts,
    shape: Shape,
    *,
    dtype: KVCacheDType = "float32",
    impl: Impl = "flash",
    window: int | None = None,
    num_sinks: int = 0,
    rope: bool = False,
    qk_norm: bool = False,
    scale: float | None = None,
) -> Callable[[], BuiltCase]:
    """Attention alone, or with QK-norm, rope and store_kv fused into it."""

    def make() -> BuiltCase:
        s = Sketch(texts, 11)
        heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
        q, k, v = (s.input(n, c * head_dim) for n, c in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
        sinks = None
        if qk_norm:
            q = s.rms_norm(q, s.weight("q_norm", head_dim), eps=1e-6, offset=1.0)
            k = s.rms_norm(k, s.weight("k_norm", head_dim), eps=1e-6, offset=1.0)
        if rope:
            inv_freq = 10000.0 ** -(np.arange(head_dim // 2) / (head_dim // 2))
            cos_sin = s.cos_sin(inv_freq)
            if num_sinks:
                sinks = s.rope(q, s.cos_sin(inv_freq, max_position=window), head_dim)
            q, k = s.rope(q, cos_sin, head_dim), s.rope(k, cos_sin, head_dim)
        elif num_sinks:
            sinks = s.input("q_sinks", heads * head_dim)
        s.store_kv(k, v, dtype, head_dim)
        y = s.attention(
            q,
            scale=head_dim**-0.5 if scale is None else scale,
            window=window,
            num_sinks=num_sinks,
            q_sinks=sinks,
        )
        return s.build(y, fused=rope, impl=impl)

    return make


def _linear_cases() -> Iterator[KernelCase]:
    def case(name: str, make: Callable[[], BuiltCase]) -> KernelCase:
        return KernelCase(f"linear {name}", "linear", make)

    for format in WEIGHT_FORMATS:
        for count in (1, 2, 3, 5, 7, 8, 9, 31, 33):
            yield case(f"{format} {count}x37x256", _linear(format, count, 37, 256))
        ks = (256, 768) if format.endswith("_K") else (32, 96, 256, 576, 768)
        for k in ks:
            yield case(f"{format} 3x21x{k}", _linear(format, 3, 21, k))
        for kind in ("zero", "outlier", "tiny"):
            yield case(f"{format} 6x16x256 {kind}", _linear(format, 6, 16, 256, rows=kind))
        yield case(f"{format} bias", _linear(format, 9, 37, 256, bias=True))
    for format in ("F32", "F16", "Q4_0", "Q8_0", "Q4_K", "Q6_K"):
        yield case(f"{format} 255x37x256", _linear(format, 255, 37, 256))
    for k, n in ((1, 1), (7, 5), (33, 19), (255, 17)):
        yield case(f"F32 5x{n}x{k}", _linear("F32", 5, n, k))
    for formats in (
        ("F32",) * 3,
        ("Q4_0",) * 3,
        ("Q4_K", "Q4_K", "Q6_K"),
        ("Q8_0", "F16", "Q4_0"),
        ("Q5_1",) * 2,
    ):
        for bias in (False, True):
            for output in range(len(formats)):
                name = f"merged {'+'.join(formats)} output {output}{' bias' if bias else ''}"
                yield case(name, _merged(formats, 5, output, bias=bias))
    for activation in ("silu", "gelu_tanh"):
        for formats in (("F32", "F32"), ("Q4_0", "Q4_0"), ("Q4_K", "Q6_K"), ("Q8_0", "F16")):
            for count in (1, 9, 33, 130):
                name = f"gated {activation} {'+'.join(formats)} {count}"
                yield case(name, _mlp(formats, activation, count, norm=count != 9))
    for format in ("F32", "BF16", "Q4_0", "Q6_K"):
        for count in (1, 5, 33):
            yield case(f"norm {format} {count}", _normed(format, count, 256, residual=False))
            yield case(
                f"norm, residual {format} {count}",
                _normed(format, count, 768, residual=True, bias=count == 5),
            )


def _small_cases() -> Iterator[KernelCase]:
    for columns, size in ((24, 24), (37, 37), (576, 576), (24, 8), (192, 64), (768, 256)):
        for offset in (0.0, 1.0):
            name = f"rms_norm {columns} by {size} offset {offset:g}"
            yield KernelCase(name, "rms_norm", _norm(columns, size, 9, offset=offset))
    yield KernelCase("rms_norm residual", "rms_norm", _norm(576, 576, 5, offset=1.0, residual=True))
    for head_dim, rotated in ((64, 64), (12, 8), (80, 32), (16, 16), (6, 6), (256, 256)):
        yield KernelCase(f"rope {rotated} of {head_dim}", "rope", _rope(head_dim, rotated))
    yield KernelCase("rope clamped", "rope", _rope(64, 64, max_position=40))
    yield KernelCase("rope factor", "rope", _rope(64, 64, factor=1.3))
    for activation in ("silu", "gelu_tanh"):
        for columns, spread in ((29, 1.0), (64, 4.0), (37, 30.0)):
            name = f"glu {activation} {columns} spread {spread:g}"
            yield KernelCase(name, "glu", _glu(activation, columns, spread))
    for format in WEIGHT_FORMATS:
        yield KernelCase(f"embed {format}", "embed", _embed(format, 35))
    yield KernelCase("embed Q8_0 scaled", "embed", _embed("Q8_0", 5, factor=16.0))
    yield KernelCase("gather", "rows", _gather)
    yield KernelCase("add", "rows", _add)


LENGTHS = (1, 2, 31, 32, 33, 255, 256, 257, 600)
RAGGED = Texts(((0, 33), (255, 1), (100, 5), (0, 1), (31, 1), (32, 1), (33, 2)))


def _attention_cases() -> Iterator[KernelCase]:
    impls: tuple[Impl, ...] = ("flash", "naive")
    dtypes: tuple[KVCacheDType, ...] = ("float32", "float16", "int8")

    def case(name: str, impl: Impl, texts: Texts, shape: Shape, **options: Any) -> KernelCase:
        make = _attention(texts, shape, impl=impl, **options)
        return KernelCase(f"attention {impl} {name}", "attention", make)

    for impl in impls:
        for head_dim in (16, 64, 80, 96, 128, 256):
            for dtype in dtypes:
                yield case(f"head_dim {head_dim} {dtype}", impl, RAGGED, Shape(6, 2, head_dim), dtype=dtype)
        for group in range(1, 10):
            yield case(f"GQA {group}", impl, RAGGED, Shape(2 * group, 2, 16), dtype=dtypes[group % 3])
        shape = Shape(9, 3, 16)
        for dtype in dtypes:
            for length in LENGTHS:
                yield case(f"prefill {length} {dtype}", impl, Texts(((0, length),)), shape, dtype=dtype)
                if length > 1:
                    texts = Texts(((length - 1, 1),))
                    yield case(f"decode {length} {dtype}", impl, texts, shape, dtype=dtype)
            for window, sinks in ((7, 0), (20, 4), (33, 33), (40, 0), (300, 0), (300, 5), (1, 0), (1, 1)):
                for size in (32, 64):
                    texts = Texts(((600, 2), (0, 90), (130, 3), (5, 1)), size, 0, window, sinks)
                    name = f"window {window} sinks {sinks} blocks of {size} {dtype}"
                    yield case(name, impl, texts, shape, dtype=dtype, window=window, num_sinks=sinks)
            texts = Texts(((0, 5), (10, 1)), num_padding=3)
            yield case(f"padding {dtype}", impl, texts, shape, dtype=dtype)
            yield case(f"rope {dtype}", impl, RAGGED, shape, dtype=dtype, rope=True)
        texts = Texts(((0, 90), (130, 3), (5, 1)))
        for limit, sinks in ((None, 0), (20, 0), (20, 4)):
            name = f"qk_norm, rope, window {limit} sinks {sinks}"
            yield case(name, impl, texts, shape, window=limit, num_sinks=sinks, rope=True, qk_norm=True)
        yield case("large scores", impl, RAGGED, shape, scale=8.0)


def all_cases(text: str = "") -> tuple[KernelCase, ...]:
    """Every case whose name contains `text`; making and running one is up to the caller."""
    cases = (*_small_cases(), *_linear_cases(), *_attention_cases())
    assert len({c.name for c in cases}) == len(cases)
    return tuple(c for c in cases if text in c.name)
