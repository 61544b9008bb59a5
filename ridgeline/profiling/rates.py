"""How fast the native kernels really are, measured on shapes that belong to no model.

A limit says what the machine could do; a prediction needs what the kernels reach of it. Each kind of kernel
is timed on a small grid of generic shapes and summed up in a few numbers: seconds of one call whatever its
size, and seconds for each weight, pair or element. A model's time is then put together from its Program
(`roofline`). None of these numbers comes from the model whose time is predicted, except that matrices are
timed among as many bytes as a step reads, since bandwidth depends on what the caches hold.

Rates are kept beside the machine's limits and measured when they are first needed, a few seconds each.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ridgeline.config import TILE_TOKENS, KVCacheDType
from ridgeline.engine.executors.native import NativeExecutor
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.packing import ROUNDED
from ridgeline.ops.program import Opcode, Program
from ridgeline.ops.recorder import Recorder
from ridgeline.profiling.kernel_times import (
    BLOCK_SIZE,
    attention_program,
    blocks_of,
    fill_pages,
    float_rows,
    layout_of,
    linear_program,
    op_seconds,
    prompt_batch,
)
from ridgeline.profiling.machine import MachineLimits, limits_path
from ridgeline.profiling.probe import probe_engine
from ridgeline.quant.formats import FORMATS, format_named
from ridgeline.quant.weight import Weight
from ridgeline.sampling_params import SamplingParams

SCHEMA = "ridgeline.rates/9"
ROWS, COLUMNS = (256, 2048), (768, 2304)
"""Matrices of both numbers of rows and of columns. No power of two as columns: a tile's rows of activations
would share sets of the L1 cache."""
MAX_MATRICES = 4096
ELEMENT_COLUMNS = 1280
FEW_TOKENS, MANY_TOKENS = (1, 2, 4, 8, 16, 32), (64, 128, 256, 512)
"""With few tokens, reading a whole step's matrices takes most of the time. With many, arithmetic does: a few
matrices of FEW_BYTES tell as much, after OTHER_BYTES have pushed them out of the caches."""
FEW_BYTES, OTHER_BYTES = 2**25, 2**27
SMALLEST_SET, LARGEST_SET = 2**24, 2**29
ATTENTION_GRID = ((1, 1), (1, 4), (1, 16), (16, 1), (64, 1), (256, 1), (512, 1))
"""(new tokens, sequences)"""
SHARING_SEQS = 16
ATTENTION_CONTEXTS = (64, 1024)
"""Tokens in the cache before the new ones."""
PROBE_KV_HEADS = 4
"""A head's tiles are apart from each other in the pages, as in nearly every model."""
CACHE_BYTES = 2**28
"""K and V of the attention probe, in which the blocks of its sequences lie about."""
ENGINE_TOKENS, ENGINE_SEQS = (1, 16, 128), 16
PROBE_VOCAB = 32768


@dataclass(frozen=True, slots=True)
class LinearRate:
    """Of one kernel (`packing.kernel_name`) at some number of tokens: what R rows and C columns take is
    call_s + C column_s + R row_s + R C weight_s."""

    call_s: float
    """Starting the threads, and waiting for the last of them."""
    column_s: float
    """One column of the input for all tokens: quantizing it."""
    row_s: float
    """One row: its outputs of all tokens, and the beginning of its loop."""
    weight_s: float
    """One weight for all tokens together."""

    @classmethod
    def of_corners(cls, seconds: Mapping[tuple[int, int], float]) -> LinearRate:
        """From the times of two numbers of rows by two of columns."""
        (r0, r1), (c0, c1) = ROWS, COLUMNS
        slopes = [(seconds[r1, c] - seconds[r0, c]) / (r1 - r0) for c in COLUMNS]
        weight_s = (slopes[1] - slopes[0]) / (c1 - c0)
        row_s = slopes[0] - weight_s * c0
        column_s = (seconds[r0, c1] - seconds[r0, c0]) / (c1 - c0) - weight_s * r0
        call_s = seconds[r0, c0] - column_s * c0 - row_s * r0 - weight_s * r0 * c0
        return cls(call_s, column_s, row_s, weight_s)

    @staticmethod
    def seconds(rates: Sequence[tuple[LinearRate, int]], columns: int) -> float:
        """Of one instruction: matrices by their rates and rows, which share an input of `columns`."""
        shared = max(rate.call_s + columns * rate.column_s for rate, _ in rates)
        return max(shared + sum(rows * (r.row_s + columns * r.weight_s) for r, rows in rates), 0.0)


