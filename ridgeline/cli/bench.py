"""`ridgeline bench`: speed, with how sure it is. Each measurement is one result document.

The measuring is in `ridgeline.bench`; here are flags, a progress bar, the table and the file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from ridgeline.bench.compare import Comparison
from ridgeline.bench.compare import compare as compare_documents
from ridgeline.bench.latency import LatencyOptions, measure_latency
from ridgeline.bench.load import Progress as LoadProgress
from ridgeline.bench.repeat import RepeatOptions
from ridgeline.bench.result import MIN_FOR_PERCENTILE, load_document, save_document
from ridgeline.bench.serve import ServeOptions, measure_serve
from ridgeline.bench.serve_report import summary as serve_summary
from ridgeline.bench.startup import measure_startup
from ridgeline.bench.sweep import sweep, sweep_summary
from ridgeline.bench.throughput import WorkloadOptions, measure_throughput
from ridgeline.cli.options import make_app, print_json
from ridgeline.cli.terminal import progress_bar
from ridgeline.config import EngineConfig

for _group in (LatencyOptions, RepeatOptions, WorkloadOptions, ServeOptions):
    Parameter(name="*")(_group)

bench = make_app(
    name="bench",
    help="""Measure an engine and believe the figure: every sample, intervals and the environment in one file.

    Examples of use:

        ridgeline bench latency -m smollm2 --save-result a.json

        ridgeline bench throughput -m smollm2 --workload w3 --max-num-seqs 16

        ridgeline bench serve --port 8000 --workload w5

        ridgeline bench startup -m smollm2

        ridgeline bench compare a.json b.json
    """,
)


@bench.command
def latency(
    *,
    engine: EngineConfig,
    batch: LatencyOptions = LatencyOptions(),
    repeats: RepeatOptions = RepeatOptions(),
    save_result: Path | None = None,
    json: bool = False,
) -> None:
    """Prefill and decode speed, TTFT, TPOT and E2EL of one batch at a time.

    Examples:

        ridgeline bench latency -m smollm2

        ridgeline bench latency -m model.gguf --input-len 2048 --output-len 2 --num-threads 2

        ridgeline bench latency -m smollm2 --batch-size 8 --json | tail -1 | jq .metrics.decode_tok_s.median

    Parameters
    ----------
    save_result
        Write the result document to this file.
    json
        End with the result document.
    """
    with progress_bar("latency") as progress:
        document = measure_latency(engine, batch, repeats, progress=progress)
    _end(document, save_result, json=json)


@bench.command
def throughput(
    *,
    engine: EngineConfig,
    load: WorkloadOptions = WorkloadOptions(),
    repeats: RepeatOptions = RepeatOptions(num_iters=5, num_iters_warmup=1),
    save_result: Path | None = None,
    json: bool = False,
) -> None:
    """A workload through the engine in this process: requests and tokens a second, and latencies.

    Examples:

        ridgeline bench throughput -m smollm2 --workload w3 --max-num-seqs 16

        ridgeline bench throughput -m smollm2 --num-prompts 64 --input-len 256 --output-len 32

        ridgeline bench throughput -m smollm2 --workload trace.jsonl --json | tail -1

    Parameters
    ----------
    save_result
        Write the result document to this file.
    json
        End with the result document.
    """
    with progress_bar("throughput") as progress:
        document = measure_throughput(engine, load.chosen(), repeats, progress=progress)
    _end(document, save_result, json=json)


@bench.command
def startup(
    *,
    engine: EngineConfig,
    repeats: RepeatOptions = RepeatOptions(num_iters=10, num_iters_warmup=1, max_time=30),
    save_result: Path | None = None,
    json: bool = False,
) -> None:
    """Fresh processes: seconds to import, to load and to the first token, and peak memory.

    Examples:

        ridgeline bench startup -m smollm2

        ridgeline bench startup -m smollm2 --packed-cache --num-iters 10

    Parameters
    ----------
    save_result
        Write the result document to this file.
    json
        End with the result document.
    """
    with progress_bar("startup") as progress:
        document = measure_startup(engine, repeats, progress=progress)
    _end(document, save_result, json=json)


@bench.command
def serve(
    *,
    load: ServeOptions = ServeOptions(),
    slo: str | None = None,
    save_result: Path | None = None,
    json: bool = False,
) -> None:
    """Any OpenAI-compatible server under load: throughput, TTFT, TPOT, ITL, E2EL and goodput.

    Examples:

        ridgeline bench serve --port 8000 --workload w3

        ridgeline bench serve --base-url http://127.0.0.1:8080 --request-rate 2 --num-prompts 60

        ridgeline bench serve --workload w5 --goodput ttft:500 --goodput tpot:50 --json | tail -1

        ridgeline bench serve --slo p95_ttft_ms=500,p95_tpot_ms=50

    Parameters
    ----------
    slo
        Find the highest request rate that keeps these limits, by doubling and bisection; it starts at
        --request-rate. Names are mean, median, p50, p95 or p99 of ttft_ms, tpot_ms, itl_ms or e2el_ms, or
        goodput_share.
    save_result
        Write the result document to this file.
    json
        End with the result document.
    """
    with progress_bar("serve") as progress:

        def at_rate(rate: float | None) -> LoadProgress:
            place = "" if rate is None else f"{rate:.3g} requests/s, "
            return lambda done, total, seconds: progress(done, total, f"{place}{seconds:.0f} s")

        if slo is None:
            document = measure_serve(load, progress=at_rate(None))
        else:
            document = sweep(load, slo=slo, progress=at_rate)
    table = (serve_summary if slo is None else sweep_summary)(document) + "\n"
    _end(document, save_result, json=json, table=table)


@bench.command
def compare(a: Path, b: Path, *, json: bool = False) -> None:
    """Which differences of result B to result A are real, and what differs beside the figures.

    Examples:

        ridgeline bench compare before.json after.json

        ridgeline bench compare before.json after.json --json | tail -1 | jq '.metrics[] | .verdict'

    Parameters
    ----------
    a
        A file that bench wrote.
    b
        Another, of the same kind.
    json
        End with the comparison as JSON.
    """
    found = compare_documents(load_document(a), load_document(b))
    if json:
        print_json(found.document())
    else:
        sys.stdout.write(comparison_table(found))


def _end(document: Mapping[str, Any], path: Path | None, *, json: bool, table: str | None = None) -> None:
    """Save it, then show it: as JSON, or as `table`."""
    if path is not None:
        save_document(document, path)
        sys.stderr.write(f"result written to {path}\n")
    if json:
        print_json(dict(document))
    else:
        sys.stdout.write(table or result_table(document))


def result_table(document: Mapping[str, Any]) -> str:
    """The figures for people; a dash where samples are too few, and how many are missing below."""
    rows = [("metric", "unit", "n", "mean", "median", "95 % interval", "±", "P95", "P99")]
    for name, metric in document["metrics"].items():
        interval, median = metric["ci95"], metric["median"]
        rows.append(
            (
                name,
                metric["unit"],
                str(metric["n"]),
                *(_number(metric[key]) for key in ("mean", "median")),
                "-" if interval is None else f"{_number(interval[0])} to {_number(interval[1])}",
                f"{(interval[1] - interval[0]) / 2 / abs(median):.1%}" if interval and median else "-",
                *(_number(metric[key]) for key in ("p95", "p99")),
            )
        )
    lines = [*_aligned(rows), ""]
    details = document["details"]
    if "stopped" in details:
        why = (
            "every interval is within 5 % of its median"
            if details["stopped"] == "precise"
            else "the time is over and not every interval is within 5 % of its median; give more --max-time"
        )
        lines.append(f"{details['num_iters']} iterations after {details['num_warmups']} warm-ups: {why}")
    lines += _missing(document["metrics"])
    if details.get("dram_share") is not None:
        lines.append(
            f"decode reads weights at {details['dram_share']:.0%} of the bandwidth of this machine's memory"
        )
    lines += [f"warning: {text}" for text in details.get("warnings", ())]
    return "\n".join(lines) + "\n"


def _missing(metrics: Mapping[str, Any]) -> list[str]:
    """One line a percentile that some metric lacks samples for."""
    lines = []
    for figure, needed in MIN_FOR_PERCENTILE.items():
        short = {name: m["missing"][figure] for name, m in metrics.items() if figure in m["missing"]}
        if short:
            names = ", ".join(f"{name} {count}" for name, count in short.items())
            lines.append(f"{figure.upper()} needs {needed} samples; missing: {names}")
    return lines


def comparison_table(found: Comparison) -> str:
    """B against A for people."""
    rows = [("metric", "unit", "A", "B", "B / A", "95 % interval", "p (Holm)", "verdict")]
    for m in found.metrics:
        rows.append(
            (
                m.name,
                m.unit,
                _number(m.median_a),
                _number(m.median_b),
                "-" if m.ratio is None else f"{m.ratio:.3f}",
                "-" if m.low is None or m.high is None else f"{m.low:.3f} to {m.high:.3f}",
                "-" if m.p_value is None else f"{m.p_value:.3f}",
                m.verdict,
            )
        )
    lines = _aligned(rows)
    if found.interleaved:
        lines += ["", "measured in turns: intervals without the drift that both saw"]
    if found.changed:
        lines += ["", "warning: the two were not measured alike"]
        lines += [f"  {change.name}: {change.a} -> {change.b}" for change in found.changed]
    if found.missing:
        lines += ["", f"in one result only: {', '.join(found.missing)}"]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    """Four digits that count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names and units to the left, the rest to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
