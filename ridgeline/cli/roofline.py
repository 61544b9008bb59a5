"""`ridgeline roofline`: what each op must move and compute, what that takes here, and what it took."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ridgeline.cli.options import DescribedConfig, print_json
from ridgeline.cli.terminal import say
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel, describe_model
from ridgeline.models.locate import locate_model
from ridgeline.ops.program import StepShape
from ridgeline.profiling.links import DEFAULT_LINKS, Link, describe_link, measure_link
from ridgeline.profiling.machine import MachineLimits, describe_device, machine_limits
from ridgeline.profiling.measured import measure_decode, measure_ops, measure_prefill
from ridgeline.profiling.parallel import ParallelPredictor
from ridgeline.profiling.rates import KernelRates
from ridgeline.profiling.roofline import OpEstimate, Predictor

GRID_PROMPTS = (32, 128, 512)
GRID_BATCHES = (1, 4, 16)
DECODE_SECONDS, MIN_ANSWERS = 2.0, 3
ROUNDS = 3
"""of rates and model in turn: the memory of a shared machine is not as fast from one minute to the next"""
PLOT_COLUMNS, PLOT_ROWS = 64, 16
Grid = dict[str, list[dict[str, Any]]]
"""TTFT by prompt and TPOT by batch: sizes, predicted_s, measured_s"""


def roofline(
    *,
    engine: DescribedConfig,
    prompt_len: int = 512,
    context: int = 128,
    batch_size: int = 1,
    link: str | None = None,
    measure: bool = False,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Bytes, FLOPs, bound and predicted time of every op of a prefill and of a decode step; TTFT and TPOT.

    The bound is the machine's: nothing can be faster. The prediction puts the rates together that our kernels
    reach on generic shapes; --measure runs the model and shows how far off it is. The rates are then taken
    anew, in turn with the model, and medians compared.

    Examples:

        ridgeline roofline -m smollm2

        ridgeline roofline -m smollm2 --measure --plot roofline.svg

        ridgeline roofline -m smollm2 --batch-size 16 --context 1024

        ridgeline roofline -m model.gguf --device h100

        ridgeline roofline -m smollm2 --tp 2

        ridgeline roofline -m model.gguf --device h100 --tp 8 --link nvlink

    Parameters
    ----------
    prompt_len
        Tokens of the prefill.
    context
        Tokens in the cache of each decoding sequence.
    batch_size
        Sequences that decode together.
    link
        Between ranks, with --tp or --pp, by its data sheet, such as nvlink or ethernet10; left out: shared
        memory on this machine, as measured, or what the device usually has.
    measure
        Load the model, run it, and show the measured times and the errors of the predictions.
    plot
        Write the roofline plot here: .png or .svg.
    json
        End with one JSON document.
    """
    for flag, value in (("--prompt-len", prompt_len), ("--context", context), ("--batch-size", batch_size)):
        if value < 1:
            raise ConfigError(f"{flag} {value}: expected at least 1")
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {plot}: expected a name that ends in .png or .svg")
    if measure and engine.device is not None:
        raise ConfigError(f"--measure with --device {engine.device}: only this machine can be measured")
    prompts = sorted({*GRID_PROMPTS, prompt_len})
    batches = sorted({*GRID_BATCHES, batch_size})
    config = engine.runnable
    most = max(prompts[-1] + 1, context + 32)
    if config.max_model_len is None:
        tokens = batches[-1] * (context + 64) + 2 * most
        config = config.with_options(max_model_len=most, kv_cache_tokens=tokens)
    config = config.with_options(max_num_seqs=max(batches[-1], config.scheduler.max_num_seqs))
    model = describe_model(locate_model(config.model), config.load)
    limits, rates = machine_of(engine.device, config.num_threads, refresh=measure)
    between = None
    if config.parallel.world_size > 1:
        between = link_of(link, engine.device, config.parallel.tp_size)
    predictor = _predictor(model, config, limits, rates, between)
    shapes = {
        f"prefill of {prompt_len} tokens": StepShape.prefill(prompt_len),
        f"decode of {batch_size} at context {context}": StepShape.decode(batch_size, context),
    }
    llm = LLMEngine.from_config(config) if measure else None
    try:
        ops = {}
        for name, shape in shapes.items():
            if isinstance(predictor, ParallelPredictor):
                slowest = predictor.slowest_rank(shape)
                ops[f"{name}, rank {slowest}"] = _ops(predictor.predictors[slowest], None, shape)
            else:
                ops[name] = _ops(predictor, llm, shape)
        grids = [_grid(predictor, llm, prompts, batches, context)]
        for _ in range(ROUNDS - 1 if measure else 0):
            rates = KernelRates(
                limits, refresh=True, progress=lambda line: say(f"measuring {line} again ...")
            )
            predictor = _predictor(model, config, limits, rates, between)
            grids.append(_grid(predictor, llm, prompts, batches, context))
        grid = _medians(grids)
    finally:
        if llm is not None:
            llm.close()
    if plot is not None:
        draw(ops, limits, plot)
        say(f"plot written to {plot}")
    if json:
        document = {"limits": asdict(limits), "model": config.model, "ops": ops, "grid": grid}
        print_json(document | ({} if between is None else {"link": asdict(between)}))
        return
    head = f"{limits.name}, {limits.isa}; {limits.dram_gb_s:.1f} GB/s of memory"
    lines = [f"{head}, ridge at {limits.fp32_ridge:.1f} FLOPs per byte", ""]
    if between is not None:
        ranks = f"tp {config.parallel.tp_size} x pp {config.parallel.pp_size}"
        rate = f"{1e6 * between.latency_s:.1f} us, {between.gb_s:.4g} GB/s"
        lines[1:] = [f"{ranks} over {between.name}: {rate}; the ops are those of the slowest rank", ""]
    for name, rows in ops.items():
        lines += [*_table(name, rows), ""]
    lines += [*terminal_plot([row for rows in ops.values() for row in rows], limits), "", *_grid_lines(grid)]
    sys.stdout.write("\n".join(lines) + "\n")


