"""One batch at a time: prefill and decode speed, time to first token and per token.

Prompts are random token ids, fresh for every iteration so that the prefix cache never hits; answers are
greedy and go on after end-of-sequence. Prefill ends when every request of the batch has its first token,
decode is all that comes after, so a decode of n tokens needs an output_len of n + 1. Tokenization is left
out, scheduling and sampling are not.

As a module it prints the bare samples of one process, for comparisons that interleave processes themselves:

    python -m ridgeline.bench.latency model.gguf --prompt-len 512 --output-len 1 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ridgeline.bench.drive import drive
from ridgeline.bench.repeat import Progress, RepeatOptions, Samples, repeat
from ridgeline.bench.result import Better, make_document
from ridgeline.bench.throughput import fitted
from ridgeline.bench.workload import Fixed, Workload
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.engine.executors.native import NativeExecutor
from ridgeline.errors import ConfigError, RidgelineError
from ridgeline.profiling.machine import cached_limits

METRICS: dict[str, tuple[str, Better]] = {
    "prefill_tok_s": ("token/s", "higher"),
    "decode_tok_s": ("token/s", "higher"),
    "ttft_ms": ("ms", "lower"),
    "tpot_ms": ("ms", "lower"),
    "e2el_ms": ("ms", "lower"),
}
DEFINITIONS = {
    "prefill_tok_s": "prompt tokens of the batch / seconds to its last first token",
    "decode_tok_s": "output tokens after that moment / seconds from there to the last token",
    "ttft_ms": "submission of the batch to the first token of each request",
    "tpot_ms": "per request: (E2EL - TTFT) / (output tokens - 1)",
    "e2el_ms": "submission of the batch to the last token of each request",
}
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    """The batch. The fields are flags."""

    input_len: int = 512
    """Prompt tokens of each request."""
    output_len: int = 128
    """Output tokens of each request."""
    batch_size: int = 1
    """Requests that are sent together."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least 1")

    def workload(self) -> Workload:
        return Workload(
            name="latency",
            num_requests=self.batch_size,
            prompt_lens=Fixed(self.input_len),
            output_lens=Fixed(self.output_len),
        )

    def config(self, config: EngineConfig) -> EngineConfig:
        """With room for the batch. Raises ConfigError where the settings leave none."""
        if self.batch_size > config.scheduler.max_num_seqs:
            raise ConfigError(
                f"--batch-size {self.batch_size} is more than --max-num-seqs "
                f"{config.scheduler.max_num_seqs}; the batch would wait for itself"
            )
        return fitted(config, num_requests=self.batch_size, length=self.input_len + self.output_len)


def time_batch(llm: LLMEngine, workload: Workload, seed: int) -> Samples:
    """One iteration -> its samples, under the names of METRICS."""
    times = drive(llm, workload.requests(vocab_size=llm.model.config.vocab_size, seed=seed))
    first, last = (max(getattr(record, name) for record in times) for name in ("ttft_s", "e2el_s"))
    num_after = sum(at > first for record in times for at in record.token_times)
    return {
        "prefill_tok_s": [sum(len(record.request.prompt_token_ids) for record in times) / first],
        "decode_tok_s": [num_after / (last - first)] if num_after else [],
        "ttft_ms": [1e3 * record.ttft_s for record in times],
        "tpot_ms": [1e3 * record.tpot_s for record in times if record.tpot_s is not None],
        "e2el_ms": [1e3 * record.e2el_s for record in times],
    }


def measure_latency(
    config: EngineConfig,
    options: LatencyOptions,
    repeats: RepeatOptions,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The result document of kind "latency". Raises RidgelineError."""
    workload = options.workload()
    llm = LLMEngine.from_config(options.config(config))
    try:
        repeated = repeat(
            lambda seed: time_batch(llm, workload, seed),
            repeats,
            seed=config.seed,
            kinds=METRICS,
            progress=progress,
        )
        settings = llm.config.flat()
        document = make_document(
            "latency",
            metrics=repeated.metrics,
            settings=settings | asdict(options) | asdict(repeats),
            workload=workload.describe(),
            seeds=repeated.seeds,
            details={**repeated.details(), "definitions": DEFINITIONS},
        )
        document["details"]["dram_share"] = _dram_share(
            llm, document["metrics"], batch_size=options.batch_size
        )
        return document
    finally:
        llm.close()


def _dram_share(llm: LLMEngine, metrics: Mapping[str, Any], *, batch_size: int) -> float | None:
    """Weight bytes of decode per second over the bandwidth of this machine's memory.

    None where the limits have not been measured (`ridgeline machine`), or the executor is not native.
    """
    if not isinstance(llm.executor, NativeExecutor) or "decode_tok_s" not in metrics:
        return None
    limits = cached_limits(num_threads=llm.config.num_threads)
    if limits is None:
        return None
    steps_per_s = metrics["decode_tok_s"]["median"] / batch_size
    return float(llm.executor.program.weight_bytes() * steps_per_s / 1e9 / limits.dram_gb_s)


def main() -> None:
    """Measure in this process and print the samples: a fresh process a round keeps a comparison fair."""
    parser = argparse.ArgumentParser(prog="python -m ridgeline.bench.latency", description=__doc__)
    parser.add_argument("model", help="a .gguf file, a Hugging Face directory or an alias")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--reps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines of text")
    args = parser.parse_args()
    config = EngineConfig.from_options(args.model, num_threads=args.num_threads, max_num_seqs=1)
    try:
        if args.reps < 1:
            raise ConfigError(f"--reps {args.reps}: expected at least 1")
        options = LatencyOptions(input_len=args.prompt_len, output_len=args.output_len)
        warm_up = LatencyOptions(
            input_len=args.prompt_len, output_len=min(args.output_len, _WARM_UP_TOKENS)
        ).workload()
        llm = LLMEngine.from_config(options.config(config))
        time_batch(llm, warm_up, args.seed)
        rounds = [time_batch(llm, options.workload(), args.seed + 1 + rep) for rep in range(args.reps)]
        llm.close()
    except RidgelineError as error:
        sys.exit(f"error: {error}")
    pooled = {name: [sample for samples in rounds for sample in samples[name]] for name in METRICS}
    if args.json:
        print(json.dumps(pooled))
        return
    for name, samples in pooled.items():
        print(f"{name:14}", *(f"{sample:,.2f}" for sample in samples))


if __name__ == "__main__":
    main()
