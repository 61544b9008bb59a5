"""What commands share in talking to a person: messages and bars on stderr, sizes in and out."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ridgeline.errors import ConfigError


class Progress(Protocol):
    """Told how far a long work is."""

    def __call__(self, done: int, total: int, known: str = "") -> None: ...


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar on stderr with the time left and what is known so far; nothing where stderr is no terminal.

    It is drawn when it is told something: a thread that refreshes it would take a core from what is measured.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(
        *columns,
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        auto_refresh=False,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int, known: str = "") -> None:
            bar.update(task, completed=done, total=max(done, total), description=known, refresh=True)

        yield progress


def say(line: str) -> None:
    """A message to the person who waits: stderr, so that results can be piped."""
    sys.stderr.write(line + "\n")


def read_bytes(text: str, flag: str) -> int:
    """A size such as 16GiB, 80GB, 500MB or 1073741824. Raises ConfigError naming the flag."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)(i?)b?", text.strip().lower())
    try:
        assert match is not None
        number, prefix, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))
    except (AssertionError, ValueError):
        raise ConfigError(f"{flag} {text}: expected a size such as 16GiB, 80GB or 500MB") from None


def show_bytes(num_bytes: float) -> str:
    """MiB, or GiB from one on."""
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