def _predictor(
    model: LoadedModel,
    config: EngineConfig,
    limits: MachineLimits,
    rates: KernelRates | None,
    link: Link | None,
) -> Predictor | ParallelPredictor:
    if link is None:
        return Predictor.for_model(model, config, limits, rates)
    return ParallelPredictor(model, config, limits, rates, link)


def machine_of(
    device: str | None, num_threads: int | None, *, refresh: bool = False
) -> tuple[MachineLimits, KernelRates | None]:
    """Limits and rates of this machine; without rates its GPU ("cuda"), or the data sheet of a described one.

    refresh: measure both now, for a prediction that is compared with a measurement.
    """
    if device == "cuda":
        from ridgeline.profiling.cuda import measure_cuda

        return measure_cuda(), None
    if device is not None:
        return describe_device(device), None
    limits = machine_limits(
        num_threads=num_threads, refresh=refresh, progress=lambda line: say(f"measuring {line} ...")
    )
    return limits, KernelRates(limits, refresh=refresh, progress=lambda line: say(f"measuring {line} ..."))


def link_of(name: str | None, device: str | None, tp_size: int) -> Link:
    """The link between ranks: named, or usual for the device, or the shared memory of this machine."""
    if name is not None:
        return describe_link(name)
    if device is not None:
        return describe_link(DEFAULT_LINKS.get(device.lower(), "pcie4"))
    say("measuring sums in shared memory ...")
    return measure_link(tp_size)


def _ops(predictor: Predictor, llm: LLMEngine | None, shape: StepShape) -> list[dict[str, Any]]:
    measured = measure_ops(llm, shape) if llm is not None else {}
    return [_row(estimate, measured.get(estimate.name)) for estimate in predictor.estimates(shape)]


def _row(estimate: OpEstimate, measured_s: float | None) -> dict[str, Any]:
    return asdict(estimate) | {"intensity": estimate.intensity, "measured_s": measured_s}


def _grid(
    predictor: Predictor | ParallelPredictor,
    llm: LLMEngine | None,
    prompts: Sequence[int],
    batches: Sequence[int],
    context: int,
) -> Grid:
    """Predicted and, with a model, measured seconds; each prediction takes its rates just before."""
    return {
        "ttft": [
            {
                "prompt_len": n,
                "predicted_s": predictor.prefill_s(n),
                "measured_s": None if llm is None else measure_prefill(llm, n),
            }
            for n in prompts
        ],
        "tpot": [
            {
                "batch_size": b,
                "predicted_s": predictor.decode_s(b, context),
                "measured_s": None if llm is None else _decode_s(llm, b, context),
            }
            for b in batches
        ],
    }


def _decode_s(llm: LLMEngine, batch: int, context: int) -> float:
    """Median of several answers: one of a small model is over within 0.1 s, which a neighbour can fill."""
    times: list[float] = []
    end = time.perf_counter() + DECODE_SECONDS
    while len(times) < MIN_ANSWERS or time.perf_counter() < end:
        times.append(measure_decode(llm, batch, context))
    return statistics.median(times)


