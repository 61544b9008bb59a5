"""`ridgeline course` without running notebooks."""

import json

import pytest

from ridgeline.cli import course as cli
from ridgeline.cli.main import main
from ridgeline.course import Lesson
from ridgeline.course.files import RESULTS
from ridgeline.course.runner import Ran


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv(RESULTS, raising=False)
    return tmp_path


def said(capsys, *tokens):
    with pytest.raises(SystemExit) as stop:
        main(["course", *tokens])
    assert not stop.value.code
    return capsys.readouterr().out


def test_list(capsys):
    out = said(capsys, "list")
    assert "Fundamentals (130 min)" in out and out.count("INF-") == 20
    entries = json.loads(said(capsys, "list", "--json"))["notebooks"]
    assert entries[4]["code"] == "INF-10" and entries[4]["before"] == ["INF-02"]


def test_ledger_reads_the_committed_runs(capsys, monkeypatch, tmp_path):
    claim = {
        "name": "c",
        "statement": "It helps",
        "value": 3.0,
        "unit": "x",
        "holds": False,
        "verdict": "does not hold here, because of x",
    }
    path = tmp_path / "INF-10.json"
    path.write_text(
        json.dumps({"code": "INF-10", "date": "2026-11-26", "profile": "fast", "claims": [claim]})
    )
    monkeypatch.setattr(cli, "results_path", lambda code: tmp_path / f"{code}.json")
    out = said(capsys, "ledger")
    assert "- INF-10 It helps: 3 x" in out and "1 claims in 1 notebooks; 0 hold here" in out
    assert json.loads(said(capsys, "ledger", "--json"))["claims"][0]["code"] == "INF-10"


def test_progress(capsys, home):
    assert "0 of 20 notebooks; the next is INF-00" in said(capsys, "progress")
    lesson = Lesson("INF-00")
    lesson.predict("speed", 5)
    lesson.predict("other", None)
    lesson.record("speed", 4.0)
    lesson.record("other", 1)
    lesson.answer()
    capsys.readouterr()
    out = said(capsys, "progress")
    assert (
        "INF-00  run" in out
        and "speed: you said 5, measured 4" in out
        and "other: no guess, measured 1" in out
    )
    assert "the next is INF-01" in out
    assert set(json.loads(said(capsys, "progress", "--json"))["notebooks"]) == {"INF-00"}


def test_run_tells_and_fails(capsys, monkeypatch):
    ran = Ran("INF-10", 1.0, {}, ("a claim broke",))
    monkeypatch.setattr(cli, "run_notebook", lambda code, **options: ran)
    with pytest.raises(SystemExit) as stop:
        main(["course", "run", "inf-10", "--json"])
    captured = capsys.readouterr()
    assert stop.value.code == 1 and "! a claim broke" in captured.err
    assert json.loads(captured.out)["notebooks"][0]["problems"] == ["a claim broke"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["run"], "give the codes"),
        (["run", "--all", "INF-10"], "give the codes"),
        (["run", "INF-99"], "is no notebook"),
        (["run", "INF-10", "--fast", "--full"], "give one"),
    ],
)
def test_mistakes(tokens, message):
    with pytest.raises(SystemExit) as stop:
        main(["course", *tokens])
    assert message in str(stop.value.code)
