"""Docstrings of the package, which are written to be read in the source, as reStructuredText."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx

_MARKS = re.compile(r"(?<!`)`([^`]+)`(?!`)(\w?)")


def prepare(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """`name` is code; stars, bars and trailing underscores are themselves; what is indented stays."""
    lines[:] = _rewritten(lines)


def _rewritten(lines: list[str]) -> Iterator[str]:
    drawn = False
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        if indented and not drawn and not before:
            yield from ("::", "")
            drawn = True
        elif line and not indented:
            drawn = False
        yield line if drawn else _escaped(line)


def _escaped(line: str) -> str:
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(f"``{found[1]}``" + (f"\\ {found[2]}" if found[2] else ""))
        return f"\0{len(kept) - 1}\0"

    line = _MARKS.sub(keep, line)
    line = re.sub(r"([*|\\])", r"\\\1", line)
    line = re.sub(r"(\w)_(?!\w)", r"\1\\_", line)
    return re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], line)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", prepare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
