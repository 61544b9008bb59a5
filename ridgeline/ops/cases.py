"""Kernel cases: the list that is the test of the native kernels and says what they support.

A case is a small Program with its inputs and what must come out, made by a `Sketch`. Letters: T tokens,
N x K a weight, H query heads, G KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ridgeline.config import Activation, KVCacheDType
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.linear_cases import linear_cases
from ridgeline.ops.packing import GROUP_KERNELS, WEIGHT_FORMATS
from ridgeline.ops.sketch import BuiltCase, Impl, KernelCase, Sketch, Texts, rows_of


def _norm(
    columns: int, size: int, count: int, *, offset: float, residual: bool = False
) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(rows_of(count), 5)
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
        s = Sketch(rows_of(9), 7)
        gate = s.scale(s.input("gate", columns), spread)
        return s.build(s.glu(gate, s.input("up", columns), activation))

    return make


def _embed(
    format: str, count: int, *, factor: float = 1.0, is_ordered: bool = False
) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(rows_of(count), 8)
        table = s.weight("table", count + 2, 256, format=format, is_ordered=is_ordered)
        return s.build(s.gather(s.embed(table, factor)), fused=True)

    return make


def _embed_part(format: str, num_rows: int, first_row: int) -> Callable[[], BuiltCase]:
    """A table with rows for some of the tokens only, as a rank has it."""

    def make() -> BuiltCase:
        s = Sketch(rows_of(35), 8)
        table = s.weight("table", num_rows, 256, format=format)
        return s.build(s.gather(s.embed(table, 4.0, first_row=first_row)), fused=True)

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
    s = Sketch(rows_of(33), 10)
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
    for format in (*WEIGHT_FORMATS, *GROUP_KERNELS, "INT4_G256_SYM", "INT8_G256_SYM"):
        yield KernelCase(f"embed {format}", "embed", _embed(format, 35))
    yield KernelCase("embed INT4_G64 ordered", "embed", _embed("INT4_G64", 35, is_ordered=True))
    yield KernelCase("embed Q8_0 scaled", "embed", _embed("Q8_0", 5, factor=16.0))
    for num_rows, first_row in ((19, 7), (19, 16), (19, 40)):
        name = f"embed Q8_0 {num_rows} rows from {first_row} on"
        yield KernelCase(name, "embed", _embed_part("Q8_0", num_rows, first_row))
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
    cases = (*_small_cases(), *linear_cases(), *_attention_cases())
    assert len({c.name for c in cases}) == len(cases)
    return tuple(c for c in cases if text in c.name)
