"""`ridgeline plan`: what fits in memory and how fast it should be, from headers alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ridgeline.cli.options import DescribedConfig, print_json
from ridgeline.cli.roofline import machine_of
from ridgeline.cli.terminal import read_bytes, show_bytes
from ridgeline.config import EngineConfig
from ridgeline.engine.memory import free_memory_bytes
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.profiling.plan import (
    KV_ALTERNATIVES,
    alternatives,
    measure_peak,
    measure_process,
    plan_memory,
)
from ridgeline.profiling.roofline import Predictor


def plan(
    *,
    engine: DescribedConfig,
    memory: str | None = None,
    context: int = 1024,
    formats: str | None = None,
    measure: bool = False,
    json: bool = False,
) -> None:
    """Weights, KV cache, activations; how many tokens and sequences fit; TTFT and tokens a second.

    A config.json or the header of a GGUF file is enough: nothing is loaded.

    Examples:

        ridgeline plan -m smollm2

        ridgeline plan -m ./config.json --memory 16GiB --context 4096

        ridgeline plan -m model.gguf --device h100

        ridgeline plan -m smollm2 --max-num-seqs 16 --max-model-len 2048 --measure

    Parameters
    ----------
    memory
        Memory that the engine may use, such as 16GiB; what is free here, or the device's, if left out.
    context
        Tokens of a sequence, for what fits and for the speeds.
    formats
        Weight formats to compare, with commas between; all common ones if left out.
    measure
        Run it in a process of its own with the cache filled, and show how far off the plan is.
    json
        End with one JSON document.
    """
    if context < 1:
        raise ConfigError(f"--context {context}: expected at least 1")
    if measure and engine.device is not None:
        raise ConfigError(f"--measure with --device {engine.device}: only this machine can be measured")
    config = engine.runnable
    path = locate_model(config.model)
    model = describe_model(path, config.load)
    limits, rates = machine_of(engine.device, config.num_threads)
    if memory is not None:
        room = read_bytes(memory, "--memory")
    else:
        room = limits.memory_bytes if engine.device is not None else free_memory_bytes()
    process = measure_process(str(path)) if engine.device is None and model.checkpoint is not None else 0
    memory_plan = plan_memory(model, config, process_bytes=process)
    predictor = Predictor.for_model(model, config, limits, rates)
    length = min(context, model.config.max_position)
    chosen = {} if formats is None else {"formats": [name.strip() for name in formats.split(",")]}
    others = alternatives(
        model, config, limits, rates, memory_bytes=room, context=length, process_bytes=process, **chosen
    )
    tokens = memory_plan.tokens_in(room)
    document: dict[str, Any] = {
        "model": config.model,
        "machine": limits.name,
        "memory_bytes": room,
        "context": length,
        "plan": asdict(memory_plan) | {"total_bytes": memory_plan.total_bytes},
        "fits": memory_plan.total_bytes <= room,
        "num_tokens_that_fit": tokens,
        "num_sequences_that_fit": tokens // length,
        "kv_bytes_per_token": {d: CacheLayout.bytes_per_token(model.config, d) for d in KV_ALTERNATIVES},
        "is_bound": rates is None,
        "ttft_s": predictor.prefill_s(length),
        "decode_tok_s": 1 / predictor.decode_s(1, length),
        "decode_batch": {
            str(b): b / predictor.decode_s(b, length) for b in (4, 16, 64) if b * length <= tokens
        },
        "formats": [asdict(other) for other in others],
    }
    if measure:
        peak = measure_peak(str(path), _options(config))
        document["measured_peak_bytes"] = peak
        document["error"] = memory_plan.total_bytes / peak - 1
    if json:
        print_json(document)
    else:
        sys.stdout.write("\n".join(_lines(document)) + "\n")


def _options(config: EngineConfig) -> dict[str, Any]:
    """Flat, and only what was set."""
    default = EngineConfig(model=config.model).flat()
    return {name: value for name, value in config.flat().items() if value != default[name]}


def _lines(document: Mapping[str, Any]) -> list[str]:
    plan, context = document["plan"], document["context"]
    word = "at most" if document["is_bound"] else "about"
    lines = [
        f"{document['model']} on {document['machine']}, {show_bytes(document['memory_bytes'])} of memory",
        "",
    ]
    parts = (
        ("weights", plan["weight_bytes"]),
        (
            f"KV cache, {plan['num_cache_tokens']:,} tokens of {plan['cache_token_bytes']:,} bytes",
            plan["cache_bytes"],
        ),
        ("activations and scratch", plan["activation_bytes"]),
        ("Python, engine and tokenizer", plan["process_bytes"]),
        ("peak with these settings", plan["total_bytes"]),
    )
    lines += [f"  {name:<52}{show_bytes(value):>14}" for name, value in parts if value]
    if "measured_peak_bytes" in document:
        measured = f"{show_bytes(document['measured_peak_bytes']):>14}"
        lines.append(f"  {'measured':<52}{measured}   plan {document['error']:+.1%}")
    fits = "fits" if document["fits"] else "DOES NOT FIT"
    lines += [
        f"  {fits}; the memory would hold {document['num_tokens_that_fit']:,} tokens: "
        f"{document['num_sequences_that_fit']:,} sequences of {context:,}",
        "  KV bytes per token: "
        + ", ".join(f"{name} {size:,}" for name, size in document["kv_bytes_per_token"].items()),
        "",
        f"  one sequence of {context:,}: TTFT {word} {1e3 * document['ttft_s']:,.1f} ms, "
        f"then {word} {document['decode_tok_s']:,.1f} tok/s",
    ]
    lines += [
        f"  {b} sequences: {word} {rate:,.0f} tok/s together" for b, rate in document["decode_batch"].items()
    ]
    lines += [
        "",
        f"  {'all matrices as':<18}{'weights':>12}{'tokens that fit':>18}{'TTFT':>12}{'decode':>14}",
    ]
    lines += [_format_line(other) for other in document["formats"]]
    return lines


def _format_line(other: Mapping[str, Any]) -> str:
    return (
        f"  {other['format']:<18}{show_bytes(other['weight_bytes']):>12}{other['num_tokens']:>18,}"
        f"{1e3 * other['prefill_s']:>9,.1f} ms{other['decode_tok_s']:>8,.1f} tok/s"
    )
