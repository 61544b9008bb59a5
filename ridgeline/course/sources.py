"""What a notebook's source may not hold: engine code. A toy beside the engine would teach the toy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ridgeline

MAX_FUNCTION_LINES = 5


def source_problems(path: Path, exported: frozenset[str]) -> Iterator[str]:
    """Classes, long functions, and names that the package has already, in the file at `path`."""
    for node in ast.walk(ast.parse(path.read_text(), path.name)):
        if isinstance(node, ast.ClassDef):
            yield f"{path.name}:{node.lineno}: class {node.name}; a notebook defines none"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{path.name}:{node.lineno}: {node.name} has {lines} lines, over {MAX_FUNCTION_LINES}"
            if node.name in exported:
                yield f"{path.name}:{node.lineno}: {node.name} is a name of the package; import it"


def exported_names() -> frozenset[str]:
    """Public functions and classes of all modules but the course's own, read from their source."""
    root = Path(ridgeline.__file__).parent
    names: set[str] = set()
    for path in root.rglob("*.py"):
        if path.is_relative_to(root / "course"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                names.add(node.name)
    return frozenset(names)
