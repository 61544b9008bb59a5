"""A ladder's result document as tables, a page and a report, which can so be made again without measuring.

Everything is derived from the document that `Climb.document` makes; nothing here measures or decides.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ridgeline.ladder.charts import Bar, bar_chart
from ridgeline.ladder.rungs import AIMS

Row = Mapping[str, Any]

HEADERS = (
    "",
    "tok/s",
    "× before",
    "× first",
    "TTFT ms",
    "TPOT ms",
    "ITL P99 ms",
    "memory MiB",
    "KV MiB",
    "KL",
    "same tokens",
    "verdict",
)
REMOVAL_HEADERS = (
    "the top without",
    "tok/s",
    "the switch gives ×",
    "TTFT ms",
    "TPOT ms",
    "memory MiB",
    "KL",
    "verdict",
)

_STYLE = """
body { font-family: sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
body { color: #1f2937; background: white; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 3px 8px; border-bottom: 1px solid #e5e7eb; }
td:not(:first-child):not(:last-child) { text-align: right; } tr.loss td:last-child { color: #b3423a; }
tr.gain td:last-child { color: #2a7f62; } .wide { overflow-x: auto; } code { font-size: 12px; }
"""


def cells(step: Row) -> tuple[str, ...]:
    """One line of the climb, in the order of HEADERS."""
    name = step["rung"]["name"]
    m = step["measured"]
    if m is None:
        return (name, *[""] * (len(HEADERS) - 2), f"not run: {_one_line(step['reason'])}")
    return (
        name,
        _number(statistics.median(m["output_tok_s"])),
        _factor(step["speed_up"]),
        _factor(step["speed_up_total"]),
        _milliseconds(m["ttft_s"]),
        _milliseconds(m["tpot_s"]),
        _milliseconds(m["itl_p99_s"]),
        _mebibytes(m["peak_memory_bytes"]),
        _mebibytes(m["kv_cache_bytes"]),
        _divergence(m["kl_mean"]),
        _same(m),
        verdict_words(step),
    )


def removal_cells(step: Row) -> tuple[str, ...]:
    """One line of the removals, in the order of REMOVAL_HEADERS."""
    name = step["rung"]["name"]
    if step["also_gone"]:
        name += f" (and {', '.join(step['also_gone'])})"
    m = step["measured"]
    if m is None:
        return (name, *[""] * (len(REMOVAL_HEADERS) - 2), f"not run: {_one_line(step['reason'])}")
    return (
        name,
        _number(statistics.median(m["output_tok_s"])),
        _factor(step["speed_up"]),
        _milliseconds(m["ttft_s"]),
        _milliseconds(m["tpot_s"]),
        _mebibytes(m["peak_memory_bytes"]),
        _divergence(m["kl_mean"]),
        verdict_words(step),
    )


def verdict_words(step: Row) -> str:
    """The verdict, of what, and the price where the aim is not throughput."""
    verdict = step["verdict"]
    if verdict in ("start", "not run"):
        return str(verdict)
    aim = step["rung"]["aim"]
    words = {"gain": "gain", "none": "no difference", "loss": "LOSS"}[verdict]
    if aim == "output_tok_s":
        return words
    change = step["change"]
    words += f" in {AIMS[aim][0]}" + (f", × {change:.2f}" if change else "")
    if verdict == "gain" and (step["speed_up"] or 1.0) < 0.95:
        words += f", for {100 * (1 - step['speed_up']):.0f} % of tok/s"
    return words


def charts(document: Row) -> dict[str, str]:
    """The pictures by name, each an <svg> element."""
    steps = [step for step in document["details"]["steps"] if step["measured"] is not None]
    speed, fall, memory, quality = [], [], [], []
    top: float | None = None
    for step in steps:
        name, m, kind = step["rung"]["name"], step["measured"], step["verdict"]
        tok_s = statistics.median(m["output_tok_s"])
        speed.append(Bar(name, tok_s, f"{_number(tok_s)} tok/s", kind))
        fall.append(Bar(name, tok_s, _factor(step["speed_up"]) or "start", kind, low=top))
        if m["peak_memory_bytes"]:
            mebibytes = m["peak_memory_bytes"] / 2**20
            memory.append(Bar(name, mebibytes, f"{mebibytes:,.0f} MiB", kind))
        quality.append(Bar(name, m["kl_mean"], _divergence(m["kl_mean"]), kind))
        if kind != "loss":
            top = tok_s
    return {
        "speed": bar_chart("Output tokens a second (log axis)", speed, log=True),
        "waterfall": bar_chart("Each switch as a factor on those that stayed (log axis)", fall, log=True),
        "memory": bar_chart("Peak memory of the process while it serves", memory),
        "quality": bar_chart("Mean KL divergence from the first rung, nats per token", quality),
    }


def machine_words(document: Row) -> str:
    """Processor, cores, memory and versions in one sentence."""
    env = document["environment"]
    cpu = env["cpu"]
    memory = f"{env['memory_bytes'] / 2**30:.0f} GiB" if env["memory_bytes"] else "unknown memory"
    flags = ", ".join(cpu["flags"]) or "none that matter"
    return (
        f"{cpu['model']}, {env['threads']} threads on {cpu['cores']} cores ({flags}), {memory}; {env['os']}, "
        f"Python {env['python']}, torch {env['libraries'].get('torch') or 'not installed'}, "
        f"ridgeline {env['ridgeline']}; {document['created']}."
    )


def workload_words(document: Row) -> str:
    """The workload in one sentence."""
    w = document["workload"]
    shared = f", after {w['shared_prefix_len']} that are shared" if w["shared_prefix_len"] else ""
    arrive = "all at once" if w["arrivals"]["kind"] == "at_once" else f"by {_spec(w['arrivals'])}"
    running = w["max_concurrency"] or 16
    return (
        f"Workload {w['name']}: {w['num_requests']} requests that arrive {arrive}, prompts of "
        f"{_spec(w['prompt_lens'])} tokens of their own{shared}, answers of {_spec(w['output_lens'])} "
        f"tokens, greedy, at most {running} running; a cache for half of what {running} of the longest "
        "requests need. "
        f"Up to {document['settings']['repeats']} repeats with other words each."
    )


def _spec(spec: Row) -> str:
    values = {key: value for key, value in spec.items() if key != "kind"}
    if spec["kind"] == "fixed":
        return str(values["value"])
    if spec["kind"] == "uniform":
        return f"{values['low']} to {values['high']}"
    return f"{spec['kind']} ({', '.join(f'{k}={v}' for k, v in values.items() if not isinstance(v, list))})"


def notes(document: Row) -> tuple[str, ...]:
    """How the tables are to be read."""
    details = document["details"]
    return (
        "Each row is a fresh process with all switches of the rows before it that stayed. A switch that "
        f"makes worse, by {100 * details['margin']:.0f} % or more, what it is there for is a LOSS on this "
        "machine and is left out of the rows after it; smaller changes are called no difference. A loss "
        "counts only after a second measurement of it and of the row before.",
        "tok/s are output tokens over wall time, median of the repeats. TTFT counts from arrival, so it "
        "includes waiting for a seat. × before compares with the last row that stayed, × first with the "
        "first row. ITL P99 is over all gaps between two tokens of a request.",
        "Memory is the largest resident set of the whole process while it serves, Python and (until the "
        "native kernels) torch included.",
        f"KL is the mean KL(first row || this row) per token in nats over {details['window_tokens']} tokens "
        f"of text ({details['text']}); values below 1e-6 are rounding. Same tokens says how many requests "
        "have exactly the greedy tokens of the first row and, behind it, from which token of an answer on "
        "the first other one differs: random prompts have close calls, where rounding decides.",
        "All rungs start from the weights in the file. Where it is itself quantized (as smollm2: Q4_1) "
        "the first row computes with its dequantized values, and KL is what the arithmetic adds, not what "
        "that quantization cost.",
    )


def markdown(document: Row, *, picture: str) -> str:
    """The page of the docs; `picture` is the name of the SVG file beside it."""
    details = document["details"]
    model = document["settings"]["model"]
    lines = [
        f"# The ladder: {model}",
        "",
        "Generated by `ridgeline ladder --page`; do not edit. The command that measured:",
        "",
        f"    {command_words(document)}",
        "",
        machine_words(document),
        "",
        workload_words(document),
        "",
        f"![Output tokens a second, rung by rung]({picture})",
        "",
        *_markdown_table(HEADERS, [cells(step) for step in details["steps"]]),
        "",
        *(f"- {note}" for note in notes(document)),
        "",
        "## What each rung does",
        "",
        *(f"- **{s['rung']['name']}**: {s['rung']['summary']}" for s in details["steps"]),
    ]
    if details["removals"]:
        lines += [
            "",
            "## Each switch alone taken away from the top",
            "",
            f"The top is: {', '.join(details['top'])}. A switch that a later one replaces is not listed.",
            "",
            *_markdown_table(REMOVAL_HEADERS, [removal_cells(step) for step in details["removals"]]),
        ]
    return "\n".join(lines) + "\n"


def command_words(document: Row) -> str:
    """The command line, without the path of the interpreter."""
    arguments = [str(argument) for argument in document["command"]]
    return " ".join(["ridgeline", *arguments[1:]])


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    ruler = ["---", *["---:"] * (len(headers) - 2), "---"]
    return ["| " + " | ".join(line).replace("\n", " ") + " |" for line in (headers, ruler, *rows)]


def html(document: Row) -> str:
    """A report in one file, pictures included."""
    details = document["details"]
    title = f"The ladder: {document['settings']['model']}"

    def table(headers: Sequence[str], steps: Sequence[Row], make: Any) -> str:
        head = "".join(f"<th>{escape(h)}</th>" for h in headers)
        rows = "\n".join(
            f'<tr class="{step["verdict"].replace(" ", "-")}">'
            + "".join(f"<td>{escape(cell)}</td>" for cell in make(step))
            + "</tr>"
            for step in steps
        )
        return f'<div class="wide"><table><tr>{head}</tr>\n{rows}\n</table></div>'

    def entry(step: Row) -> str:
        changed = ", ".join(f"{k}={v!r}" for k, v in step["rung"]["options"].items())
        name, summary = escape(step["rung"]["name"]), escape(step["rung"]["summary"])
        return f"<li><b>{name}</b>: {summary}<br><code>{escape(changed)}</code></li>"

    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>",
        f"<p><code>{escape(command_words(document))}</code></p>",
        f"<p>{escape(machine_words(document))}</p><p>{escape(workload_words(document))}</p>",
        table(HEADERS, details["steps"], cells),
        *charts(document).values(),
        *(f"<p>{escape(note)}</p>" for note in notes(document)),
        "<h2>What each rung does</h2><ul>",
        *(entry(step) for step in details["steps"]),
        "</ul>",
    ]
    if details["removals"]:
        parts += [
            "<h2>Each switch alone taken away from the top</h2>",
            f"<p>The top is: {escape(', '.join(details['top']))}.</p>",
            table(REMOVAL_HEADERS, details["removals"], removal_cells),
        ]
    return "\n".join(parts) + "</html>\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _factor(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 20 else f"{value:.0f}"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{1000 * value:,.0f}" if value >= 0.01 else f"{1000 * value:.1f}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


def _divergence(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.1e}" if value < 1e-3 else f"{value:.4f}"


def _same(measured: Row) -> str:
    text = f"{measured['num_same_requests']}/{measured['num_requests']}"
    first = measured["first_difference"]
    return text if first is None else f"{text} (from {first + 1})"


def _one_line(reason: str) -> str:
    line = " ".join(str(reason).split())
    return line if len(line) <= 120 else line[:117] + "..."
