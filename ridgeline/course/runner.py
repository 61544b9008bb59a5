"""From the source of a notebook to an executed .ipynb: convert, run in a fresh kernel, hold to the form.

The header comes from the catalog. Cells tagged "wrong" feed wrong answers to the checkers: they are run and
then left out of the notebook. A run fails for a claim outside its band (a measured one only if the variable
`files.MEASURED` does not say otherwise), for anything on stderr, for a stub that passes, a solution that
fails, or a checker that was not shown two wrong answers.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ridgeline.course.catalog import Notebook, notebook
from ridgeline.course.exercises import exercises_of
from ridgeline.course.files import PROFILE, RESULTS, checkout
from ridgeline.course.lesson import UNANSWERED
from ridgeline.course.sources import exported_names, source_problems
from ridgeline.errors import ConfigError

Profile = Literal["fast", "full"]
LIMIT_S = {"fast": 90, "full": 600}
"""Seconds that a notebook may take on two cores, to be saved; elsewhere the machine may be slower."""
MIN_WRONG_ANSWERS = 2
_HIDDEN = {"wrong", "before"}


@dataclass(frozen=True, slots=True)
class Ran:
    """What one run found."""

    code: str
    seconds: float
    results: dict[str, Any]
    """The data file; {} where the run did not reach its end."""
    problems: tuple[str, ...]
    """Empty: everything holds."""


def run_notebook(code: str, *, profile: Profile = "fast", save: bool = False, before: str = "") -> Ran:
    """Execute a notebook in a fresh kernel; `save` writes its .ipynb and its data file.

    `before` is code that the kernel runs first and the notebook does not show (to break something on
    purpose). Nothing is saved from a run with problems. Raises ConfigError without the `course` extra.
    """
    try:
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
        from traitlets.config import Config
    except ImportError:
        raise ConfigError("notebooks need the course extra: pip install 'ridgeline[course]'") from None
    entry = notebook(code)
    book = read_source(entry)
    if before:
        book.cells.insert(0, _code_cell(before, "before"))
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder, _variables({PROFILE: profile, RESULTS: folder}):
        place = {"metadata": {"path": folder}}
        files = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
        client = NotebookClient(book, config=files, timeout=4 * LIMIT_S[profile], resources=place)
        started = time.monotonic()
        try:
            client.execute()
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            problems.append(str(error))
        except AssertionError:  # what nbclient's own clean-up raises after a kernel that died
            problems.append("the kernel died")
        seconds = time.monotonic() - started
        path = Path(folder) / f"{entry.code}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
    problems += [f"stderr: {text}" for text in _stderr(book)]
    problems += source_problems(source_path(entry), exported_names())
    if not problems:
        problems += _form_problems(entry, results)
    if save and seconds > LIMIT_S[profile]:
        problems.append(f"took {seconds:.0f} s; {profile} runs have {LIMIT_S[profile]}")
    if save:
        problems += results.get("reported", ())
    ran = Ran(entry.code, seconds, results, tuple(problems))
    if save and not problems:
        _save(entry, book, ran)
    return ran


def read_source(entry: Notebook) -> Any:
    """The notebook of a source file, with its header, nothing executed. Raises ConfigError."""
    import jupytext  # type: ignore[import-untyped]

    path = source_path(entry)
    if not path.exists():
        raise ConfigError(f"{path} does not exist: this notebook is not written yet")
    book = jupytext.read(path, fmt="py:percent")
    book.cells = [_markdown_cell(header(entry)), *(cell for cell in book.cells if cell.source.strip())]
    _clean(book)
    return book


def header(entry: Notebook) -> str:
    """Title, minutes, tags, what to read before, how long a run takes, what the reader gets."""
    before = ", ".join(f"[{code}]({code}.ipynb)" for code in entry.before) or "none"
    able = "\n".join(f"- {line}" for line in entry.able)
    return (
        f"# {entry.code} · {entry.title}\n\n"
        f"**{entry.section}** · {entry.minutes} minutes · {' · '.join(entry.tags)}\n\n"
        f"*{entry.sentence}*\n\n"
        f"Read before: {before}. {_run_time(entry)}\n\n"
        f"Afterwards you will be able to\n\n{able}"
    )


def _run_time(entry: Notebook) -> str:
    path = results_path(entry.code)
    if not path.exists():
        return "Its run time was not measured yet."
    kept = json.loads(path.read_text())
    cores = kept["environment"]["cpu"]["cores"]
    return (
        f"Runs in {kept['notebook_seconds']:.0f} s on {cores} CPU cores (measured {kept['date'][:10]}, "
        f"{kept['profile']} profile)."
    )


def source_path(entry: Notebook) -> Path:
    """Of the percent file that people edit."""
    return checkout() / "notebooks" / f"{entry.code}.py"


def results_path(code: str) -> Path:
    """Of the committed data file."""
    return checkout() / "notebooks/results" / f"{code}.json"


def _save(entry: Notebook, book: Any, ran: Ran) -> None:
    import nbformat

    path = results_path(entry.code)
    path.parent.mkdir(exist_ok=True)
    kept = ran.results | {"notebook_seconds": round(ran.seconds, 1)}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    book.cells = [cell for cell in book.cells if not _HIDDEN & set(cell.metadata.get("tags", ()))]
    book.cells[0].source = header(entry)
    _clean(book)
    nbformat.write(book, source_path(entry).with_suffix(".ipynb"))  # type: ignore[no-untyped-call]


def _clean(book: Any) -> None:
    """Nothing in the file that differs from run to run without meaning."""
    book.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    count = 0
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            if "solution" in cell.metadata.get("tags", ()):
                cell.metadata["jupyter"] = {"source_hidden": True}
            if cell.execution_count is not None:
                count += 1
                cell.execution_count = count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count


def _stderr(book: Any) -> Iterator[str]:
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stderr":
                yield output.text


def _form_problems(entry: Notebook, results: dict[str, Any]) -> Iterator[str]:
    """What the form of a notebook asks for and this run lacks."""
    if not results:
        yield "it does not end with lesson.answer()"
        return
    if not results["claims"]:
        yield "it claims nothing"
    if not results["predictions"]:
        yield "it asks for no prediction"
    declared = exercises_of(entry.code)
    if len(declared) < 2:
        yield f"it has {len(declared)} exercises; two are the least"
    for name in declared:
        attempts, refused = (results["exercises"][name][key] for key in ("attempts", "refused"))
        if attempts[:1] != [UNANSWERED]:
            yield f"exercise {name}: the stub is not answered with {UNANSWERED!r} but {attempts[:1]}"
        if attempts[-1:] != ["right"]:
            yield f"exercise {name}: its solution is refused: {attempts[-1:]}"
        if refused < MIN_WRONG_ANSWERS:
            yield f"exercise {name}: {refused} wrong answers were tried; {MIN_WRONG_ANSWERS} are the least"


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables, for the kernel that is started inside."""
    kept = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _code_cell(source: str, tag: str) -> Any:
    import nbformat

    return nbformat.v4.new_code_cell(source, metadata={"tags": [tag]})  # type: ignore[no-untyped-call]


def _markdown_cell(source: str) -> Any:
    import nbformat

    return nbformat.v4.new_markdown_cell(source)  # type: ignore[no-untyped-call]
