"""`ridgeline simulate`: what a workload would see, in seconds and without running the model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cyclopts import Parameter

from ridgeline.bench import simulate as simulation
from ridgeline.bench.result import Better, Metric, make_document
from ridgeline.bench.throughput import METRICS, WorkloadOptions, samples_of
from ridgeline.cli.options import DescribedConfig, print_json
from ridgeline.cli.roofline import machine_of
from ridgeline.cli.terminal import progress_bar
from ridgeline.config import EngineConfig
from ridgeline.engine.scheduler import StepPlan
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel, describe_model
from ridgeline.models.locate import locate_model
from ridgeline.profiling.machine import MachineLimits
from ridgeline.profiling.roofline import Predictor

Parameter(name="*")(WorkloadOptions)

DEVICE_MEMORY_SHARE = 0.9
"""Of a described machine's memory, for weights and cache."""
MAX_GAPS = 20_000
"""Samples of ITL that the document keeps, evenly spaced; a simulation makes millions."""
COLUMNS = 60
LEVELS = " ▁▂▃▄▅▆▇█"


def simulate(
    *,
    engine: DescribedConfig,
    load: WorkloadOptions = WorkloadOptions(),
    json: bool = False,
) -> None:
    """Latency and throughput of a workload, from the real scheduler and predicted step times.

    Nothing is computed: scheduling, batching, the KV cache, prefix hits and preemption are the engine's own,
    and the time of each step comes from the roofline of this machine, or of one that is described.

    Examples of use:

        ridgeline simulate -m smollm2 --workload w3 --max-num-seqs 16

        ridgeline simulate -m smollm2 --num-prompts 10000 --request-rate 5 --input-len 200 --output-len 100

        ridgeline simulate -m smollm2 --workload w4 --no-enable-prefix-caching

        ridgeline simulate -m model.gguf --device h100 --request-rate 100 --num-prompts 2000

    Parameters
    ----------
    json
        End with one JSON document, in the schema of `ridgeline bench`.
    """
    asked = load.chosen()
    config = engine.runnable
    model = describe_model(locate_model(config.model), config.load)
    limits, rates = machine_of(engine.device, config.num_threads)
    if engine.device is not None:
        config = _with_device_cache(config, model, limits)
    config = config.resolve(model.config, unavailable={})
    predictor = Predictor.for_model(model, config, limits, rates)
    requests = asked.requests(vocab_size=model.config.vocab_size, seed=config.seed)
    num_finished = 0
    with progress_bar("simulating") as progress:

        def on_step(plan: StepPlan) -> None:
            nonlocal num_finished
            if plan.finished:
                num_finished += len(plan.finished)
                progress(num_finished, len(requests))

        found = simulation.simulate(
            config,
            model.config,
            requests,
            predictor.step_s,
            max_concurrency=asked.max_concurrency,
            on_step=on_step,
        )
    document = make_document(
        "simulate",
        metrics=metrics(found),
        settings=config.flat(),
        workload=asked.describe(),
        seeds=[config.seed],
        details={
            "machine": limits.name,
            "duration_s": found.duration_s,
            "num_steps": len(found.steps),
            "num_requests": len(found.requests),
            "num_prompt_tokens": found.num_prompt_tokens,
            "num_output_tokens": found.num_output_tokens,
            "num_prefix_hit_tokens": found.num_prefix_hits,
            "num_preemptions": found.num_preemptions,
            "num_kv_tokens": found.num_kv_tokens,
            "timeline": simulation.timeline(found, COLUMNS),
        },
    )
    if json:
        print_json(document)
    else:
        sys.stdout.write(summary(document) + "\n")


def metrics(found: simulation.Simulation) -> list[Metric]:
    """Those of `ridgeline bench throughput`, and the time before the first step of each request."""
    samples = samples_of(list(found.requests)) | {"queue_time_ms": [1e3 * r.queue_s for r in found.requests]}
    gaps = samples["itl_ms"]
    samples["itl_ms"] = gaps[:: -(-len(gaps) // MAX_GAPS) or 1]
    kinds: dict[str, tuple[str, Better]] = METRICS | {"queue_time_ms": ("ms", "lower")}
    return [Metric(name, *kinds[name], tuple(of)) for name, of in samples.items()]


def _with_device_cache(engine: EngineConfig, model: LoadedModel, limits: MachineLimits) -> EngineConfig:
    """Where no size of the cache was given: what the weights leave of the described memory."""
    if engine.cache.kv_cache_tokens is not None or engine.cache.kv_cache_memory_bytes is not None:
        return engine
    weights = {id(weight): weight.num_bytes for weight in model.weights.values()}
    left = int(limits.memory_bytes * DEVICE_MEMORY_SHARE) - sum(weights.values())
    if left <= 0:
        raise ConfigError(
            f"{engine.model} has {sum(weights.values()):,} bytes of weights; {limits.name} has "
            f"{limits.memory_bytes:,} bytes of memory. Choose a larger machine or fewer bits per weight"
        )
    return engine.with_options(kv_cache_memory_bytes=left)


def summary(document: Mapping[str, Any]) -> str:
    """The result for people: counts, figures, and how full everything was over time."""
    details = document["details"]
    head = (
        f"{details['num_requests']:,} requests in {details['duration_s']:,.2f} s of {details['machine']}: "
        f"{details['num_prompt_tokens']:,} prompt tokens ({details['num_prefix_hit_tokens']:,} of them "
        f"cached), {details['num_output_tokens']:,} output tokens, {details['num_steps']:,} steps, "
        f"{details['num_preemptions']:,} preemptions"
    )
    rows = [f"{'':<36}" + "".join(f"{name:>12}" for name in ("mean", "P50", "P95", "P99"))]
    for name, metric in document["metrics"].items():
        figures = [metric[key] for key in ("mean", "median", "p95", "p99")][: 1 if metric["n"] == 1 else 4]
        cells = "".join(f"{'-' if figure is None else format(figure, ',.2f'):>12}" for figure in figures)
        rows.append(f"{name + ' [' + metric['unit'] + ']':<36}{cells}")
    most = {
        "running": max(details["timeline"]["running"]),
        "waiting": max(details["timeline"]["waiting"]),
        "kv_cache": 1.0,
    }
    plots = [
        f"{name:>9} {sparkline(values, most[name])} up to {_shown(name, max(values))}"
        for name, values in details["timeline"].items()
    ]
    end = f"{details['duration_s']:,.1f} s"
    axis = f"{'':>9} 0 s{end:>{COLUMNS - 3}}"
    return "\n".join((head, "", *rows, "", *plots, axis))


def _shown(name: str, value: float) -> str:
    return f"{value:.0%}" if name == "kv_cache" else f"{value:,.1f}"


def sparkline(values: Sequence[float], top: float) -> str:
    """One character a value: a bar of eighths, full at `top`; anything above 0 is seen."""
    scale = (len(LEVELS) - 1) / top if top > 0 else 0.0
    return "".join(LEVELS[max(round(v * scale), 1) if v > 0 else 0] for v in values)
