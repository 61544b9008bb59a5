"""What the site adds to Sphinx: pages filled in from committed results, links for codes of notebooks.

Pages named in `ridgeline_templates` are Jinja templates over `pages.py`, `reference.py` and `results.py`. A
figure that no committed file holds is an error, so none on the site was typed by hand.
"""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import jinja2
import pages
import reference
import results
from sphinx.application import Sphinx

from ridgeline.course.catalog import NOTEBOOKS

_CODE = re.compile(r"(?<![\w`\[/(.-])INF-\d\d(?![\w`\]-]|\.\w)")
_KEPT = re.compile(
    r"^(?P<fence>```+|:::+).*?^(?P=fence)\s*$|^#.*?$|`[^`\n]*`|\[[^\]]*\]\([^)]*\)", re.DOTALL | re.MULTILINE
)
NBSP = "\N{NO-BREAK SPACE}"


def times(value: float) -> str:
    """A factor."""
    return f"×{NBSP}{value:.2f}" if value < 10 else f"×{NBSP}{value:.1f}"


ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
ENVIRONMENT.filters |= {
    "x": times,
    "f": lambda value, form=".1f": format(value, form),
    "mib": lambda num_bytes: f"{num_bytes / 2**20:,.0f}{NBSP}MiB",
    "ms": lambda seconds: f"{1000 * seconds:,.0f}{NBSP}ms",
    "percent": lambda share: f"{100 * share:+.1f}{NBSP}%",
}
for function in (pages.toctrees, pages.catalog, pages.climb, pages.quiz, pages.ledger, pages.num_claims):
    ENVIRONMENT.globals[function.__name__] = function
for function in (reference.settings, reference.commands, reference.modules):
    ENVIRONMENT.globals[function.__name__] = function
for function in (results.result, results.rung, results.rungs, results.recipe, results.quantizer):
    ENVIRONMENT.globals[function.__name__] = function
ENVIRONMENT.globals |= {"peer": results.peer, "machine": results.machine}
ENVIRONMENT.globals["bill"] = lambda: pages.bill(lambda text: ENVIRONMENT.from_string(text).render())


def fill_in(app: Sphinx, docname: str, content: list[str]) -> None:
    """Before a page is read."""
    if docname.startswith("notebooks/"):
        content[0] = notebook(content[0])
        return
    text = content[0]
    if docname in app.config.ridgeline_templates:
        text = ENVIRONMENT.from_string(text).render()
    content[0] = linked(text, "/notebooks/")


def linked(text: str, folder: str) -> str:
    """Codes of notebooks as links, but for those in headings and in code."""
    there = {entry.code for entry in NOTEBOOKS if pages.is_rendered(entry)}
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    text = _KEPT.sub(keep, text)
    text = _CODE.sub(lambda f: f"[{f[0]}]({folder}{f[0]}.ipynb)" if f[0] in there else f[0], text)
    return re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], text)


def notebook(text: str) -> str:
    """Solutions folded; links that are right from notebooks/ made right from docs/notebooks/."""
    book = json.loads(text)
    for cell in book["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "solution" in tags:
            cell["metadata"]["tags"] = [*tags, "hide-cell"]
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if not is_leftover(output)]
        else:
            source = "".join(cell["source"])
            cell["source"] = linked(source.replace("](../docs/", "](../"), "")
    return json.dumps(book)


def is_leftover(output: dict[str, Any]) -> bool:
    """The bare value of a cell's last line: what a notebook wants to show, it shows."""
    return output["output_type"] == "execute_result" and set(output["data"]) == {"text/plain"}


def start(app: Sphinx) -> None:
    """Sphinx reads below one folder only: notebooks are copied there. Links to missing ones are no errors."""
    copies = pages.DOCS / "notebooks"
    copies.mkdir(exist_ok=True)
    for path in (pages.DOCS.parent / "notebooks").glob("*.ipynb"):
        copy = copies / path.name
        if not copy.exists() or copy.stat().st_mtime != path.stat().st_mtime:
            shutil.copy2(path, copy)
    missing = [entry.code for entry in NOTEBOOKS if not pages.is_rendered(entry)]
    if missing:
        app.config.suppress_warnings += ["myst.xref_missing"]
        print(f"{len(missing)} notebooks are still to come: {', '.join(missing)}")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("ridgeline_templates", set(), "env", [set])
    app.connect("builder-inited", start)
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
