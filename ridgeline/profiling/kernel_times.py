"""Seconds of single native instructions, on shapes that belong to no model.

A program holds the instruction some number of times, each with bytes of its own, so that it can be timed from
a cache or among as many bytes as a model has. What is timed is the instruction alone, inside the interpreter:
`ridgeline kernels perf` shows it, `rates` makes predictions of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ridgeline.config import KVCacheDType
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.emulate import make_weight
from ridgeline.ops.fuse import fuse
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.program import Opcode, Program
from ridgeline.ops.recorder import Recorder
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

SECONDS = 0.15
"""Spent on each measurement, at least `MIN_REPEATS` steps."""
MIN_REPEATS = 3
BLOCK_SIZE = 32
CACHED_SHAPE = (64, 256)
"""Rows and columns of the float32 matrix whose rate is the machine's: it and the activations fit in L2."""
CACHED_TOKENS = 128

Implementation = Literal["naive", "flash"]


@dataclass(frozen=True, slots=True)
class LinearPerf:
    """One format and number of tokens: the median of repeats."""

    format: str
    tokens: int
    milliseconds: float
    gmacs: float
    """1e9 multiply-adds a second"""
    weight_gb_per_s: float
    """packed bytes of the matrix over the time"""
    share_of_fma: float
    """gmacs over those of the float32 kernel on a matrix in the cache"""


@dataclass(frozen=True, slots=True)
class AttentionPerf:
    """Prefill of `length` tokens by one attention instruction."""

    impl: Implementation
    length: int
    milliseconds: float
    gmacs: float
    scratch_bytes: int
    """what the kernel holds besides q, K, V and the output"""
    moved_bytes: int
    """q, output, K and V once; naive also has the scores written twice and read twice, softmax between"""


def float_rows(name: str, columns: int, *, seed: int = 1) -> Weight:
    """A float32 matrix of one row: as an embedding table, the input of every token."""
    values = np.random.default_rng(seed).standard_normal((1, columns), np.float32)
    return Weight(name, FORMATS["F32"], values.shape, {"data": values})


def linear_program(format: str, *, rows: int, columns: int, count: int = 1) -> Program:
    """`count` matrices, each with its own bytes once packed; as in a model, all threads have just written the
    input of each."""
    recorder = Recorder()
    x = recorder.embed(recorder.bind(float_rows("x", columns)), None)
    w = make_weight("w", rows, columns, format=format, rng=np.random.default_rng(1), std=0.02)
    for i in range(count):
        y = recorder.linear(recorder.add(x, x), recorder.bind(replace(w, name=f"w{i}")))
    return recorder.program(y)


def attention_program(
    *, num_layers: int = 1, num_kv_heads: int = 1, q_per_kv: int, head_dim: int, rotate: bool
) -> Program:
    """Attention over each layer's pages; with `rotate` fused with RoPE and the write of K and V."""
    recorder = Recorder()
    q_table, kv_table = (
        recorder.bind(float_rows(f"x{heads}", heads * head_dim, seed=2))
        for heads in (q_per_kv * num_kv_heads, num_kv_heads)
    )
    if rotate:
        frequencies = recorder.bind_constant(10_000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2)))
        cos_sin = recorder.rope_cos_sin(frequencies, None, attention_factor=1.0)
    for layer in range(num_layers):
        q, k, v = (recorder.embed(table, None) for table in (q_table, kv_table, kv_table))
        if rotate:
            k = recorder.rope(k, cos_sin, head_dim=head_dim)
        recorder.store_kv(layer, k, v, None)
        if rotate:
            q = recorder.rope(q, cos_sin, head_dim=head_dim)
        y = recorder.attention(layer, q, None, head_dim=head_dim, scale=head_dim**-0.5)
    program = recorder.program(y)
    return fuse(program) if rotate else program


def layout_of(
    num_blocks: int,
    *,
    num_layers: int = 1,
    num_kv_heads: int = 1,
    head_dim: int = 16,
    dtype: KVCacheDType = "float32",
) -> CacheLayout:
    """Pages of `num_blocks` blocks; what is not given is as small as it can be."""
    return CacheLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
    )


def blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


def prompt_batch(num_tokens: int) -> ForwardBatch:
    """One prompt from its first token, with one row of logits."""
    row = Row((0,) * num_tokens, 0, tuple(range(blocks_of(num_tokens))), 1)
    return ForwardBatch.from_rows([row], block_size=BLOCK_SIZE)


