"""The measured side of a prediction: the time of each op of a step, of a prompt, and of a decode step.

Prompts are of tokens of their own, so that the prefix cache never hits; answers are greedy and do not stop.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from ridgeline.engine.engine import LLMEngine
from ridgeline.engine.executors.native import NativeExecutor
from ridgeline.errors import ConfigError
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.ops.program import StepShape
from ridgeline.profiling.roofline import kind_of
from ridgeline.sampling_params import SamplingParams

OP_SECONDS = 0.5
MIN_REPEATS = 5
DECODE_STEPS = 24


def measure_ops(engine: LLMEngine, shape: StepShape, *, scatter_seed: int | None = None) -> dict[str, float]:
    """Median seconds of each kind of instruction in a step of this shape, by `kind_of`.

    scatter_seed: blocks from all over the cache, as after hours of requests that came and went; None: side
    by side. Raises ConfigError where the engine is not native or its cache is too small.
    """
    if not isinstance(engine.executor, NativeExecutor):
        raise ConfigError(f"executor={engine.config.executor!r}: ops are timed on 'native' only")
    native, block_size = engine.executor.native, engine.layout.block_size
    order = list(range(engine.layout.num_blocks))
    if scatter_seed is not None:
        random.Random(scatter_seed).shuffle(order)
    rows, used = [], 0
    for i, (num_new, seq_len) in enumerate(shape.sequences):
        blocks = -(-seq_len // block_size)
        num_logits = int(i < shape.num_logits)
        token_ids = tuple(range(1, num_new + 1))
        rows.append(Row(token_ids, seq_len - num_new, tuple(order[used : used + blocks]), num_logits))
        used += blocks
    if used > engine.layout.num_blocks:
        raise ConfigError(f"this step needs {used} blocks, the cache has {engine.layout.num_blocks}")
    batch = ForwardBatch.from_rows(rows, block_size=block_size)
    samples: list[npt.NDArray[np.float64]] = []
    native.step(batch)
    native.take_times()
    end = time.perf_counter() + OP_SECONDS
    while len(samples) < MIN_REPEATS or time.perf_counter() < end:
        native.step(batch)
        samples.append(native.take_times())
    totals: dict[str, float] = defaultdict(float)
    for instruction, seconds in zip(
        native.program.instructions, np.median(np.array(samples), axis=0), strict=True
    ):
        totals[kind_of(instruction, native.program)] += float(seconds)
    return dict(totals)


def measure_prefill(engine: LLMEngine, num_tokens: int, *, repeats: int = MIN_REPEATS) -> float:
    """Median TTFT in seconds of a prompt of `num_tokens` on the idle engine."""
    return statistics.median(_prefill(engine, num_tokens, seed) for seed in range(repeats))


def _prefill(engine: LLMEngine, num_tokens: int, seed: int) -> float:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    started = time.perf_counter()
    engine.add_request({"prompt_token_ids": _prompt(engine, num_tokens, seed)}, params)
    while engine.has_unfinished:
        engine.step()
    return time.perf_counter() - started


def measure_decode(engine: LLMEngine, batch: int, context: int, *, steps: int = DECODE_STEPS) -> float:
    """Median seconds of a step of `batch` sequences whose context is about `context` tokens."""
    num_prompt = max(context - steps // 2, 1)
    params = SamplingParams(temperature=0, max_tokens=steps + 2, ignore_eos=True)
    ids = [
        engine.add_request({"prompt_token_ids": _prompt(engine, num_prompt, i)}, params) for i in range(batch)
    ]
    times: list[float] = []
    num_ready = 0
    while engine.has_unfinished:
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        if num_ready == batch and len(outputs) == batch:
            times.append(seconds)
        num_ready = max(num_ready, len(outputs))
    assert ids and times
    return statistics.median(times)


def _prompt(engine: LLMEngine, num_tokens: int, seed: int) -> list[int]:
    """Tokens that no other call gave: the clock is part of the seed."""
    rng = np.random.default_rng((seed, time.perf_counter_ns()))
    return [int(t) for t in rng.integers(1, engine.model.config.vocab_size, num_tokens)]
