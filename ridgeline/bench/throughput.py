"""A whole workload in this process: requests and tokens a second, and what each request waited.

Tokenization and HTTP are left out, scheduling and sampling are not. One iteration is one run of the workload
with words of its own; rates have one sample an iteration, latencies are pooled over all requests of all
iterations.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ridgeline.bench.drive import drive
from ridgeline.bench.repeat import Progress, RepeatOptions, Samples, repeat
from ridgeline.bench.result import Better, make_document
from ridgeline.bench.simulate import RequestTimes
from ridgeline.bench.workload import Fixed, Gamma, Workload, workload_named
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError

METRICS: dict[str, tuple[str, Better]] = {
    "request_throughput": ("request/s", "higher"),
    "output_throughput": ("token/s", "higher"),
    "total_token_throughput": ("token/s", "higher"),
    "ttft_ms": ("ms", "lower"),
    "tpot_ms": ("ms", "lower"),
    "itl_ms": ("ms", "lower"),
    "e2el_ms": ("ms", "lower"),
}
DEFINITIONS = {
    "request_throughput": "requests / seconds from the first arrival to the last token",
    "output_throughput": "output tokens / the same seconds",
    "total_token_throughput": "prompt and output tokens / the same seconds",
    "ttft_ms": "arrival of the request to its first token, waiting included",
    "tpot_ms": "per request: (E2EL - TTFT) / (output tokens - 1); requests of one token have none",
    "itl_ms": "each gap between consecutive tokens, all requests pooled",
    "e2el_ms": "arrival of the request to its last token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """Which workload. The fields are flags."""

    workload: str | None = None
    """w1, w2, w2l, w3, w4, w5, w5l, or the path of a JSON description or trace; None: the lengths below."""
    num_prompts: int | None = None
    """Requests of a run; None: the workload's number, or 32."""
    input_len: int = 128
    """Prompt tokens of each request, where no --workload is given."""
    output_len: int = 64
    """Output tokens of each request, where no --workload is given."""
    request_rate: float | None = None
    """Requests per second, Poisson; None: the workload's own arrivals, or all at once."""
    max_concurrency: int | None = None
    """At most this many requests sent and not finished; None: the workload's number, or no limit."""

    def chosen(self) -> Workload:
        """Raises ConfigError for an unknown workload or an impossible number."""
        if self.workload is None:
            chosen = Workload(
                name="fixed",
                num_requests=self.num_prompts or 32,
                prompt_lens=Fixed(self.input_len),
                output_lens=Fixed(self.output_len),
            )
        else:
            chosen = workload_named(self.workload)
        changes: dict[str, Any] = {"num_requests": self.num_prompts, "max_concurrency": self.max_concurrency}
        if self.request_rate is not None:
            changes["arrivals"] = Gamma(self.request_rate)
        return replace(chosen, **{name: value for name, value in changes.items() if value is not None})


def measure_throughput(
    config: EngineConfig,
    workload: Workload,
    options: RepeatOptions,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The result document of kind "throughput". Raises RidgelineError."""
    llm = LLMEngine.from_config(config)
    cached = preempted = 0

    def run(seed: int) -> Samples:
        nonlocal cached, preempted
        requests = workload.requests(vocab_size=llm.model.config.vocab_size, seed=seed)
        times = drive(llm, requests, max_concurrency=workload.max_concurrency)
        cached += sum(record.num_cached_tokens for record in times)
        preempted += sum(record.num_preemptions for record in times)
        return samples_of(times)

    try:
        repeated = repeat(run, options, seed=config.seed, kinds=METRICS, progress=progress)
        settings = llm.config.flat()
    finally:
        llm.close()
    return make_document(
        "throughput",
        metrics=repeated.metrics,
        settings=settings | asdict(options),
        workload=workload.describe(),
        seeds=repeated.seeds,
        details={
            **repeated.details(),
            "definitions": DEFINITIONS,
            "num_cached_tokens": cached,
            "num_preemptions": preempted,
        },
    )


def samples_of(times: list[RequestTimes]) -> dict[str, list[float]]:
    """Samples of one run, under the names of METRICS."""
    seconds = max(r.token_times[-1] for r in times) - min(r.arrival_s for r in times)
    num_output = sum(len(r.token_times) for r in times)
    num_prompt = sum(len(r.request.prompt_token_ids) for r in times)
    gaps = sorted((at, gap) for r in times for at, gap in zip(r.token_times[1:], r.itl_s, strict=True))
    return {
        "request_throughput": [len(times) / seconds],
        "output_throughput": [num_output / seconds],
        "total_token_throughput": [(num_prompt + num_output) / seconds],
        "ttft_ms": [1e3 * r.ttft_s for r in times],
        "tpot_ms": [1e3 * r.tpot_s for r in times if r.tpot_s is not None],
        "itl_ms": [1e3 * gap for _, gap in gaps],
        "e2el_ms": [1e3 * r.e2el_s for r in times],
    }


def fitted(config: EngineConfig, *, num_requests: int, length: int) -> EngineConfig:
    """The config with room for what is measured, where the user named no size.

    Raises ConfigError where a size was named that is too small for requests of `length` tokens.
    """
    given = config.max_model_len
    if given is not None and given < length:
        raise ConfigError(f"--max-model-len {given}: the requests have {length} tokens with their output")
    changes: dict[str, Any] = {} if given is not None else {"max_model_len": length}
    if config.cache.kv_cache_tokens is None and config.cache.kv_cache_memory_bytes is None:
        seats = min(num_requests, config.scheduler.max_num_seqs) + 1
        changes["kv_cache_tokens"] = seats * (-(-length // 256) * 256)
    return config.with_options(**changes)
