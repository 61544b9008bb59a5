"""How fast the native kernels really are, measured on shapes that belong to no model.

A limit says what the machine could do; a prediction needs what the kernels reach of it. Each kind of kernel
is timed on a small grid of generic shapes and summed up in a few numbers: seconds of one call whatever its
size, and seconds for each weight, pair or element. A model's time is then put together from its Program
(`roofline`). None of these numbers comes from the model whose time is predicted, except that matrices are
timed among as many bytes as the model has, since bandwidth depends on what the caches hold.

Rates are kept beside the machine's limits and measured when they are first needed, a few seconds each.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ridgeline.config import KVCacheDType
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.cases import make_weight
from ridgeline.ops.fuse import fuse
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.program import Opcode, Program
from ridgeline.ops.recorder import Recorder
from ridgeline.profiling.machine import MachineLimits, limits_path
from ridgeline.profiling.probe import probe_engine
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight
from ridgeline.sampling_params import SamplingParams

SCHEMA = "ridgeline.rates/1"
COLUMNS = 1280
BIG_ROWS, SMALL_ROWS = 1024, 64
"""Two matrices of COLUMNS columns: from their times, what a call costs and what a weight costs."""
LINEAR_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
STREAMED_TOKENS = 32
"""Up to so many tokens matrices are read from as large a set as the model's; beyond, arithmetic rules."""
CACHED_BYTES = 2**24
SMALLEST_SET, LARGEST_SET = 2**24, 2**28
ATTENTION_GRID = ((1, 1), (1, 4), (1, 16), (16, 1), (64, 1), (256, 1), (512, 1))
"""(new tokens, sequences)"""
ATTENTION_CONTEXTS = (64, 1024)
"""Tokens in the cache before the new ones."""
KV_BYTES = 3 * 2**25
"""K and V in all layers of the attention probe: more than a cache holds."""
EVICTING_BYTES = 2**26
SECONDS = 0.15
MIN_REPEATS = 3
PROBE_VOCAB = 32768


@dataclass(frozen=True, slots=True)
class LinearRate:
    """Of one weight format at some number of tokens."""

    call_s: float
    """One call on COLUMNS columns: threads, quantizing the input, writing the output."""
    weight_s: float
    """One weight for all tokens together."""


@dataclass(frozen=True, slots=True)
class AttentionRate:
    """Of one attention instruction with its rotation and KV write."""

    call_s: float
    pair_s: float
    """One query token and one key token of one KV head's group of query heads."""


@dataclass(frozen=True, slots=True)
class EngineRate:
    """What a step costs outside of the kernels: scheduler, batch, sampling, results."""

    step_s: float
    sequence_s: float
    logit_s: float
    """One logit of a row that is sampled greedily."""


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

    def linear(self, format: str, *, model_bytes: int) -> Mapping[int, LinearRate]:
        """By number of tokens, for matrices read among about `model_bytes` of others."""
        among = 2 ** round(math.log2(min(max(model_bytes, SMALLEST_SET), LARGEST_SET)))
        values = self._rates(
            f"linear {format} among {among // 2**20} MiB",
            lambda: _measure_linear(self._limits, format, among),
        )
        return {tokens: LinearRate(*pair) for tokens, pair in zip(LINEAR_TOKENS, _pairs(values), strict=True)}

    def attention(
        self, *, head_dim: int, q_per_kv: int, dtype: KVCacheDType
    ) -> Mapping[tuple[int, int], AttentionRate]:
        """By (new tokens, sequences)."""
        values = self._rates(
            f"attention {q_per_kv} heads of {head_dim}, {dtype} pages",
            lambda: _measure_attention(self._limits, head_dim, q_per_kv, dtype),
        )
        return {at: AttentionRate(*pair) for at, pair in zip(ATTENTION_GRID, _pairs(values), strict=True)}

    def element_s(self, kind: str) -> float:
        """One element of a large norm or GLU, by all threads."""
        return self._rates(f"{kind} elements", lambda: [_measure_elements(self._limits, kind)])[0]

    def engine(self) -> EngineRate:
        """On a model so small that its kernels cost nothing."""
        return EngineRate(*self._rates("engine without a model", lambda: _measure_engine(self._limits)))

    def _rates(self, name: str, measure: Callable[[], list[float]]) -> list[float]:
        if name not in self._known:
            self._progress(name)
            self._known[name] = measure()
            kept = _read(self._path, self._limits.identity) | self._known
            _write(self._path, self._limits.identity, kept)
        return self._known[name]


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


