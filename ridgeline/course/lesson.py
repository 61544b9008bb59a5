"""The one object of a notebook: it keeps what is predicted, measured, claimed and answered, and shows it.

Prose cannot disagree with the run, because `say` fills its numbers from what was recorded and takes none of
its own. `answer` ends the notebook: the claims with their verdicts, the reader's predictions beside the
measured values, and one JSON file of all of it.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ridgeline.bench.environment import environment
from ridgeline.course.catalog import notebook
from ridgeline.course.claims import Claim, Range, show_range
from ridgeline.course.exercises import exercises_of
from ridgeline.course.figures import Figure
from ridgeline.course.files import DEVICE, MEASURED, PROFILE, RESULTS, checkout, reader_folder
from ridgeline.errors import ConfigError

UNANSWERED = "not answered yet"
Value = float | int | str
Row = Mapping[str, Value]
_LEVELS = ("", "●○○", "●●○", "●●●")


class ClaimError(AssertionError):
    """A claim of the notebook is not true of this run."""


class ExerciseError(AssertionError):
    """A checker accepted a wrong answer, or refused a solution."""


class Lesson:
    """`Lesson("INF-10")`: owner of all numbers of one run of one notebook."""

    def __init__(self, code: str) -> None:
        """Raises ConfigError for a code that is not in the catalog, or a profile that is neither."""
        self.notebook = notebook(code)
        self.profile = os.environ.get(PROFILE) or "fast"
        if self.profile not in ("fast", "full"):
            raise ConfigError(f"{PROFILE}={self.profile}: expected fast or full")
        self.full = self.profile == "full"
        self.device = os.environ.get(DEVICE) or "cpu"
        """For `LLM(..., device=lesson.device)`."""
        self.values: dict[str, Value] = {}
        self.tables: dict[str, list[Row]] = {}
        self.claims: list[Claim] = []
        self.reported: list[str] = []
        """What is wrong with measured claims, where that does not fail the run."""
        self.exercises = exercises_of(code)
        self._attempts: dict[str, list[str]] = {name: [] for name in self.exercises}
        self._num_refused = dict.fromkeys(self.exercises, 0)
        self._predictions: dict[str, dict[str, Any]] = {}
        self._started = time.monotonic()

    def pick(self, fast: Any, full: Any) -> Any:
        """One of the two, by the profile of this run."""
        return full if self.full else fast

    # What the reader believes

    def predict(self, name: str, guess: float | None, *, unit: str = "") -> None:
        """Keep the reader's guess of the value that will be recorded under `name`; None is no guess."""
        path = reader_folder() / "predictions.json"
        kept: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
        own = kept.setdefault(self.notebook.code, {})
        if guess is not None and RESULTS not in os.environ:
            own[name] = float(guess)
            path.write_text(json.dumps(kept, indent=1) + "\n")
        self._predictions[name] = {"guess": guess, "unit": unit}
        noted = "No guess yet: put a number in place of `None` and run the cell again."
        _show(noted if guess is None else f"Noted: **{guess:g}{_unit(unit)}**. We will come back to it.")

    # What was measured

    def record(self, name: str, value: Value) -> Any:
        """Keep a number (a Figure keeps its spread) or a word for the prose -> the same value."""
        self.values[name] = value
        return value

    def table(self, name: str, rows: Iterable[Row], formats: Mapping[str, str] | None = None) -> None:
        """Show rows as a table and keep them; the keys are the headings, `formats` is by heading (".1f")."""
        kept = [dict(row) for row in rows]
        self.tables[name] = list(kept)
        _show(markdown_table(kept, formats or {}))

    def say(self, text: str) -> None:
        """Show Markdown whose {fields} are recorded: "{speedup:.1f} times ({speedup.low:.1f} at least)".

        Raises KeyError, with the field's name, for what was never recorded.
        """
        _show(inspect.cleandoc(text).format_map(self.values))

    def committed(self, path: str) -> dict[str, Any]:
        """A committed result file of the checkout ("docs/results/quantizers.json"), for slow measurements."""
        document: dict[str, Any] = json.loads((checkout() / path).read_text())
        return document

    def source(self, thing: Callable[..., Any] | type) -> None:
        """Show the package's own code of a function or class, and where it is."""
        found = inspect.unwrap(thing) if callable(thing) else thing
        lines, first = inspect.getsourcelines(found)
        path = inspect.getsourcefile(found) or "?"
        inside = path[path.rindex("ridgeline/") :] if "ridgeline/" in path else path
        code = inspect.cleandoc("\n" + "".join(lines))
        _show(f"`{inside}`, line {first}:\n\n```python\n{code}\n```")

    # What follows

    def claim(
        self,
        name: str,
        statement: str,
        *,
        value: float | Callable[[], float],
        claimed: Range,
        band: Range,
        unit: str = "",
        because: str = "",
    ) -> Claim:
        """Judge a statement by a number, show the verdict, and fail where the number is outside `band`.

        `claimed` is the range that the statement means, `band` the one asserted here, at least 1.5 times as
        wide as the spread. A callable is measured again, once, if its first value is outside the band: for
        timings. `because` finishes "does not hold here, because ..." and may use recorded {fields}.
        Raises ClaimError, but for a measurement (a callable, a Figure with a spread) on a machine where those
        are only reported.
        """
        figure = value() if callable(value) else value
        claim = self._judged(name, statement, figure, claimed, band, unit, because)
        if callable(value) and not claim.expected:
            claim = self._judged(name, statement, value(), claimed, band, unit, because)
        self.claims = [kept for kept in self.claims if kept.name != name] + [claim]
        self.values[name.replace("-", "_")] = claim.value
        _show(self._shown(claim))
        problem = self._problem(claim)
        if problem is None:
            return claim
        was_measured = callable(value) or claim.high > claim.low
        if not (was_measured and os.environ.get(MEASURED) == "report"):
            raise ClaimError(problem)
        self.reported.append(problem)
        _show(f"> ⚠️ {problem}")
        return claim

    def _problem(self, claim: Claim) -> str | None:
        """What is wrong with a claim of this run, in words."""
        where = f"{self.notebook.code} {claim.name}"
        if not claim.expected:
            return (
                f"{where}: measured {claim.value:g}{_unit(claim.unit)}, asserted "
                f"{show_range(claim.band, claim.unit)}. Either the engine changed or the notebook is wrong"
            )
        if not claim.holds and not claim.because:
            return f"{where}: does not hold here, and no reason is given"
        if not claim.band_is_wide_enough():
            return (
                f"{where}: the band {show_range(claim.band, claim.unit)} is narrower than 1.5 times the "
                f"spread of {claim.high - claim.low:g}; measure more, or assert less"
            )
        return None

    def _judged(
        self, name: str, statement: str, figure: float, claimed: Range, band: Range, unit: str, because: str
    ) -> Claim:
        low, high = (figure.low, figure.high) if isinstance(figure, Figure) else (float(figure),) * 2
        values = {**self.values, name.replace("-", "_"): figure}
        reason = because.format_map(values)
        return Claim(name, statement, float(figure), low, high, unit, claimed, band, reason)

    def _shown(self, claim: Claim) -> str:
        spread = f" ({claim.low:.3g} to {claim.high:.3g})" if claim.high > claim.low else ""
        sign = "✅" if claim.holds else "❌"
        return (
            f"> **Claim.** {claim.statement} *({show_range(claim.claimed, claim.unit)})*  \n"
            f"> **Measured:** {claim.value:.4g}{_unit(claim.unit)}{spread}  \n"
            f"> **Verdict:** {sign} {claim.verdict}"
        )

    # Exercises

    def exercise(self, name: str) -> None:
        """The heading of an exercise: difficulty, importance, time box."""
        task = self.exercises[name]
        _show(
            f"**Exercise `{name}`** · difficulty {_LEVELS[task.difficulty]} · importance "
            f"{_LEVELS[task.importance]} · {task.minutes} minutes at most"
        )

    def check(self, name: str, answer: Any) -> None:
        """Show whether the answer is right, and if not, what is wrong with it. Never raises for an answer."""
        wrong = self._wrong(name, answer)
        self._attempts[name].append(wrong or "right")
        _show(f"✅ `{name}`: right." if wrong is None else f"❌ `{name}`: {wrong}")

    def refuses(self, name: str, answer: Any) -> None:
        """For the tests of a checker: raises ExerciseError if it accepts this wrong answer."""
        if self._wrong(name, answer) is None:
            raise ExerciseError(f"{self.notebook.code} {name}: accepts the wrong answer {answer!r}")
        self._num_refused[name] += 1

    def _wrong(self, name: str, answer: Any) -> str | None:
        if answer is None or answer is ...:
            return UNANSWERED
        try:
            return self.exercises[name].check(answer, self)
        except Exception as error:  # whatever the reader's answer makes the checker do
            return f"checking it raised {type(error).__name__}: {error}"

    # The end

    def answer(self) -> None:
        """Show all claims and the predictions beside what was measured, and write the data file."""
        headings = ("claim", "said", "measured", "asserted", "verdict")
        lines = [
            (
                claim.statement,
                show_range(claim.claimed, claim.unit),
                f"{claim.value:.4g}{_unit(claim.unit)}",
                show_range(claim.band, claim.unit),
                claim.verdict,
            )
            for claim in self.claims
        ]
        _show(markdown_table([dict(zip(headings, line, strict=True)) for line in lines], {}))
        for name, prediction in self._predictions.items():
            guess, unit = prediction["guess"], _unit(prediction["unit"])
            measured = self.values[name]
            found = f"{measured:.3g}{unit}" if isinstance(measured, float | int) else measured
            if guess is None:
                _show(f"You made no prediction of *{name.replace('_', ' ')}*; it is **{found}**.")
            else:
                off = f", {measured / guess:.2g} times that" if isinstance(measured, float) and guess else ""
                _show(f"*{name.replace('_', ' ')}*: you said {guess:g}{unit}; it is **{found}**{off}.")
        folder = Path(os.environ.get(RESULTS) or reader_folder())
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.notebook.code}.json"
        path.write_text(json.dumps(self.document(), indent=1, default=float) + "\n")

    def document(self) -> dict[str, Any]:
        """Everything of this run, for the data file."""
        return {
            "code": self.notebook.code,
            "profile": self.profile,
            "device": self.device,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._started, 1),
            "environment": environment(),
            "values": {name: _kept(value) for name, value in self.values.items()},
            "tables": self.tables,
            "claims": [
                asdict(claim) | {"holds": claim.holds, "verdict": claim.verdict} for claim in self.claims
            ],
            "reported": self.reported,
            "predictions": self._predictions,
            "exercises": {
                name: {"attempts": attempts, "refused": self._num_refused[name]}
                for name, attempts in self._attempts.items()
            },
        }


def markdown_table(rows: Sequence[Row], formats: Mapping[str, str]) -> str:
    """Rows with the same keys as a Markdown table; numbers to the right."""
    if not rows:
        return "*(no rows)*"
    headings = list(rows[0])
    numbers = [isinstance(rows[0][heading], int | float) for heading in headings]
    marks = ["---:" if number else "---" for number in numbers]
    lines = [headings, marks]
    lines += [[_cell(row[heading], formats.get(heading)) for heading in headings] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Value, form: str | None) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return format(value, form or ("d" if isinstance(value, int) else ".4g"))


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""


def _kept(value: Value) -> Any:
    if isinstance(value, Figure):
        return {"median": float(value), "low": value.low, "high": value.high, "samples": value.samples}
    return value


def _show(markdown: str) -> None:
    """In a notebook as Markdown, elsewhere as text."""
    try:
        from IPython import get_ipython
        from IPython.display import Markdown, display
    except ImportError:
        print(markdown)
        return
    if get_ipython() is None:
        print(markdown)
    else:
        display(Markdown(markdown))  # type: ignore[no-untyped-call]
