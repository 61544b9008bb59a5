"""Docstrings of the package, which are written to be read in the source, as reStructuredText."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_MARKS = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def prepare(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """`name` is code; stars, bars and trailing underscores are themselves; drawn trees stay as drawn."""
    lines[:] = [_line(line) for line in lines]


def _line(line: str) -> str:
    if line.startswith("    "):
        return line
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(f"``{found[1]}``")
        return f"\0{len(kept) - 1}\0"

    line = _MARKS.sub(keep, line)
    line = re.sub(r"([*|\\])", r"\\\1", line)
    line = re.sub(r"(\w)_(?!\w)", r"\1\\_", line)
    return re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], line)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", prepare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