def _layout(num_blocks: int, **shape: int) -> CacheLayout:
    fields = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 16} | shape
    return CacheLayout(dtype="float32", block_size=32, num_blocks=num_blocks, **fields)


def _prefill_row(num_tokens: int, num_logits: int = 1) -> Row:
    return Row((0,) * num_tokens, 0, tuple(range(-(-num_tokens // 32))), num_logits)


def _mean_s(native: NativeProgram, batch: ForwardBatch, opcode: Opcode) -> float:
    """Median over steps of the mean time of the instructions with this opcode."""
    at = [n for n, i in enumerate(native.program.instructions) if i.opcode is opcode]
    times: list[float] = []
    native.step(batch)
    native.take_times()
    end = time.perf_counter() + SECONDS
    while len(times) < MIN_REPEATS or time.perf_counter() < end:
        native.step(batch)
        times.append(float(native.take_times()[at].mean()))
    return statistics.median(times)


def _linears(format: str, rows: int, count: int, max_tokens: int) -> Program:
    """`count` matrices, each with its own bytes, on one input."""
    rng = np.random.default_rng(1)
    recorder = Recorder()
    table = rng.standard_normal((1, COLUMNS), np.float32)
    x = recorder.embed(recorder.bind(Weight("x", FORMATS["F32"], table.shape, {"data": table})), None)
    block = make_weight("w", rows, COLUMNS, format=format, rng=rng, std=0.02)
    for i in range(count):
        y = recorder.linear(x, recorder.bind(Weight(f"w{i}", block.format, block.shape, block.buffers)))
    return recorder.program(y)


def _measure_linear(limits: MachineLimits, format: str, among: int) -> list[float]:
    def times(rows: int, num_bytes: int, tokens: Sequence[int]) -> list[float]:
        count = max(2, min(512, int(8 * num_bytes / (rows * COLUMNS * FORMATS[format].bits_per_weight))))
        native = _native(_linears(format, rows, count, max(tokens)), limits, _layout(16), max(tokens))
        seconds = [
            _mean_s(native, ForwardBatch.from_rows([_prefill_row(t)], block_size=32), Opcode.LINEAR)
            for t in tokens
        ]
        native.close()
        return seconds

    few = [t for t in LINEAR_TOKENS if t <= STREAMED_TOKENS]
    many = [t for t in LINEAR_TOKENS if t > STREAMED_TOKENS]
    big = times(BIG_ROWS, among, few) + times(BIG_ROWS, CACHED_BYTES // 4, many)
    small = times(SMALL_ROWS, among // 4, few) + times(SMALL_ROWS, CACHED_BYTES // 8, many)
    values: list[float] = []
    for large, little in zip(big, small, strict=True):
        weight_s = (large - little) / ((BIG_ROWS - SMALL_ROWS) * COLUMNS)
        values += [max(little - weight_s * SMALL_ROWS * COLUMNS, 0.0), weight_s]
    return values


def _attention_program(num_layers: int, head_dim: int, q_per_kv: int) -> Program:
    recorder = Recorder()
    rng = np.random.default_rng(2)

    def embedded(columns: int) -> int:
        table = rng.standard_normal((1, columns), np.float32)
        return recorder.bind(Weight(f"x{columns}", FORMATS["F32"], table.shape, {"data": table}))

    wide, narrow = embedded(q_per_kv * head_dim), embedded(head_dim)
    cos_sin = recorder.rope_cos_sin(
        recorder.bind_constant(1.0 / 10_000.0 ** (np.arange(head_dim // 2) / (head_dim // 2))),
        None,
        attention_factor=1.0,
    )
    for layer in range(num_layers):
        q, k, v = recorder.embed(wide, None), recorder.embed(narrow, None), recorder.embed(narrow, None)
        recorder.store_kv(layer, recorder.rope(k, cos_sin, head_dim=head_dim), v, None)
        rotated = recorder.rope(q, cos_sin, head_dim=head_dim)
        y = recorder.attention(layer, rotated, None, head_dim=head_dim, scale=head_dim**-0.5)
    return fuse(recorder.program(y))


def _measure_attention(
    limits: MachineLimits, head_dim: int, q_per_kv: int, dtype: KVCacheDType
) -> list[float]:
    """One KV head a layer: the time of a group. A model takes it for each of its KV heads."""
    values: list[float] = []
    for num_new, num_seqs in ATTENTION_GRID:
        measured = []
        for context in ATTENTION_CONTEXTS:
            length = context + num_new
            blocks = -(-length // 32)
            layer_bytes = num_seqs * blocks * 32 * 2 * head_dim * 2
            num_layers = max(2, min(96, KV_BYTES // layer_bytes)) if num_new == 1 else 4
            layout = CacheLayout(
                num_layers=num_layers,
                num_kv_heads=1,
                head_dim=head_dim,
                dtype=dtype,
                block_size=32,
                num_blocks=num_seqs * blocks,
            )
            native = _native(
                _attention_program(num_layers, head_dim, q_per_kv), limits, layout, num_new * num_seqs
            )
            native.pages[:] = 0
            rows = [
                Row((0,) * num_new, context, tuple(range(s * blocks, (s + 1) * blocks)), 1)
                for s in range(num_seqs)
            ]
            batch = ForwardBatch.from_rows(rows, block_size=32)
            pairs = num_seqs * (num_new * context + num_new * (num_new + 1) // 2)
            measured.append((pairs, _mean_s(native, batch, Opcode.ATTENTION)))
            native.close()
        (few, short), (many, long) = measured
        pair_s = max((long - short) / (many - few), 0.0)
        values += [max(short - pair_s * few, 0.0), pair_s]
    return values


def _measure_elements(limits: MachineLimits, kind: str) -> float:
    rng = np.random.default_rng(3)
    recorder = Recorder()
    table = rng.standard_normal((1, COLUMNS), np.float32)
    x = recorder.embed(recorder.bind(Weight("x", FORMATS["F32"], table.shape, {"data": table})), None)
    if kind == "norm":
        gain = recorder.bind(Weight("g", FORMATS["F32"], (COLUMNS,), {"data": table[0]}))
        y, opcode = recorder.rms_norm(x, gain, eps=1e-5, offset=0.0), Opcode.RMS_NORM
    else:
        y, opcode = recorder.glu(x, x, activation="silu"), Opcode.GLU
    native = _native(recorder.program(y), limits, _layout(8), 256)
    seconds = _mean_s(native, ForwardBatch.from_rows([_prefill_row(256)], block_size=32), opcode)
    native.close()
    return seconds / (256 * COLUMNS)


def _measure_engine(limits: MachineLimits) -> list[float]:
    engine = probe_engine(num_threads=limits.num_threads, tokenizer=None)
    others = np.ones(EVICTING_BYTES // 8)

    def decode_s(num_seqs: int, num_steps: int = 100) -> float:
        params = SamplingParams(temperature=0, max_tokens=num_steps + 20, ignore_eos=True)
        for i in range(num_seqs):
            engine.add_request({"prompt_token_ids": [i + 1] * 8}, params)
        for _ in range(10):
            engine.step()
        times = []
        for _ in range(num_steps):
            others.sum()  # a model's weights push the engine's own objects out of the caches
            started = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - started)
        while engine.has_unfinished:
            engine.step()
        return statistics.median(times)

    decode_s(1)
    one, many = decode_s(1), decode_s(16)
    engine.close()
    sequence_s = max((many - one) / 15, 0.0)
    recorder = Recorder()
    table = np.random.default_rng(4).standard_normal((16, PROBE_VOCAB), np.float32)
    y = recorder.embed(recorder.bind(Weight("x", FORMATS["F32"], table.shape, {"data": table})), None)
    native = _native(recorder.program(y), limits, _layout(1), 16)
    times = []
    for _ in range(50):
        others.sum()
        started = time.perf_counter()
        native.greedy(table)
        times.append(time.perf_counter() - started)
    native.close()
    return [max(one - sequence_s, 0.0), sequence_s, statistics.median(times) / table.size]
