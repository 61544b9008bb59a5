"""Quality against size and speed over recipes: what is on the front, and what is best under a limit.

A result of kind "pareto" holds one row a recipe and calibration seed (`compress.card.row_document`). It is
written after every row, so that a run that was stopped goes on where it was. A recipe that was run with
several seeds is one point: the mean of its runs, since a single run is a lottery of several percent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ridgeline.bench.result import load_document
from ridgeline.compress.card import Row
from ridgeline.errors import ConfigError

PLOT_COLUMNS, PLOT_ROWS = 72, 20
HEADERS = (
    *("", "recipe", "bits", "linears", "MiB", "smaller", "perplexity", "change", "over seeds", "KL"),
    *("same top-1", "decode tok/s", "prefill tok/s", "made in"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One recipe: means over its seeds."""

    name: str
    num_bytes: float
    ratio: float
    """times smaller than float32"""
    bits: float
    linear_bits: float
    kl: float
    kl_error: float | None
    """of one run, over windows of the text; None: a single window"""
    perplexity: float
    change: float
    """of perplexity"""
    change_error: float | None
    changes: tuple[float, ...]
    """one a seed"""
    top1_agreement: float
    decode_tok_s: float | None
    prefill_tok_s: float | None
    seconds: float
    void: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the best recipe must keep. The fields are flags."""

    max_kl: float | None = None
    """At most this divergence from the float model; the best is then the smallest."""
    max_size: float | None = None
    """At most so many MiB of weights."""
    min_speed: float | None = None
    """At least so many tokens a second in decode."""

    def keeps(self, point: Point) -> bool:
        return (
            (self.max_kl is None or point.kl <= self.max_kl)
            and (self.max_size is None or point.num_bytes <= self.max_size * 2**20)
            and (
                self.min_speed is None
                or (point.decode_tok_s is not None and point.decode_tok_s >= self.min_speed)
            )
        )


def points_of(rows: Sequence[Row]) -> list[Point]:
    """One for each recipe, smallest first."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["name"], []).append(row)
    return sorted((_point(name, found) for name, found in runs.items()), key=lambda p: p.num_bytes)


def _point(name: str, runs: Sequence[Row]) -> Point:
    def mean(*keys: str) -> float:
        return statistics.fmean(_at(run, keys) for run in runs)

    def error(key: str) -> float | None:
        known = [run["quality"][key] for run in runs if run["quality"][key] is not None]
        return statistics.fmean(known) if known else None

    def speed(key: str) -> float | None:
        known = [run["speed"][key]["median"] for run in runs if key in run["speed"]]
        return statistics.fmean(known) if known else None

    return Point(
        name=name,
        num_bytes=mean("sizes", "num_bytes"),
        ratio=mean("sizes", "ratio"),
        bits=mean("sizes", "bits"),
        linear_bits=mean("sizes", "linear_bits"),
        kl=mean("quality", "kl_mean"),
        kl_error=error("kl_error"),
        perplexity=mean("quality", "perplexity"),
        change=mean("quality", "perplexity_change"),
        change_error=error("perplexity_change_error"),
        changes=tuple(run["quality"]["perplexity_change"] for run in runs),
        top1_agreement=mean("quality", "top1_agreement"),
        decode_tok_s=speed("decode_tok_s"),
        prefill_tok_s=speed("prefill_tok_s"),
        seconds=mean("seconds", "total"),
        void=runs[0]["void"],
    )


def _at(row: Row, keys: Sequence[str]) -> float:
    value: Any = row
    for key in keys:
        value = value[key]
    return float(value)


def front(points: Sequence[Point]) -> set[str]:
    """Names of those that none is both at most as large and closer to the float model; void ones are out."""
    valid = [p for p in points if p.void is None]
    return {
        p.name
        for p in valid
        if not any(
            (q.num_bytes, q.kl) != (p.num_bytes, p.kl) and q.num_bytes <= p.num_bytes and q.kl <= p.kl
            for q in valid
        )
    }


def best(points: Sequence[Point], limits: Limits) -> Point | None:
    """The smallest within the limits where the divergence is limited, else the closest; None: none is."""
    kept = [p for p in points if p.void is None and limits.keeps(p)]
    if limits.max_kl is not None:
        return min(kept, key=lambda p: (p.num_bytes, p.kl), default=None)
    return min(kept, key=lambda p: (p.kl, p.num_bytes), default=None)


def answer(points: Sequence[Point], limits: Limits) -> str:
    """One sentence: what is best under the limits, or what would be needed."""
    given = {name: value for name, value in asdict(limits).items() if value is not None}
    if not given:
        return f"On the front (*): {', '.join(p.name for p in points if p.name in front(points))}."
    words = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in given.items())
    chosen = best(points, limits)
    if chosen is None:
        return f"No recipe keeps {words}; loosen a limit, or try more --recipes."
    speed = "" if chosen.decode_tok_s is None else f", {chosen.decode_tok_s:,.0f} tok/s in decode"
    return (
        f"Best under {words}: {chosen.name} with KL {chosen.kl:.5f}, perplexity {chosen.change:+.2%}, "
        f"{chosen.num_bytes / 2**20:,.1f} MiB{speed}."
    )


