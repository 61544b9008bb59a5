"""`ridgeline pareto`: quality against size and speed over recipes, and the best under a limit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ridgeline.bench.result import load_document, make_document, save_document
from ridgeline.cli.options import print_json
from ridgeline.cli.quantize import (
    WIDTH,
    CalibrationOptions,
    evaluation_document,
    known_recipes,
    make,
    open_base,
    print_table,
)
from ridgeline.cli.terminal import progress_bar, say
from ridgeline.compress.card import base_row, markdown_table, row_document, without_empty, worst_tensors
from ridgeline.compress.judge import BASE, JudgeOptions, judge
from ridgeline.compress.pareto import Limits, answer, best, draw, finished_rows, plot, points_of, table
from ridgeline.errors import ConfigError
from ridgeline.models.locate import locate_model

Parameter(name="*")(Limits)
NUM_TEXT = 2
BEGIN, END = "<!-- pareto: begin -->", "<!-- pareto: end -->"


def pareto(
    *,
    model: str = "smollm2",
    recipes: Annotated[str | None, Parameter(show_default=False)] = None,
    limits: Limits = Limits(),
    num_seeds: int = 1,
    calibration: CalibrationOptions = CalibrationOptions(calibration_samples=16),
    judging: JudgeOptions = JudgeOptions(),
    save_result: Path | None = None,
    from_result: Path | None = None,
    plot: Path | None = None,
    page: Path | None = None,
    json: bool = False,
) -> None:
    """Quantize by many recipes, judge each beside the float model, and name the best under a limit.

    Every recipe is made in memory, measured and forgotten. What is on the front (none is smaller and closer
    to the float model) has a star. With --save-result, finished recipes are kept in that file: the same
    command goes on after a stop, and adds recipes to it later.

    Examples:

        ridgeline pareto -m smollm2 --recipes int8,Q4_0,Q4_K_M,gptq-int4-g64

        ridgeline pareto -m smollm2 --num-seeds 3 --save-result pareto.json --plot pareto.svg

        ridgeline pareto --from-result pareto.json --max-kl 0.05

        ridgeline pareto --from-result pareto.json --max-size 90 --min-speed 200 --json | tail -1

    Parameters
    ----------
    model
        A .gguf file, a Hugging Face directory, or the alias of an installed model package.
    recipes
        Names with commas between; all that `ridgeline quantize --list` shows if left out.
    num_seeds
        Calibration seeds of each recipe that is calibrated, from --seed on.
    save_result
        Keep the result document in this file, and take finished recipes from it.
    from_result
        Do not measure: take the result from this file.
    plot
        Draw the front into this PNG or SVG file (extra `plot`).
    page
        Put the table into this Markdown file, between its two `pareto` comments.
    json
        End with one JSON document.
    """
    if num_seeds < 1:
        raise ConfigError(f"--num-seeds {num_seeds}: expected at least 1")
    if from_result is not None:
        document = load_document(from_result)
        if document["kind"] != "pareto":
            raise ConfigError(f"{from_result} is a result of {document['kind']!r}, expected 'pareto'")
    else:
        document = _measure(model, recipes, num_seeds, calibration, judging, save_result)
    points = points_of(document["details"]["rows"])
    if plot is not None:
        draw(points, plot)
        say(f"wrote {plot}")
    if page is not None:
        _write_page(document, page)
    if json:
        chosen = best(points, limits)
        document["details"]["best"] = None if chosen is None else chosen.name
        print_json(document)
    else:
        _print(document, limits)


def _measure(
    model: str,
    recipes: str | None,
    num_seeds: int,
    calibration: CalibrationOptions,
    judging: JudgeOptions,
    save_result: Path | None,
) -> dict[str, Any]:
    """Make and judge what `save_result` does not have yet; it is written after each."""
    if not judging.eval:
        raise ConfigError("pareto compares quality; leave --no-eval out")
    known = known_recipes()
    names = list(known.RECIPES) if recipes is None else [name.strip() for name in recipes.split(",")]
    chosen = [known.recipe_named(name) for name in names]
    described = {key: value for key, value in calibration.document().items() if key != "seed"}
    settings = {"model": model, "calibration": described} | judging.document()
    rows = [] if save_result is None else finished_rows(save_result, settings)
    runs = [
        (recipe, calibration.seed + number if recipe.needs_calibration else None)
        for recipe in chosen
        for number in range(num_seeds if recipe.needs_calibration else 1)
    ]
    done = {(row["name"], row["seed"]) for row in rows}
    todo = [(recipe, seed) for recipe, seed in runs if (recipe.name, seed) not in done]
    base, tokenizer = open_base(locate_model(model))
    document = _document(rows, settings, judging) if rows else {}
    for number, (recipe, seed) in enumerate(todo, 1):
        say(f"{number} of {len(todo)}: {recipe.name}" + ("" if seed is None else f", seed {seed}"))
        tokens = None if seed is None else calibration.tokens(tokenizer, seed=seed)
        quantized, made = make(base, recipe, tokens)
        judged = judge(base, {recipe.name: quantized}, tokenizer, judging, progress=progress_bar)
        row = row_document(recipe.name, judged[recipe.name], made)
        base_of_row = base_row(judged[BASE], row["quality"])
        rows.append(row | {"seed": seed, "base": base_of_row, "tensors": worst_tensors(row)[1]})
        document = _document(rows, settings, judging)
        if save_result is not None:
            save_document(document, save_result)
    wanted = {recipe.name for recipe in chosen}
    document["details"]["rows"] = [row for row in rows if row["name"] in wanted]
    return document


def _document(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], judging: JudgeOptions
) -> dict[str, Any]:
    return make_document(
        "pareto",
        metrics=(),
        settings=settings,
        seeds=sorted({row["seed"] for row in rows if row["seed"] is not None}),
        details={"rows": list(rows), "evaluation": evaluation_document(judging)},
    )


def _print(document: Mapping[str, Any], limits: Limits) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    points = points_of(document["details"]["rows"])
    print_table(console, without_empty(table(points)), num_text=NUM_TEXT)
    for line in (*plot(points), "", *_facts(document), answer(points, limits)):
        console.print(line, highlight=False, markup=False)


def _facts(document: Mapping[str, Any]) -> list[str]:
    """What the figures are of."""
    rows, settings = document["details"]["rows"], document["settings"]
    evaluation, calibration = document["details"]["evaluation"], settings["calibration"]
    base, quality = rows[0]["base"], rows[0]["quality"]
    seeds = ", ".join(map(str, document["seeds"])) or "none"
    lines = [
        f"Base: {settings['model']} in float32, {base['sizes']['float32_bytes'] / 2**20:,.1f} MiB, "
        f"perplexity {base['quality']['perplexity']:.3f} on {quality['num_tokens']:,} tokens of "
        f"{evaluation['text']} in windows of {quality['context']}, executor {evaluation['executor']}.",
        f"Calibration: {calibration['num_samples']} × {calibration['length']} tokens of "
        f"{calibration['text']}; seeds {seeds}; figures are means over seeds.",
    ]
    lines += [f"{p.name} is void: {p.void}." for p in points_of(rows) if p.void]
    return lines


def _write_page(document: Mapping[str, Any], page: Path) -> None:
    """Replace what is between the two comments."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--page {page} cannot be read: {error}") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"--page {page}: expected the lines {BEGIN} and {END} in it")
    page.write_text(f"{before}{BEGIN}\n\n{page_part(document)}\n{END}{after}", encoding="utf-8")
    say(f"wrote {page}")


def page_part(document: Mapping[str, Any]) -> str:
    """The table and what it is of, as Markdown."""
    points = points_of(document["details"]["rows"])
    lines = "\n".join(f"- {line}" for line in _facts(document))
    environment = document["environment"]
    return (
        markdown_table([row[1:] for row in without_empty(_starred(table(points)))], num_text=1)
        + f"\n{lines}\n- {environment['cpu']['model']}, {environment['threads']} threads, "
        f"{document['created'][:10]}. A star: none is both smaller and closer to the float model.\n"
    )


def _starred(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The star of the front behind the name instead of a letter."""
    return [(row[0], row[1] + (" \\*" if row[0].endswith("*") else ""), *row[2:]) for row in rows]
