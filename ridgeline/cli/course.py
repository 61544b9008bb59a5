"""`ridgeline course`: the notebooks from the terminal."""

from __future__ import annotations

import json as jsons
import os
import sys
from typing import Any

from ridgeline.cli.options import make_app, print_json
from ridgeline.cli.terminal import progress_bar, say
from ridgeline.course.catalog import NOTEBOOKS, SECTIONS, notebook
from ridgeline.course.files import reader_folder
from ridgeline.course.runner import Profile, Ran, results_path, run_notebook, source_path
from ridgeline.errors import ConfigError

course = make_app(
    name="course",
    help="""Twenty notebooks that teach inference optimisation by measuring this engine on your machine.

    Examples of use:

        ridgeline course list

        ridgeline course open INF-10

        ridgeline course run INF-10

        ridgeline course run --all --fast

        ridgeline course ledger

    Bands are those of the machine that the notebooks were measured on. RIDGELINE_COURSE_MEASURED=report lets
    a run on another one tell what is outside and go on.
    """,
)


@course.command(name="list")
def list_notebooks(*, json: bool = False) -> None:
    """All notebooks by section.

    Parameters
    ----------
    json
        End with one JSON document.
    """
    if json:
        print_json({"notebooks": [_entry(entry.code) for entry in NOTEBOOKS]})
        return
    lines: list[str] = []
    for section in SECTIONS:
        inside = [entry for entry in NOTEBOOKS if entry.section == section]
        lines += ["", f"{section} ({sum(entry.minutes for entry in inside)} min)"]
        lines += [f"  {e.code}  {e.minutes:>3} min  {e.title:<28} {e.sentence}" for e in inside]
    sys.stdout.write("\n".join(lines[1:]) + "\n")


@course.command(name="open")
def open_notebook(code: str) -> None:
    """Open a notebook in JupyterLab (pip install jupyterlab).

    Parameters
    ----------
    code
        Such as INF-10.
    """
    path = source_path(notebook(code)).with_suffix(".ipynb")
    if not path.exists():
        raise ConfigError(f"{path} does not exist; make it: ridgeline course run {code.upper()} --save")
    try:
        import jupyterlab  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise ConfigError(f"opening needs JupyterLab: pip install jupyterlab. The file is {path}") from None
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", str(path)])


@course.command
def run(
    *codes: str,
    all: bool = False,
    fast: bool = False,
    full: bool = False,
    save: bool = False,
    json: bool = False,
) -> None:
    """Execute notebooks in fresh kernels; exit status 1 if a claim no longer holds.

    Parameters
    ----------
    codes
        Such as INF-10 INF-11.
    all
        All that are written; one that fails is run once more at the end.
    fast
        Small sizes, under 90 seconds each (what happens if neither is given).
    full
        All sizes, under 10 minutes each.
    save
        Write the .ipynb with outputs, and its data file, of every run without problems.
    json
        End with one JSON document.
    """
    if fast and full:
        raise ConfigError("--fast and --full together; give one")
    if all == bool(codes):
        raise ConfigError("give the codes of notebooks, such as INF-10, or --all")
    chosen = [entry for entry in NOTEBOOKS if source_path(entry).exists()] if all else map(notebook, codes)
    chosen = list(chosen)
    profile: Profile = "full" if full else "fast"
    ran: list[Ran] = []
    with progress_bar("course") as progress:
        for number, entry in enumerate(chosen):
            progress(number, len(chosen), f"{entry.code} {entry.title}")
            ran.append(run_notebook(entry.code, profile=profile, save=save))
            say(_told(ran[-1]))
    for number, one in enumerate(ran):
        # A busy machine can spoil a timing twice in a row, but not minutes apart.
        if all and (one.problems or one.results.get("reported")):
            say(f"{one.code} once more")
            ran[number] = run_notebook(one.code, profile=profile, save=save)
            say(_told(ran[number]))
    if json:
        print_json({"notebooks": [_document(one) for one in ran]})
    if any(one.problems for one in ran):
        sys.exit(1)


@course.command
def ledger(*, json: bool = False) -> None:
    """What the committed runs claim: the statement, what people say, what was measured, the verdict.

    Parameters
    ----------
    json
        End with one JSON document.
    """
    kept = [jsons.loads(path.read_text()) for e in NOTEBOOKS if (path := results_path(e.code)).exists()]
    claims = [
        {"code": one["code"], "date": one["date"], "profile": one["profile"]} | claim
        for one in kept
        for claim in one["claims"]
    ]
    if json:
        print_json({"claims": claims})
        return
    lines = []
    for claim in claims:
        measured = f"{claim['value']:.4g} {claim['unit']}".strip()
        lines.append(f"{'+' if claim['holds'] else '-'} {claim['code']} {claim['statement']}: {measured}")
        lines.append(f"  {claim['verdict']}")
    holding = sum(claim["holds"] for claim in claims)
    lines.append(f"\n{len(claims)} claims in {len(kept)} notebooks; {holding} hold here")
    sys.stdout.write("\n".join(lines) + "\n")


@course.command
def progress(*, json: bool = False) -> None:
    """What you have run yourself, and your predictions beside what was measured.

    Parameters
    ----------
    json
        End with one JSON document.
    """
    own = {e.code: _own(e.code) for e in NOTEBOOKS}
    done = {code: document for code, document in own.items() if document}
    if json:
        print_json({"notebooks": done})
        return
    lines = []
    for code, document in done.items():
        solved = [name for name, e in document["exercises"].items() if "right" in e["attempts"]]
        lines.append(
            f"{code}  run {document['date'][:10]}, {len(solved)} of {len(document['exercises'])} exercises"
        )
        for name, prediction in document["predictions"].items():
            measured = document["values"][name]
            number = measured["median"] if isinstance(measured, dict) else measured
            guess = "no guess" if prediction["guess"] is None else f"you said {prediction['guess']:g}"
            lines.append(f"    {name}: {guess}, measured {number:.4g}")
    lines.append(f"{len(done)} of {len(NOTEBOOKS)} notebooks; the next is {_next(done)}")
    sys.stdout.write("\n".join(lines) + "\n")


def _own(code: str) -> dict[str, Any]:
    path = reader_folder() / f"{code}.json"
    return jsons.loads(path.read_text()) if path.exists() else {}


def _next(done: dict[str, Any]) -> str:
    return next((f"{e.code} {e.title}" for e in NOTEBOOKS if e.code not in done), "none: you are through")


def _entry(code: str) -> dict[str, Any]:
    entry = notebook(code)
    names = ("code", "minutes", "title", "section", "tags", "sentence", "able", "before")
    return {name: getattr(entry, name) for name in names}


def _told(ran: Ran) -> str:
    lines = [f"{ran.code}: {'FAILED' if ran.problems else 'ok'}, {ran.seconds:.0f} s"]
    for claim in ran.results.get("claims", ()):
        measured = f"{claim['value']:.4g} {claim['unit']}".strip()
        spread = f" ({claim['low']:.4g} to {claim['high']:.4g})" if claim["high"] > claim["low"] else ""
        lines.append(f"  {'+' if claim['holds'] else '-'} {claim['name']}: {measured}{spread}")
    lines += [f"  ? {problem}" for problem in ran.results.get("reported", ())]
    lines += [f"  ! {problem}" for problem in ran.problems]
    return "\n".join(lines)


def _document(ran: Ran) -> dict[str, Any]:
    return {"code": ran.code, "seconds": ran.seconds, "problems": ran.problems, "results": ran.results}
