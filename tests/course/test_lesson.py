"""What a Lesson keeps, shows and refuses."""

import json

import pytest

from ridgeline.course import ClaimError, ExerciseError, Figure, Lesson
from ridgeline.course.exercises import Exercise
from ridgeline.course.files import MEASURED, PROFILE, RESULTS
from ridgeline.errors import ConfigError


@pytest.fixture
def lesson(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv(RESULTS, raising=False)
    return Lesson("INF-10")


def test_prose_takes_its_numbers_from_the_record(lesson, capsys):
    lesson.record("speedup", Figure([2.0, 3.0, 4.0]))
    lesson.say("It is {speedup:.1f} times faster, {speedup.low:.1f} at least.")
    assert "It is 3.0 times faster, 2.5 at least." in capsys.readouterr().out
    with pytest.raises(KeyError, match="speedup_2"):
        lesson.say("{speedup_2}")


def test_a_claim_outside_its_band_fails_after_it_was_kept(lesson):
    with pytest.raises(ClaimError, match="measured 3 x, asserted 5 to 10 x"):
        lesson.claim("c", "s", value=3.0, claimed=(5, 10), band=(5, 10), unit="x")
    assert [claim.name for claim in lesson.claims] == ["c"]


def test_a_timing_is_measured_once_more_a_number_is_not(lesson):
    values = iter([1.0, 7.0, 1.0, 1.0])
    claim = lesson.claim("c", "s", value=lambda: next(values), claimed=(5, 10), band=(5, 10))
    assert claim.value == 7.0
    with pytest.raises(ClaimError):
        lesson.claim("c", "s", value=lambda: next(values), claimed=(5, 10), band=(5, 10))


def test_what_does_not_hold_needs_a_reason_and_a_band_needs_room(lesson):
    with pytest.raises(ClaimError, match="no reason"):
        lesson.claim("c", "s", value=3.0, claimed=(5, 10), band=(1, 10))
    with pytest.raises(ClaimError, match="narrower"):
        lesson.claim("c", "s", value=Figure([1.0, 3.0, 5.0]), claimed=(2, 4), band=(2, 4))
    found = lesson.claim("c", "s", value=3.0, claimed=(5, 10), band=(1, 10), because="it is {c:.2f}")
    assert found.verdict == "does not hold here, because it is 3.00"


def test_where_measurements_are_only_reported_an_exact_claim_still_fails(lesson, monkeypatch, capsys):
    monkeypatch.setenv(MEASURED, "report")
    kept = {"claimed": (5, 10), "band": (5, 10)}
    lesson.claim("timed", "s", value=lambda: 1.0, **kept)
    lesson.claim("spread", "s", value=Figure([2.0, 3.0, 4.0]), **kept)
    with pytest.raises(ClaimError):
        lesson.claim("exact", "s", value=3.0, **kept)
    assert ["timed: measured 1" in lesson.reported[0], "spread: measured 3" in lesson.reported[1]] == [
        True,
        True,
    ]
    assert lesson.document()["reported"] == lesson.reported and "asserted 5 to 10" in capsys.readouterr().out


def _even(answer, lesson):
    return None if answer % 2 == 0 else "it is odd"


def test_a_checker_speaks_and_never_raises(lesson, capsys):
    lesson.exercises = {"even": Exercise(_even, 1, 2, 5)}
    lesson._attempts, lesson._num_refused = {"even": []}, {"even": 0}
    lesson.exercise("even")
    for answer in (..., None, 3, "x", 4):
        lesson.check("even", answer)
    out = capsys.readouterr().out
    assert "difficulty ●○○ · importance ●●○ · 5 minutes" in out
    assert "it is odd" in out and "TypeError" in out and "✅ `even`: right." in out
    assert lesson._attempts["even"][0] == lesson._attempts["even"][1] == "not answered yet"
    lesson.refuses("even", 5)
    with pytest.raises(ExerciseError, match="accepts the wrong answer 6"):
        lesson.refuses("even", 6)


def test_a_prediction_is_kept_and_compared_and_everything_is_written(lesson, tmp_path, capsys):
    lesson.predict("speedup", 4, unit="x")
    kept = json.loads((tmp_path / "ridgeline/course/predictions.json").read_text())
    assert kept == {"INF-10": {"speedup": 4.0}}
    lesson.record("speedup", Figure([2.0, 3.0, 4.0]))
    lesson.table("sizes", [{"tokens": 1, "time (s)": 0.51234}], {"time (s)": ".2f"})
    lesson.claim("one", "one is one", value=1, claimed=(1, 1), band=(1, 1))
    lesson.answer()
    out = capsys.readouterr().out
    assert "you said 4 x; it is **3 x**, 0.75 times that" in out and "| 0.51 |" in out
    document = json.loads((tmp_path / "ridgeline/course/INF-10.json").read_text())
    assert document["values"]["speedup"]["median"] == 3 and document["claims"][0]["holds"] is True
    assert document["tables"]["sizes"][0]["time (s)"] == 0.51234 and document["environment"]["cpu"]


def test_the_source_shown_is_the_file_s_own(lesson, capsys):
    lesson.source(Figure)
    out = capsys.readouterr().out
    assert "`ridgeline/course/figures.py`, line" in out and "class Figure(float):" in out


def test_unknown_code_and_profile(monkeypatch):
    with pytest.raises(ConfigError, match="INF-99"):
        Lesson("INF-99")
    monkeypatch.setenv(PROFILE, "slow")
    with pytest.raises(ConfigError, match="slow"):
        Lesson("INF-10")