def fill_pages(native: NativeProgram, dtype: KVCacheDType) -> None:
    """Keys and values as a model's are spread: equal ones would spare the softmax its corrections."""
    rng = np.random.default_rng(3)
    kinds = {"float32": np.float32, "float16": np.float16}
    if dtype in kinds:
        values = rng.standard_normal(2**18, np.float32).astype(kinds[dtype]).view(np.uint8)
    else:
        values = rng.integers(0, 255, 2**18, np.uint8)
    native.pages[:] = np.resize(values, len(native.pages))


def op_seconds(
    native: NativeProgram,
    batch: ForwardBatch,
    opcode: Opcode,
    *,
    seconds: float = SECONDS,
    before_step: Callable[[], object] | None = None,
) -> float:
    """Median over steps of the mean time of the instructions with this opcode, all memory touched before.

    `before_step` is not timed: what it reads pushes the instruction's memory out of the caches. Threads fall
    asleep meanwhile, and the first instruction, which wakes them, is left out: in a model they are awake.
    """
    at = [n for n, i in enumerate(native.program.instructions) if i.opcode is opcode]
    if before_step is not None and len(at) > 1:
        at = at[1:]
    times: list[float] = []
    for _ in range(2):
        native.step(batch)
        native.take_times()
    end = time.perf_counter() + seconds
    while len(times) < MIN_REPEATS or time.perf_counter() < end:
        if before_step is not None:
            before_step()
        native.step(batch)
        times.append(float(native.take_times()[at].mean()))
    return statistics.median(times)


def measure_fma(*, isa: str | None = None, num_threads: int = 1, seconds: float = SECONDS) -> float:
    """GMAC/s of float32 on a matrix that stays in the cache: the machine's own rate."""
    rows, columns = CACHED_SHAPE
    shape = {"rows": rows, "columns": columns, "num_threads": num_threads}
    return measure_linear("F32", CACHED_TOKENS, 1.0, isa=isa, seconds=seconds, **shape).gmacs


def measure_linear(
    format: str,
    tokens: int,
    fma_gmacs: float,
    *,
    isa: str | None = None,
    rows: int = 2048,
    columns: int = 2048,
    num_threads: int = 1,
    seconds: float = SECONDS,
) -> LinearPerf:
    """One matrix and this many tokens, beside what `measure_fma` found."""
    native = NativeProgram(
        linear_program(format, rows=rows, columns=columns),
        layout_of(blocks_of(tokens)),
        max_tokens=tokens,
        max_logits=1,
        num_threads=num_threads,
        isa=isa,
    )
    taken = op_seconds(native, prompt_batch(tokens), Opcode.LINEAR, seconds=seconds)
    table_bytes = 4 * 16 * columns  # rows are packed by 16
    num_bytes = native.packed_bytes - table_bytes
    native.close()
    gmacs = tokens * rows * columns / taken / 1e9
    return LinearPerf(format, tokens, 1e3 * taken, gmacs, num_bytes / taken / 1e9, gmacs / fma_gmacs)


def measure_attention(
    impl: Implementation,
    length: int,
    *,
    isa: str | None = None,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    num_threads: int = 1,
    seconds: float = SECONDS,
) -> AttentionPerf:
    """Prefill of `length` tokens; multiply-adds count the pairs that causal attention must score."""
    native = NativeProgram(
        attention_program(num_kv_heads=kv_heads, q_per_kv=heads // kv_heads, head_dim=head_dim, rotate=False),
        layout_of(blocks_of(length), num_kv_heads=kv_heads, head_dim=head_dim),
        max_tokens=length,
        max_logits=1,
        num_threads=num_threads,
        attention=impl,
        isa=isa,
    )
    taken = op_seconds(native, prompt_batch(length), Opcode.ATTENTION, seconds=seconds)
    scratch = native.scratch_bytes
    native.close()
    moved = 4 * length * head_dim * (2 * heads + 2 * kv_heads)
    if impl == "naive":
        moved += 4 * 4 * heads * length * length
    macs = 2 * heads * head_dim * length * (length + 1) // 2
    return AttentionPerf(impl, length, 1e3 * taken, macs / taken / 1e9, scratch, moved)