def cells(point: Point, *, mark: str, on_front: bool) -> tuple[str, ...]:
    """One row under HEADERS."""

    def plus_minus(value: float, error: float | None, form: str, error_form: str) -> str:
        return form.format(value) + ("" if error is None else " ± " + error_form.format(error))

    spread = f"{min(point.changes):+.2%} to {max(point.changes):+.2%}" if len(point.changes) > 1 else ""
    return (
        mark + ("*" if on_front else ""),
        point.name + (" (void)" if point.void else ""),
        f"{point.bits:.2f}",
        f"{point.linear_bits:.2f}",
        f"{point.num_bytes / 2**20:,.1f}",
        f"× {point.ratio:.2f}",
        f"{point.perplexity:.3f}",
        plus_minus(point.change, point.change_error, "{:+.2%}", "{:.2%}"),
        spread,
        plus_minus(point.kl, point.kl_error, "{:.5f}", "{:.5f}"),
        f"{point.top1_agreement:.2%}",
        *("" if speed is None else f"{speed:,.0f}" for speed in (point.decode_tok_s, point.prefill_tok_s)),
        f"{point.seconds:,.1f} s",
    )


def table(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """HEADERS and one row a point, under the letters of `plot`."""
    leading = front(points)
    return [
        HEADERS,
        *(cells(p, mark=letter(i), on_front=p.name in leading) for i, p in enumerate(points)),
    ]


def letter(index: int) -> str:
    """a to z, then A to Z, then again."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return letters[index % len(letters)]


def plot(points: Sequence[Point]) -> list[str]:
    """KL (logarithmic, upwards is worse) over MiB, one letter a recipe, as text."""
    shown = [(i, p) for i, p in enumerate(points) if p.kl > 0]
    if len(shown) < 2:
        return []
    sizes = [p.num_bytes / 2**20 for _, p in shown]
    logs = [math.log10(p.kl) for _, p in shown]
    low_x, high_x, low_y, high_y = min(sizes), max(sizes), min(logs), max(logs)
    canvas = [[" "] * PLOT_COLUMNS for _ in range(PLOT_ROWS)]
    for (index, _), x, y in zip(shown, sizes, logs, strict=True):
        column = round((x - low_x) / ((high_x - low_x) or 1) * (PLOT_COLUMNS - 1))
        row = round((high_y - y) / ((high_y - low_y) or 1) * (PLOT_ROWS - 1))
        free = [c for c in range(PLOT_COLUMNS) if canvas[row][c] == " "]
        # Letters that would cover each other stand side by side.
        nearest = min((abs(c - column), c) for c in free) if free else (0, column)
        canvas[row][nearest[1]] = letter(index)
    labels = {0: f"{10**high_y:.4f}", PLOT_ROWS - 1: f"{10**low_y:.4f}"}
    lines = [f"{labels.get(i, ''):>9} |{''.join(row).rstrip()}" for i, row in enumerate(canvas)]
    axis = f"{low_x:,.0f} MiB".ljust(PLOT_COLUMNS - 10) + f"{high_x:,.0f} MiB".rjust(10)
    return ["KL, logarithmic", *lines, " " * 10 + "+" + "-" * PLOT_COLUMNS, " " * 11 + axis]


def draw(points: Sequence[Point], path: Path) -> None:
    """KL over size and over decode speed as a PNG or SVG file. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('--plot needs matplotlib: pip install "ridgeline[plot]"') from None
    shown = [p for p in points if p.kl > 0 and p.void is None]
    leading = front(points)
    timed = [p for p in shown if p.decode_tok_s is not None]
    figure = Figure(figsize=(13 if timed else 7, 6), layout="constrained")
    panels: list[tuple[str, list[tuple[Point, float]]]] = [
        ("MiB of weights", [(p, p.num_bytes / 2**20) for p in shown])
    ]
    if timed:
        panels.append(("decode, tokens a second", [(p, p.decode_tok_s or 0.0) for p in timed]))
    for number, (title, places) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        for point, x in places:
            colour = "tab:green" if point.name in leading else "0.5"
            axes.errorbar(x, point.kl, yerr=point.kl_error, fmt="o", color=colour, markersize=5)
            axes.annotate(
                point.name, (x, point.kl), xytext=(5, 4), textcoords="offset points", fontsize=7, color=colour
            )
        axes.set(yscale="log", xlabel=title, ylabel="KL(float32 || quantized), nats per token")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path} cannot be written: {error}; give a path ending in .png or .svg"
        ) from None


def finished_rows(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a result that an earlier run has left, none where there is no file.

    Raises ConfigError for another kind of result, and for one that was measured with other settings.
    """
    if not path.exists():
        return []
    document = load_document(path)
    found = document["settings"]
    if document["kind"] != "pareto":
        raise ConfigError(f"{path} is a result of {document['kind']!r}, expected 'pareto'")
    if different := sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key)):
        raise ConfigError(
            f"{path} was measured with other settings ({', '.join(different)}); give another --save-result"
        )
    rows: list[dict[str, Any]] = document["details"]["rows"]
    return rows