@dataclass(frozen=True, slots=True)
class AttentionRate:
    """Of one attention instruction with its rotation and KV write."""

    call_s: float
    pair_s: float
    """One query token and one key token of one KV head's group of query heads: see `scored_pairs`."""


@dataclass(frozen=True, slots=True)
class EngineRate:
    """What a step costs outside of the kernels: scheduler, batch, sampling, results, waking the threads."""

    steps_s: tuple[float, ...]
    """One step, where kernels had worked on ENGINE_TOKENS: the longer, the less the caches still hold."""
    sequence_s: float
    logit_s: float
    """One logit of a row that is sampled greedily."""

    def seconds(self, num_tokens: int, num_sequences: int, num_logits: int) -> float:
        """Of one step: between measured numbers of tokens, by their logarithms."""
        at = [math.log2(t) for t in ENGINE_TOKENS]
        step_s = float(np.interp(math.log2(max(num_tokens, 1)), at, self.steps_s))
        return step_s + self.sequence_s * num_sequences + self.logit_s * num_logits


class KernelRates:
    """Owns the rates of one machine with some number of threads, and the file that keeps them."""

    def __init__(
        self,
        limits: MachineLimits,
        *,
        refresh: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """refresh: measure what is needed now, although rates were kept."""
        self._limits = limits
        self._path = limits_path(limits.num_threads).with_suffix(".rates.json")
        self._progress = progress or (lambda line: None)
        self._known = {} if refresh else _read(self._path, limits.identity)

    def linear(self, format: str, *, among: int) -> Mapping[int, LinearRate]:
        """By number of tokens, for matrices read among as many bytes: see `set_of`."""
        limits = self._limits
        few = self._rates(
            f"linear {format} among {among // 2**20} MiB",
            lambda: _measure_linear(limits, format, FEW_TOKENS, among),
        )
        many = self._rates(
            f"linear {format}, many tokens",
            lambda: _measure_linear(limits, format, MANY_TOKENS, FEW_BYTES, others=OTHER_BYTES),
        )
        values = few + many
        rates = (LinearRate(*values[i : i + 4]) for i in range(0, len(values), 4))
        return dict(zip(FEW_TOKENS + MANY_TOKENS, rates, strict=True))

    def attention(
        self, *, head_dim: int, q_per_kv: int, dtype: KVCacheDType, among: int
    ) -> Mapping[tuple[int, int], AttentionRate]:
        """By (new tokens, sequences), where as many bytes are read between two steps: see `set_of`."""
        values = self._rates(
            f"attention {q_per_kv} heads of {head_dim}, {dtype} pages, among {among // 2**20} MiB",
            lambda: _measure_attention(self._limits, head_dim, q_per_kv, dtype, among),
        )
        return {at: AttentionRate(*pair) for at, pair in zip(ATTENTION_GRID, _pairs(values), strict=True)}

    def shared_pair_s(self, *, head_dim: int, q_per_kv: int, dtype: KVCacheDType, among: int) -> float:
        """As `AttentionRate.pair_s` where another sequence has just read the same pages."""
        return self._rates(
            f"attention {q_per_kv} heads of {head_dim}, {dtype} pages, shared, among {among // 2**20} MiB",
            lambda: _measure_attention(
                self._limits, head_dim, q_per_kv, dtype, among, grid=((1, SHARING_SEQS),), shared=True
            ),
        )[1]

    def element_s(self, kind: str) -> float:
        """One element of a large norm, GLU or addition, by all threads."""
        return self._rates(f"{kind} elements", lambda: [_measure_elements(self._limits, kind)])[0]

    def engine(self, *, among: int) -> EngineRate:
        """On a model so small that its kernels cost nothing, with as many bytes read between two steps."""
        name = f"engine without a model, among {among // 2**20} MiB"
        *steps_s, sequence_s, logit_s = self._rates(name, lambda: _measure_engine(self._limits, among))
        return EngineRate(tuple(steps_s), sequence_s, logit_s)

    def _rates(self, name: str, measure: Callable[[], list[float]]) -> list[float]:
        if name not in self._known:
            self._progress(name)
            self._known[name] = measure()
            kept = _read(self._path, self._limits.identity) | self._known
            _write(self._path, self._limits.identity, kept)
        return self._known[name]


def set_of(num_bytes: int, *, parts: int = 4) -> int:
    """The size of a set of bytes among which rates are measured, nearest to `num_bytes` that a step reads.

    Quarters of a power of two for matrices, which are most of a set: what a cache keeps of it changes quickly
    with its size. `parts` 2: halves, for what only shares the caches with them.
    """
    return int(2 ** (round(parts * math.log2(min(max(num_bytes, SMALLEST_SET), LARGEST_SET))) / parts))


def measured_activation_bytes(num_tokens: int) -> int:
    """Of the matrices with which linear rates are measured: what these bytes cost is in the rates."""
    return int(4 * num_tokens * (statistics.fmean(ROWS) + statistics.fmean(COLUMNS)))


def scored_pairs(num_new: int, length: int, *, window: int | None = None, num_sinks: int = 0) -> int:
    """Query-key pairs that the kernel computes for the last `num_new` of `length` tokens.

    More than what the queries see: keys come in whole tiles.
    """

    def num_tiles(seen: int) -> int:
        first = 0 if window is None else max(seen - window, 0) // TILE_TOKENS
        return -(-seen // TILE_TOKENS) - first + min(-(-num_sinks // TILE_TOKENS), first)

    return TILE_TOKENS * sum(num_tiles(seen) for seen in range(length - num_new + 1, length + 1))


def _pairs(values: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _read(path: Path, identity: str) -> dict[str, list[float]]:
    try:
        document = json.loads(path.read_text())
        if document["schema"] == SCHEMA and document["identity"] == identity:
            return {str(name): [float(v) for v in values] for name, values in document["rates"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def _write(path: Path, identity: str, rates: Mapping[str, list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"schema": SCHEMA, "identity": identity, "rates": rates}, indent=1) + "\n")
    partial.replace(path)


def _native(program: Program, limits: MachineLimits, layout: CacheLayout, max_tokens: int) -> NativeProgram:
    return NativeProgram(
        program, layout, max_tokens=max_tokens, max_logits=1, num_threads=limits.num_threads, isa=limits.isa
    )


def _measure_linear(
    limits: MachineLimits, format: str, tokens: Sequence[int], num_bytes: int, *, others: int = 0
) -> list[float]:
    """Matrices of `num_bytes` together, one after another; `others`: bytes that are read before each step."""
    before = np.ones(others // 8).sum if others else None
    weight_bytes = format_named(format.removesuffix(ROUNDED)).bits_per_weight / 8
    seconds: dict[int, dict[tuple[int, int], float]] = {t: {} for t in tokens}
    for rows, columns in itertools.product(ROWS, COLUMNS):
        count = min(max(int(num_bytes / (rows * columns * weight_bytes)), 2), MAX_MATRICES)
        program = linear_program(format, rows=rows, columns=columns, count=count)
        native = _native(program, limits, layout_of(blocks_of(max(tokens))), max(tokens))
        for t in tokens:
            seconds[t][rows, columns] = op_seconds(native, prompt_batch(t), Opcode.LINEAR, before_step=before)
        native.close()
    return [value for corners in seconds.values() for value in astuple(LinearRate.of_corners(corners))]


def _measure_attention(
    limits: MachineLimits,
    head_dim: int,
    q_per_kv: int,
    dtype: KVCacheDType,
    among: int,
    *,
    grid: Sequence[tuple[int, int]] = ATTENTION_GRID,
    shared: bool = False,
) -> list[float]:
    """Of one KV head among several, as in the middle of a step: blocks in no order, and `among` bytes read
    since they were read last.

    shared: all sequences read the blocks of the first.
    """
    others = np.ones(among // 8)
    rng = np.random.default_rng(2)
    num_blocks = max(n for _, n in ATTENTION_GRID) * blocks_of(ATTENTION_CONTEXTS[-1] + 1)
    layer = {"num_kv_heads": PROBE_KV_HEADS, "head_dim": head_dim}
    layer_bytes = layout_of(num_blocks, **layer, dtype=dtype).num_bytes
    shape = layer | {"num_layers": min(max(CACHE_BYTES // layer_bytes, 2), 16)}
    native = _native(
        attention_program(**shape, q_per_kv=q_per_kv, rotate=True),
        limits,
        layout_of(num_blocks, **shape, dtype=dtype),
        max(new for new, _ in grid),
    )
    fill_pages(native, dtype)
    values: list[float] = []
    for num_new, num_seqs in grid:
        measured = []
        for context in ATTENTION_CONTEXTS:
            length = context + num_new
            blocks = rng.permutation(num_blocks)[: num_seqs * blocks_of(length)].reshape(num_seqs, -1)
            if shared:
                blocks[:] = blocks[0]
            rows = [Row((0,) * num_new, context, tuple(table), 1) for table in blocks.tolist()]
            batch = ForwardBatch.from_rows(rows, block_size=BLOCK_SIZE)
            pairs = num_seqs * scored_pairs(num_new, length)
            seconds = op_seconds(native, batch, Opcode.ATTENTION, before_step=others.sum)
            fixed = min(limits.barrier_s, seconds)  # once for all heads
            measured.append((pairs, fixed + (seconds - fixed) / PROBE_KV_HEADS))
        (few, short), (many, long) = measured
        pair_s = max((long - short) / (many - few), 0.0)
        values += [max(short - pair_s * few, 0.0), pair_s]
    native.close()
    return values


def _measure_elements(limits: MachineLimits, kind: str) -> float:
    recorder = Recorder()
    row = float_rows("x", ELEMENT_COLUMNS)
    x = recorder.embed(recorder.bind(row), None)
    if kind == "norm":
        gain = recorder.bind(Weight("g", row.format, (ELEMENT_COLUMNS,), {"data": row.buffers["data"][0]}))
        y, opcode = recorder.rms_norm(x, gain, eps=1e-5, offset=0.0), Opcode.RMS_NORM
    elif kind == "add":
        y, opcode = recorder.add(x, x), Opcode.ADD
    else:
        y, opcode = recorder.glu(x, x, activation="silu"), Opcode.GLU
    native = _native(recorder.program(y), limits, layout_of(blocks_of(256)), 256)
    seconds = op_seconds(native, prompt_batch(256), opcode)
    native.close()
    return seconds / (256 * ELEMENT_COLUMNS)


def _waking_s(program: Program, times: npt.NDArray[np.float64]) -> float:
    """What the first instructions of a `linear_program` took longer than later ones: threads were asleep."""
    opcodes = [i.opcode for i in program.instructions]
    first = opcodes.index(Opcode.LINEAR) + 1
    usual = [
        statistics.median(t for t, o in zip(times, opcodes, strict=True) if o is op)
        for op in opcodes[1:first]
    ]
    return float(times[:first].sum() - sum(usual))


def _measure_engine(limits: MachineLimits, among: int) -> list[float]:
    """Before each step matrices are multiplied with as many tokens: to the caches, a step of a model."""
    engine = probe_engine(num_threads=limits.num_threads, tokenizer=None)
    assert isinstance(engine.executor, NativeExecutor)
    native = engine.executor.native
    rows, columns = ROWS[1], COLUMNS[0]
    weight_bytes = FORMATS["Q8_0"].bits_per_weight / 8
    program = linear_program(
        "Q8_0", rows=rows, columns=columns, count=int(among / (rows * columns * weight_bytes))
    )
    most = max(ENGINE_TOKENS)
    reader = _native(program, limits, layout_of(blocks_of(most)), most)

    def decode_s(num_seqs: int, num_tokens: int) -> float:
        num_steps = 60 if num_tokens <= ENGINE_SEQS else 20
        params = SamplingParams(temperature=0, max_tokens=num_steps + 20, ignore_eos=True)
        for i in range(num_seqs):
            engine.add_request({"prompt_token_ids": [i + 1] * 8}, params)
        for _ in range(10):
            engine.step()
        native.take_times()
        reader.step(prompt_batch(num_tokens))
        reader.take_times()
        times = []
        for _ in range(num_steps):
            reader.step(prompt_batch(num_tokens))
            waking_s = _waking_s(program, reader.take_times())
            started = time.perf_counter()
            engine.step()
            elapsed = time.perf_counter() - started
            times.append(elapsed - float(native.take_times().sum()) + waking_s)
        while engine.has_unfinished:
            engine.step()
        return statistics.median(times)

    decode_s(1, 1)
    steps = [decode_s(1, tokens) for tokens in ENGINE_TOKENS]
    many = decode_s(ENGINE_SEQS, ENGINE_SEQS)
    engine.close()
    sequence_s = max((many - steps[ENGINE_TOKENS.index(ENGINE_SEQS)]) / (ENGINE_SEQS - 1), 0.0)
    logits = np.random.default_rng(4).standard_normal((ENGINE_SEQS, PROBE_VOCAB), np.float32)
    times = []
    for _ in range(50):
        reader.step(prompt_batch(ENGINE_SEQS))
        started = time.perf_counter()
        reader.greedy(logits)
        times.append(time.perf_counter() - started)
    reader.close()
    return [
        *(max(step - sequence_s, 0.0) for step in steps),
        sequence_s,
        statistics.median(times) / logits.size,
    ]
