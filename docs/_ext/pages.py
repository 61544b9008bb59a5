"""Parts of pages that are made from data: catalog, climb, placement, bill, ledger. Each returns HTML."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

import results

from ridgeline.course.catalog import NOTEBOOKS, SECTIONS, Notebook
from ridgeline.course.claims import show_range

DOCS = Path(__file__).resolve().parents[1]
HOLDS, FAILS = '<span class="holds">✓</span>', '<span class="fails">✗</span>'


def is_rendered(entry: Notebook) -> bool:
    """Whether its executed notebook is there."""
    return (DOCS.parent / "notebooks" / f"{entry.code}.ipynb").exists()


def link(code: str) -> str:
    """A notebook, for pages in the root of the site."""
    entry = next(one for one in NOTEBOOKS if one.code == code)
    label = f'<span class="code">{code}</span> {escape(entry.title)}'
    return f'<a href="notebooks/{code}.html">{label}</a>' if is_rendered(entry) else f"<span>{label}</span>"


def block(lines: Iterable[str]) -> str:
    """HTML inside a Markdown page."""
    text = "\n".join(lines)
    return f"\n````{{raw}} html\n{text}\n````\n"


def hours(entries: Iterable[Notebook]) -> str:
    """What reading them takes."""
    whole, rest = divmod(sum(entry.minutes for entry in entries), 60)
    return f"{whole} h {rest:02d} min" if whole else f"{rest} min"


def toctrees() -> str:
    """One for each section of the course, of the notebooks that are there."""
    trees = []
    for section in SECTIONS:
        entries = [entry for entry in NOTEBOOKS if entry.section == section and is_rendered(entry)]
        lines = "\n".join(f"{entry.code} {entry.title} <notebooks/{entry.code}>" for entry in entries)
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {section}\n\n{lines}\n```\n" if entries else "")
    return "\n".join(trees)


def catalog() -> str:
    """Cards by section, and the means to filter them."""
    tags = sorted({tag for entry in NOTEBOOKS for tag in entry.tags}, key=str.lower)
    options = "".join(f'<option value="{escape(tag)}">' for tag in tags)
    lines = [
        '<div class="catalog" id="catalog">',
        '<form class="filter" role="search"><label for="tag">Filter by tag or word</label>',
        '<input id="tag" type="search" list="tags" autocomplete="off" placeholder="INT4, TTFT, vLLM …">',
        f'<datalist id="tags">{options}</datalist>',
        f'<output aria-live="polite">{len(NOTEBOOKS)} notebooks, {hours(NOTEBOOKS)}</output></form>',
    ]
    for section in SECTIONS:
        inside = [entry for entry in NOTEBOOKS if entry.section == section]
        lines.append(f'<section class="shelf"><h3>{escape(section)} <small>{hours(inside)}</small></h3>')
        lines += ['<div class="cards">', *map(_card, inside), "</div></section>"]
    return block([*lines, "</div>"])


def _card(entry: Notebook) -> str:
    tags = "".join(f'<button type="button" class="tag">{escape(tag)}</button>' for tag in entry.tags)
    title = escape(entry.title)
    if is_rendered(entry):
        title = f'<a href="notebooks/{entry.code}.html">{title}</a>'
    else:
        title += ' <em class="coming">coming</em>'
    return (
        f'<article class="lesson" id="{entry.code}" data-tags="{escape("|".join(entry.tags))}">'
        f'<p class="meta"><span class="code">{entry.code}</span><span>{entry.minutes} min</span></p>'
        f"<h4>{title}</h4><p>{escape(entry.sentence)}</p>{_verdicts(entry.code)}"
        f'<p class="tags">{tags}</p></article>'
    )


def _verdicts(code: str) -> str:
    claims = (results.notebook_results(code) or {}).get("claims")
    if not claims:
        return ""
    holding = sum(claim["holds"] for claim in claims)
    noun = "claim" if len(claims) == 1 else "claims"
    return f'<p class="verdicts">{len(claims)} {noun}: {holding} hold, {len(claims) - holding} do not</p>'


def climb(value: str = "tok_s") -> str:
    """The ladder as bars on a logarithmic axis: `tok_s`, or `hours` of this machine a million tokens."""
    rungs = list(results.rungs())
    low = min(rung[value] for rung in rungs) / 2
    span = math.log(max(rung[value] for rung in rungs) / low)
    lines = []
    for rung in rungs:
        width = 100 * math.log(rung[value] / low) / span
        number = f"{rung[value]:.0f}" if rung[value] >= 100 else f"{rung[value]:.1f}"
        kind = {"loss": "loss", "none": "even"}.get(rung["verdict"], "gain")
        lines.append(
            f'<li class="{kind}"><span class="name">{escape(rung["name"])}</span><span class="bar">'
            f'<i style="width:{width:.1f}%"></i></span><span class="number">{number}</span></li>'
        )
    return block(['<ol class="climb">', *lines, "</ol>"])


def quiz() -> str:
    """docs/placement.toml as a form; site.js asks, explains and sums up."""
    lines = ['<form class="quiz" id="quiz">']
    for number, question in enumerate(_toml("placement")["question"], 1):
        codes = question["notebooks"]
        lines.append(f'<fieldset data-notebooks="{" ".join(codes)}">')
        lines.append(f"<legend><b>{number}</b> {question['ask']}</legend>")
        for index, answer in enumerate(question["answer"]):
            lines.append(
                f'<label class="{"right" if answer.get("right") else "wrong"}">'
                f'<input type="radio" name="q{number}" value="{index}"><span>{answer["text"]}</span>'
                f'<span class="why" hidden>{answer["why"]}</span></label>'
            )
        where = ", ".join(map(link, codes))
        lines.append(f'<p class="where" hidden>This is the subject of {where}.</p></fieldset>')
    order = {e.code: {"title": e.title, "minutes": e.minutes, "there": is_rendered(e)} for e in NOTEBOOKS}
    return block(
        [
            *lines,
            '<div class="result" aria-live="polite">',
            "<p>Answer all ten, then your way through the course appears here.</p></div>",
            '<button type="reset">Start again</button></form>',
            f'<script type="application/json" id="notebooks">{json.dumps(order)}</script>',
        ]
    )


def bill(render: Callable[[str], str]) -> str:
    """docs/bill.toml: what each optimisation gives, what it costs, when not; `render` fills in figures."""
    lines = ['<div class="bill">']
    for row in _toml("bill")["row"]:
        links = " · ".join(map(link, row["notebooks"]))
        lines.append(f"<article><header><h3>{escape(row['name'])}</h3><p>{links}</p></header><dl>")
        for name, label in (("gives", "gives"), ("costs", "costs"), ("not", "not when")):
            lines.append(f'<div class="{name}"><dt>{label}</dt><dd>{render(row[name])}</dd></div>')
        lines.append("</dl></article>")
    return block([*lines, "</div>"])


def ledger() -> str:
    """Every claim of the course with its number and its verdict, as Markdown: claims may hold formulas."""
    lines = []
    for entry in NOTEBOOKS:
        found = results.notebook_results(entry.code)
        if found:
            where = f"[{entry.code}](/notebooks/{entry.code}.ipynb)" if is_rendered(entry) else entry.code
            lines += [
                f"\n### {entry.title}\n",
                f"{where}, {found['date'][:10]}, {found['profile']} profile, ",
            ]
            lines += [results.machine(found["environment"]), "\n````{container} ledger\n"]
            lines += ["|  | claim | said | measured |", "|---|---|---|---|"]
            lines += [*map(_claim, found["claims"]), "````"]
    return "\n".join(lines) or "No notebook was run yet."


def _claim(claim: dict[str, Any]) -> str:
    sign = HOLDS if claim["holds"] else FAILS
    because = "" if claim["holds"] else f"<br><small>because {claim['because']}</small>"
    least, most = claim["claimed"]
    said, measured = show_range((least, most), claim["unit"]), f"{claim['value']:.4g} {claim['unit']}"
    statement = (claim["statement"] + because).replace("|", "\\|").replace("\n", " ")
    return f"| {sign} | {statement} | {said} | {measured.strip()} |"


def num_claims(*, holding: bool = False) -> int:
    """Of all notebooks that were run."""
    documents = [found for e in NOTEBOOKS if (found := results.notebook_results(e.code))]
    return sum(claim["holds"] or not holding for found in documents for claim in found["claims"])


def _toml(name: str) -> dict[str, Any]:
    return tomllib.loads((DOCS / f"{name}.toml").read_text())
