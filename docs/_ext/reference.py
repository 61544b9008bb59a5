"""The reference as Markdown: settings from dataclasses, commands from commands, modules by autodoc."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import get_args, get_origin

from ridgeline import config
from ridgeline.sampling_params import SamplingParams

ENGINE = (
    config.EngineConfig,
    config.CacheConfig,
    config.SchedulerConfig,
    config.LoadConfig,
    config.ParallelConfig,
)
GROUPS = {"load", "cache", "scheduler", "parallel"}
"""Fields of EngineConfig that hold the other dataclasses."""


def settings() -> str:
    """The dataclasses that are flags and arguments, as tables."""
    lines: list[str] = []
    for group in (*ENGINE, SamplingParams):
        said = (inspect.getdoc(group) or "").split("\n")[0]
        lines += [f"\n## {group.__name__}\n", f"{said}\n"]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        meanings = field_docs(group)
        for field in fields(group):
            if field.name not in GROUPS:
                kind = str(field.type).replace(" | None", "").replace("|", "\\|")
                default = "required" if field.default is MISSING else f"`{field.default!r}`"
                meaning = meanings.get(field.name, "").replace("|", "\\|")
                lines.append(f"| `{field.name}` | `{kind}` | {default} | {meaning} |")
    lines.append("\n## Choices\n")
    for name, value in vars(config).items():
        if get_origin(value) is not None and all(isinstance(one, str) for one in get_args(value)):
            lines.append(f"- `{name}`: {', '.join(f'`{one}`' for one in get_args(value))}")
    return "\n".join(lines)


def field_docs(group: type) -> dict[str, str]:
    """The strings below the fields of a dataclass."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(group))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {
        ast.unparse(node.target): " ".join(str(ast.literal_eval(after.value)).split())
        for node, after in itertools.pairwise(tree.body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }


def commands() -> str:
    """Every command with its options; those that are settings of the engine are said once, elsewhere."""
    from ridgeline.cli.main import app

    engine = {field.name.replace("_", "-") for group in ENGINE for field in fields(group)} - {"model"}
    text = app.generate_docs(output_format="markdown", recursive=True)
    text = text[text.index("\n## ridgeline ") :]
    text = re.sub(r"^(#+) (ridgeline .*)$", r"\1 `\2`", text, flags=re.MULTILINE)
    return "\n".join(_without(text.splitlines(), engine))


def _without(lines: list[str], engine: set[str]) -> Iterator[str]:
    skipping = said = False
    for line in lines:
        option = re.match(r"\* `--([\w-]+)", line)
        if option:
            skipping = option[1] in engine
            if skipping and not said:
                yield "* the [settings of the engine](settings.md) as flags, such as `--max-num-seqs 16`"
                said = True
        elif not line.startswith("  "):
            skipping = False
        if line.startswith("#"):
            said = False
        if not skipping:
            yield re.sub(r"\*\[env: (\w+)\]\*", r"*[environment: `\1`]*", line)


def modules(*names: str) -> str:
    """autodoc of modules, and of all modules in packages."""
    lines = []
    for name in names:
        places = getattr(importlib.import_module(name), "__path__", ())
        inside = [f"{name}.{one.name}" for one in pkgutil.iter_modules(places)]
        for one in inside or [name]:
            lines.append(f"\n## `{one}`\n\n```{{eval-rst}}\n.. automodule:: {one}\n```\n")
    return "\n".join(lines)
