"""`ridgeline ladder`: from the naive loop to the full engine, one switch at a time, each measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ridgeline.bench.result import load_document, save_document
from ridgeline.bench.workload import workload_named
from ridgeline.cli.options import print_json
from ridgeline.errors import ConfigError
from ridgeline.ladder.climbing import Progress, Step, climb
from ridgeline.ladder.report import (
    HEADERS,
    REMOVAL_HEADERS,
    cells,
    charts,
    html,
    machine_words,
    markdown,
    removal_cells,
    workload_words,
)
from ridgeline.ladder.rungs import RUNGS, Rung

WIDTH = 150
"""Columns of the tables where the output is no terminal."""


def ladder(
    *,
    model: str = "smollm2",
    quick: bool = False,
    workload: Annotated[str | None, Parameter(show_default=False)] = None,
    repeats: int | None = None,
    rungs: Annotated[str | None, Parameter(show_default=False)] = None,
    removals: bool = True,
    num_threads: int | None = None,
    html: Path | None = None,
    page: Path | None = None,
    save_result: Path | None = None,
    from_result: Path | None = None,
    json: bool = False,
) -> None:
    """Climb from the naive loop to the full engine one switch at a time and measure every rung.

    Each rung is the same engine in a fresh process: speed-up over the rung before and over the first, TTFT,
    TPOT, memory, KL divergence from the first rung and whether the tokens are the same. Rungs that lose on
    this machine are shown as losses and left out of the later ones. Then each switch alone is taken away
    from the top.

    Examples:

        ridgeline ladder --quick

        ridgeline ladder -m smollm2 --html report.html

        ridgeline ladder --rungs "naive loop,KV cache,native kernels" --no-removals

        ridgeline ladder --from-result docs/results/ladder.json --page docs/ladder.md

    Parameters
    ----------
    model
        A .gguf file, a Hugging Face directory, or the alias of an installed model package.
    quick
        A smaller workload, and no torch.compile: under two minutes for a model of 135M parameters.
    workload
        A named workload (w1 ... w5l), a JSON description or a trace, instead of the ladder's own mix.
    repeats
        Runs of the workload on each rung, as far as they are short; 5 if left out.
    rungs
        Only these, by name with commas between; the first is what the others are compared with.
    removals
        Also measure the top without each of its switches.
    num_threads
        Threads of every rung; all usable cores if left out.
    html
        Write a report with plots into this file.
    page
        Write the page for the docs into this file, and its plot beside it with the ending .svg.
    save_result
        Write the result document into this file.
    from_result
        Do not measure: take the result from this file.
    json
        End with one JSON document.
    """
    if from_result is not None:
        document = load_document(from_result)
        if document["kind"] != "ladder":
            raise ConfigError(f"{from_result} is a result of {document['kind']!r}, expected one of 'ladder'")
    else:
        with _display() as progress:
            document = climb(
                model,
                quick=quick,
                rungs=_named(rungs),
                workload=None if workload is None else workload_named(workload),
                repeats=repeats,
                removals=removals,
                options={} if num_threads is None else {"num_threads": num_threads},
                progress=progress,
            ).document()
    _write_files(document, html_path=html, page=page, save_result=save_result)
    if json:
        print_json(document)
    else:
        _print_tables(document)


def _named(names: str | None) -> tuple[Rung, ...]:
    if names is None:
        return RUNGS
    wanted = [name.strip() for name in names.split(",")]
    known = [rung.name for rung in RUNGS]
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"--rungs: no rung {', '.join(map(repr, unknown))}; rungs: {', '.join(known)}")
    # What the first rung sets holds for all of them, wherever the climb begins.
    return tuple(rung for rung in RUNGS if rung.name in wanted or rung is RUNGS[0])


@contextmanager
def _display() -> Iterator[Progress]:
    """A progress bar with the time left on standard error, and a line for every row as it is ready."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:34}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("")

        def show(name: str, event: str, done: float, total: float, step: Step | None) -> None:
            bar.update(task, description=f"{name}: {event}", completed=done, total=total)
            if step is not None:
                bar.console.print(_progress_line(name, step), highlight=False)

        yield show


def _progress_line(name: str, step: Step) -> str:
    if step.measured is None:
        return f"{name:22} not run: {step.reason}"
    tok_s = step.measured.value("output_tok_s") or 0.0
    factor = "" if step.speed_up is None else f"× {step.speed_up:.2f}"
    return f"{name:22} {tok_s:9,.1f} tok/s  {factor:9} {step.verdict}"


def _write_files(
    document: dict[str, Any], *, html_path: Path | None, page: Path | None, save_result: Path | None
) -> None:
    if save_result is not None:
        save_document(document, save_result)
    files: dict[Path, str] = {}
    if html_path is not None:
        files[html_path] = html(document)
    if page is not None:
        picture = page.with_suffix(".svg")
        files[page] = markdown(document, picture=picture.name)
        files[picture] = charts(document)["speed"]
    for path, text in files.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}; choose another path") from None
        sys.stderr.write(f"wrote {path}\n")


def _print_tables(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    details = document["details"]
    console.print(machine_words(document), workload_words(document), sep="\n\n", highlight=False)
    for title, headers, rows in (
        ("The climb", HEADERS, [cells(step) for step in details["steps"]]),
        (
            "The top without one switch",
            REMOVAL_HEADERS,
            [removal_cells(step) for step in details["removals"]],
        ),
    ):
        if rows:
            table = Table(*headers, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