def _medians(grids: Sequence[Grid]) -> Grid:
    """Of every figure the round whose error is the median one: drift is between rounds, a round is short."""

    def middle(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if entries[0]["measured_s"] is None:
            return {**entries[0], "error": None}
        judged = [{**e, "error": e["predicted_s"] / e["measured_s"] - 1} for e in entries]
        return sorted(judged, key=lambda e: float(e["error"]))[len(judged) // 2]

    return {
        name: [middle(entries) for entries in zip(*(grid[name] for grid in grids), strict=True)]
        for name in grids[0]
    }


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    times = f"{'bound':>9}{'predicted':>11}{'measured':>10}   [ms]"
    lines = [f"{name:<46}{'count':>6}{'MB':>9}{'GFLOP':>8}{'FLOP/B':>8}  {'limit':<8}{times}"]
    totals = {"bound_s": 0.0, "predicted_s": 0.0, "measured_s": 0.0}
    for row in rows:
        times = "".join(
            f"{'-' if row[key] is None else format(1e3 * row[key], '.3f'):>{width}}"
            for key, width in (("bound_s", 9), ("predicted_s", 11), ("measured_s", 10))
        )
        for key in totals:
            totals[key] += row[key] or 0.0
        limit = "compute" if row["is_compute_bound"] else "memory"
        lines.append(
            f"  {row['name']:<44}{row['count']:>6}{row['num_bytes'] / 1e6:>9.2f}{row['flops'] / 1e9:>8.2f}"
            f"{row['intensity']:>8.1f}  {limit:<8}{times}"
        )
    shown = [f"{1e3 * value:.3f}" if value else "-" for value in totals.values()]
    lines.append(f"  {'all ops':<83}{shown[0]:>9}{shown[1]:>11}{shown[2]:>10}")
    return lines


def _grid_lines(grid: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = []
    for name, size, unit in (("ttft", "prompt_len", "prompt"), ("tpot", "batch_size", "batch")):
        lines.append(f"{name.upper():<8}{unit:>8}{'predicted':>14}{'measured':>12}{'error':>9}")
        for entry in grid[name]:
            measured = "-" if entry["measured_s"] is None else f"{1e3 * entry['measured_s']:.2f} ms"
            error = "-" if entry["error"] is None else f"{entry['error']:+.1%}"
            lines.append(
                f"{'':8}{entry[size]:>8}{1e3 * entry['predicted_s']:>11.2f} ms{measured:>12}{error:>9}"
            )
    return lines


def _points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """(FLOPs per byte, GFLOP/s, name) of the ops that compute, measured where that is known."""
    return [
        (row["intensity"], row["flops"] / seconds / 1e9, row["name"])
        for row in rows
        if row["flops"] and (seconds := row["measured_s"] or row["predicted_s"] or row["bound_s"])
    ]


def terminal_plot(rows: Sequence[Mapping[str, Any]], limits: MachineLimits) -> list[str]:
    """GFLOP/s over FLOPs per byte, both logarithmic: the roof as lines, ops as letters."""
    points = _points(rows)
    low_x, high_x = -2.0, 10.0
    roof = limits.int8_gop_s
    high_y, low_y = math.log2(roof) + 0.5, math.log2(limits.dram_gb_s * 2**low_x)
    canvas = [[" "] * PLOT_COLUMNS for _ in range(PLOT_ROWS)]

    def put(x: float, y: float, mark: str) -> None:
        column = round((x - low_x) / (high_x - low_x) * (PLOT_COLUMNS - 1))
        row = round((high_y - y) / (high_y - low_y) * (PLOT_ROWS - 1))
        if (
            0 <= column < PLOT_COLUMNS
            and 0 <= row < PLOT_ROWS
            and (mark != "·" or canvas[row][column] == " ")
        ):
            canvas[row][column] = mark

    for column in range(PLOT_COLUMNS):
        x = low_x + column / (PLOT_COLUMNS - 1) * (high_x - low_x)
        for peak in (limits.fp32_gflop_s, roof):
            put(x, min(math.log2(limits.dram_gb_s) + x, math.log2(peak)), "·")
    legend = []
    for i, (x, y, name) in enumerate(points):
        mark = chr(ord("a") + i % 26)
        put(math.log2(x), math.log2(max(y, 1e-3)), mark)
        legend.append(f"  {mark}  {name}: {y:,.0f} GFLOP/s at {x:.1f} FLOPs per byte")
    axis = f"{2**low_x:g} FLOPs per byte".ljust(PLOT_COLUMNS - 6) + f"{2**high_x:g}"
    lines = [f"GFLOP/s: the roofs are {limits.fp32_gflop_s:,.0f} (float32) and {roof:,.0f} (int8)"]
    return [
        *lines,
        *("|" + "".join(row).rstrip() for row in canvas),
        "+" + "-" * PLOT_COLUMNS,
        " " + axis,
        *legend,
    ]


def draw(ops: Mapping[str, Sequence[Mapping[str, Any]]], limits: MachineLimits, path: Path) -> None:
    """The same as a PNG or SVG file. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('--plot needs matplotlib: pip install "ridgeline[plot]"') from None
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    intensities = [2.0**x for x in range(-3, 12)]
    for peak, title in ((limits.fp32_gflop_s, "float32"), (limits.int8_gop_s, "int8")):
        roof = [min(limits.dram_gb_s * x, peak) for x in intensities]
        axes.plot(intensities, roof, color="0.4", linewidth=1.2)
        axes.annotate(f"{title} {peak:,.0f}", (intensities[-1], peak), ha="right", va="bottom", color="0.3")
    for (name, rows), marker in zip(ops.items(), "os", strict=False):
        points = _points(rows)
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], marker=marker, label=name)
        for i, (x, y, title) in enumerate(points):
            side = 4 if i % 2 else -4
            axes.annotate(
                title,
                (x, y),
                fontsize=6,
                ha="left" if side > 0 else "right",
                xytext=(side, 6 - 5 * i),
                textcoords="offset points",
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOP/s")
    axes.set_title(f"{limits.name}: {limits.dram_gb_s:.0f} GB/s")
    axes.legend(loc="lower right")
    figure.savefig(path)
