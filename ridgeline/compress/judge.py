"""Quantized models against the float model they were made from: same tokens, same machine, side by side.

Quality is measured through the executor that serves. The base runs in float32, whatever its file holds, and
is computed once for all candidates, window by window. Every difference is paired: of log-likelihoods, of
likeliest tokens, and of speeds, which are taken in turns (base, candidates, base, candidates, ...).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ridgeline.bench.latency import LatencyOptions, time_batch
from ridgeline.bench.result import Metric
from ridgeline.bench.turns import turn
from ridgeline.compress.sizes import Sizes, sizes_of
from ridgeline.config import EngineConfig, Executor
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel
from ridgeline.quality.divergence import DivergenceResult, divergences
from ridgeline.quality.text import load_text, tokenize
from ridgeline.tokenizer import Tokenizer


class Progress(Protocol):
    """Told how far a long work is."""

    def __call__(self, done: int, total: int) -> None: ...


BASE = "base"
SPEEDS = ("prefill_tok_s", "decode_tok_s")
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 64
WARM_UP = LatencyOptions(input_len=32, output_len=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions:
    """How a quantized model is judged. The fields are flags."""

    eval: bool = True
    """Measure perplexity and divergence from the float model."""
    eval_tokens: int = 16384
    """Tokens that quality is measured on, in windows of --eval-context."""
    eval_context: int = 1024
    """Tokens of a window."""
    eval_text: Path | None = None
    """A UTF-8 file to measure quality on; the even years of the State of the Union addresses if left out."""
    executor: Executor = "native"
    """What computes for quality; speed is always that of native."""
    speed: bool = True
    """Measure prefill and decode speed, in turns with the float model."""
    speed_rounds: int = 5
    """Turns."""
    num_threads: int | None = None
    """Of every model; all usable cores if left out."""

    def __post_init__(self) -> None:
        if self.eval and self.eval_tokens < self.eval_context:
            raise ConfigError(
                f"--eval-tokens {self.eval_tokens} is less than one window of {self.eval_context} tokens; "
                "give more tokens, a shorter --eval-context, or --no-eval"
            )
        if self.speed_rounds < 1:
            raise ConfigError(f"--speed-rounds {self.speed_rounds}: expected at least 1")

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"eval_text": None if self.eval_text is None else str(self.eval_text)}


@dataclass(frozen=True, slots=True)
class Judged:
    """What one model is, how far it is from the base, and how fast it runs."""

    sizes: Sizes
    quality: DivergenceResult | None
    """None: not measured, or this is the base"""
    speeds: dict[str, Metric]
    """by the names of SPEEDS, one sample a turn; empty: not measured"""
    speed_ratios: dict[str, float]
    """median over turns of this model's speed to the base's in the same turn"""

    def document(self) -> dict[str, Any]:
        """As plain data, without the single samples of the windows."""
        return {
            "sizes": self.sizes.document(),
            "quality": None if self.quality is None else quality_document(self.quality),
            "speed": {name: metric.summary() for name, metric in self.speeds.items()},
            "speed_ratio": self.speed_ratios,
        }


def quality_document(result: DivergenceResult) -> dict[str, Any]:
    """With the relative change of perplexity and its paired standard error (delta method)."""
    error = result.log_likelihood_difference_error
    return result.document() | {
        "perplexity_change": result.perplexity_ratio - 1,
        "perplexity_change_error": None if error is None else result.perplexity_ratio * error,
    }


def judge(
    base: LoadedModel,
    candidates: Mapping[str, LoadedModel],
    tokenizer: Tokenizer | None,
    options: JudgeOptions,
    *,
    progress: Callable[[str], AbstractContextManager[Progress]] = lambda title: nullcontext(_silent),
) -> dict[str, Judged]:
    """Judge all candidates -> one entry for each name, and one for the base under BASE.

    `progress(title)` gives, as a context, what is told how far the work under this title is. Raises
    ConfigError where no executor can run here, RequestError for a text that is too short or a model without
    a tokenizer.
    """
    models = {BASE: base, **candidates}
    qualities: dict[str, DivergenceResult] = {}
    speeds: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as opened:
        engines: dict[str, LLMEngine] = {}
        if options.eval and candidates:
            engines = opened.enter_context(_engines(models, tokenizer, options, options.executor))
            with progress("windows") as told:
                qualities = _qualities(engines, options, told)
        if options.speed:
            if not engines or options.executor != "native":
                engines = opened.enter_context(_engines(models, tokenizer, options, "native"))
            with progress("speed") as told:
                speeds = _speeds(engines, options, told)
    return {
        name: Judged(sizes_of(model), qualities.get(name), *_speed_figures(speeds, name))
        for name, model in models.items()
    }


def _silent(done: int, total: int) -> None:
    """Where nobody watches."""


@contextmanager
def _engines(
    models: Mapping[str, LoadedModel],
    tokenizer: Tokenizer | None,
    options: JudgeOptions,
    executor: Executor,
) -> Iterator[dict[str, LLMEngine]]:
    """One engine a model, the base (first) in float32; closed at the end."""
    engines: dict[str, LLMEngine] = {}
    try:
        for name, model in models.items():
            length = max(options.eval_context if options.eval else 1, _prompt_tokens(model) + OUTPUT_TOKENS)
            config = EngineConfig.from_options(
                name,
                executor=executor,
                dtype="float32" if name == BASE or executor != "native" else None,
                max_num_seqs=1,
                max_model_len=length,
                num_threads=options.num_threads,
            )
            engines[name] = LLMEngine(config, model, tokenizer)
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def _qualities(
    engines: Mapping[str, LLMEngine], options: JudgeOptions, progress: Progress
) -> dict[str, DivergenceResult]:
    base, *others = engines.values()
    num_tokens = options.eval_tokens // options.eval_context * options.eval_context
    results = divergences(
        base,
        others,
        tokenize(base, load_text(options.eval_text), num_tokens=num_tokens),
        context=options.eval_context,
        on_progress=progress,
    )
    return dict(zip(list(engines)[1:], results, strict=True))


def _speeds(
    engines: Mapping[str, LLMEngine], options: JudgeOptions, progress: Progress
) -> dict[str, dict[str, list[float]]]:
    """Samples by model and name of SPEEDS: every model once a round, each round with prompts of its own."""
    prompt = _prompt_tokens(next(iter(engines.values())).model)
    workload = LatencyOptions(input_len=prompt, output_len=OUTPUT_TOKENS).workload()
    samples: dict[str, dict[str, list[float]]] = {name: {s: [] for s in SPEEDS} for name in engines}
    for engine in engines.values():
        time_batch(engine, WARM_UP.workload(), options.speed_rounds)
    for turn_number in range(options.speed_rounds):
        for name, engine in engines.items():
            with turn():
                found = time_batch(engine, workload, turn_number)
            for speed in SPEEDS:
                samples[name][speed] += found[speed]
        progress(turn_number + 1, options.speed_rounds)
    return samples


def _prompt_tokens(model: LoadedModel) -> int:
    """As many as the model was trained for, at most."""
    return max(1, min(PROMPT_TOKENS, model.config.max_position - OUTPUT_TOKENS))


def _speed_figures(
    speeds: Mapping[str, Mapping[str, Sequence[float]]], name: str
) -> tuple[dict[str, Metric], dict[str, float]]:
    if not speeds:
        return {}, {}
    metrics = {s: Metric(s, "token/s", "higher", tuple(speeds[name][s])) for s in SPEEDS}
    ratios = {
        s: math.exp(
            statistics.median(math.log(a / b) for a, b in zip(speeds[name][s], speeds[BASE][s], strict=True))
        )
        for s in SPEEDS
    }
    return metrics, ratios
