"""`ridgeline plan`: what fits in memory and how fast it should be, from headers alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ridgeline.cli.options import DescribedConfig, print_json
from ridgeline.cli.roofline import link_of, machine_of
from ridgeline.cli.terminal import read_bytes, show_bytes
from ridgeline.config import EngineConfig
from ridgeline.engine.memory import free_memory_bytes
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.ops.program import StepShape
from ridgeline.profiling.links import SHARED_MEMORY
from ridgeline.profiling.parallel import ParallelPredictor
from ridgeline.profiling.plan import (
    KV_ALTERNATIVES,
    MemoryPlan,
    alternatives,
    measure_peak,
    measure_process,
    measure_rank_peaks,
    measure_rank_process,
    plan_memory,
    plan_ranks,
    tokens_in,
)
from ridgeline.profiling.roofline import Predictor


def plan(
    *,
    engine: DescribedConfig,
    memory: str | None = None,
    context: int = 1024,
    formats: str | None = None,
    link: str | None = None,
    measure: bool = False,
    json: bool = False,
) -> None:
    """Weights, KV cache, activations; how many tokens and sequences fit; TTFT and tokens a second.

    A config.json or the header of a GGUF file is enough: nothing is loaded. With --tp and --pp: what each
    rank holds, and how many bytes it exchanges for a token.

    Examples:

        ridgeline plan -m smollm2

        ridgeline plan -m ./config.json --memory 16GiB --context 4096

        ridgeline plan -m model.gguf --device h100

        ridgeline plan -m smollm2 --max-num-seqs 16 --max-model-len 2048 --measure

        ridgeline plan -m ./config.json --device h100 --tp 4 --pp 2 --link ethernet100

    Parameters
    ----------
    memory
        Memory that the engine may use, such as 16GiB; what is free here, or the device's, if left out.
    context
        Tokens of a sequence, for what fits and for the speeds.
    formats
        Weight formats to compare, with commas between; all common ones if left out.
    link
        Between ranks, by its data sheet, such as nvlink or ethernet10; left out: shared memory on this
        machine, as measured, or what the device usually has.
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
    is_here = engine.device is None
    predictor: Predictor | ParallelPredictor
    if config.parallel.world_size > 1:
        process = measure_rank_process() if is_here else 0
        between = link_of(link, engine.device, config.parallel.tp_size)
        plans = plan_ranks(model, config, process_bytes=process)
        predictor = ParallelPredictor(model, config, limits, rates, between)
        together = between.name == SHARED_MEMORY
    else:
        process = measure_process(str(path)) if is_here and model.checkpoint is not None else 0
        between = None
        plans = [plan_memory(model, config, process_bytes=process)]
        predictor = Predictor.for_model(model, config, limits, rates)
        together = True
    memory_plan = max(plans, key=lambda p: p.total_bytes)
    length = min(context, model.config.max_position)
    chosen = {} if formats is None else {"formats": [name.strip() for name in formats.split(",")]}
    others = alternatives(
        model,
        config,
        limits,
        rates,
        memory_bytes=room,
        context=length,
        process_bytes=process,
        link=between,
        **chosen,
    )
    tokens = tokens_in(plans, room, together=together)
    needed = sum(p.total_bytes for p in plans) if together else memory_plan.total_bytes
    document: dict[str, Any] = {
        "model": config.model,
        "machine": limits.name,
        "memory_bytes": room,
        "context": length,
        "plan": asdict(memory_plan) | {"total_bytes": memory_plan.total_bytes},
        "fits": needed <= room,
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
    if isinstance(predictor, ParallelPredictor):
        document |= {"link": asdict(predictor.link), "ranks": _ranks(predictor, plans, length)}
    if measure and isinstance(predictor, ParallelPredictor):
        peaks = measure_rank_peaks(str(path), _options(config))
        for rank, peak in zip(document["ranks"], peaks, strict=True):
            rank |= {"measured_peak_bytes": peak, "error": rank["total_bytes"] / peak - 1}
    elif measure:
        peak = measure_peak(str(path), _options(config))
        document["measured_peak_bytes"] = peak
        document["error"] = memory_plan.total_bytes / peak - 1
    if json:
        print_json(document)
    else:
        sys.stdout.write("\n".join(_lines(document)) + "\n")


def _ranks(predictor: ParallelPredictor, plans: Sequence[MemoryPlan], context: int) -> list[dict[str, Any]]:
    """What each rank holds, and exchanges for a token that it decodes."""
    exchanged = predictor.communication_bytes(StepShape.decode(1, context))
    found = []
    for number, (rank, plan_) in enumerate(zip(predictor.ranks, plans, strict=True)):
        layers, config = rank.shard.shard.layers if rank.shard.shard else range(0), rank.shard.config
        found.append(
            {
                "rank": number,
                "tp_rank": rank.place.tp_rank,
                "pp_rank": rank.place.pp_rank,
                "layers": [layers.start, layers.stop],
                "num_heads": config.num_heads,
                "num_kv_heads": config.num_kv_heads,
                "intermediate_size": config.intermediate_size,
                **asdict(plan_),
                "total_bytes": plan_.total_bytes,
                "communication_bytes_per_token": exchanged[number],
            }
        )
    return found


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
    if "ranks" in document:
        lines += ["", *_rank_lines(document), ""]
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
        f"  {'all matrices as':<18}{'weights':>12}{'tokens that fit':>18}{'TTFT':>12}{'decode':>16}",
    ]
    lines += [_format_line(other) for other in document["formats"]]
    return lines


def _rank_lines(document: Mapping[str, Any]) -> list[str]:
    link = document["link"]
    lines = [
        f"  {len(document['ranks'])} ranks over {link['name']} ({1e6 * link['latency_s']:.1f} us, "
        f"{link['gb_s']:.4g} GB/s); above is the largest of them",
        f"  {'rank':<6}{'layers':>9}{'heads':>8}{'MLP':>8}{'weights':>12}{'KV cache':>12}{'peak':>12}"
        f"{'exchanged per token':>22}",
    ]
    for rank in document["ranks"]:
        start, stop = rank["layers"]
        layers, heads = f"{start}-{stop - 1}", f"{rank['num_heads']}/{rank['num_kv_heads']}"
        parts = "".join(
            f"{show_bytes(rank[key]):>12}" for key in ("weight_bytes", "cache_bytes", "total_bytes")
        )
        measured = ""
        if "measured_peak_bytes" in rank:
            measured = f"   measured {show_bytes(rank['measured_peak_bytes'])}, plan {rank['error']:+.1%}"
        lines.append(
            f"  {rank['rank']:<6}{layers:>9}{heads:>8}{rank['intermediate_size']:>8}{parts}"
            f"{rank['communication_bytes_per_token']:>16,} bytes{measured}"
        )
    return lines


def _format_line(other: Mapping[str, Any]) -> str:
    return (
        f"  {other['format']:<18}{show_bytes(other['weight_bytes']):>12}{other['num_tokens']:>18,}"
        f"{1e3 * other['prefill_s']:>9,.1f} ms{other['decode_tok_s']:>10,.1f} tok/s"
    )
