"""Running a notebook: what fails it, what is written, what the form asks for."""

import json

import pytest

from ridgeline.course import runner
from ridgeline.course.catalog import NOTEBOOKS, notebook
from ridgeline.course.exercises import Exercise
from ridgeline.course.files import MEASURED
from ridgeline.errors import ConfigError

pytest.importorskip("nbclient")

SOURCE = """
# %% [markdown]
# ## The question

# %%
from ridgeline.course import Lesson, figure
lesson = Lesson("INF-10")
lesson.predict("number", None)
drawing, axes = figure("A line", x="x", y="y")
_ = axes.plot([1, 2], [1, 2])

# %% tags=["wrong"]
hidden = 1

# %% tags=["solution"]
lesson.claim("number", "a number is two", value={value}, claimed=(2, 2), band=(2, 2))
lesson.answer()
"""


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(runner, "checkout", lambda: tmp_path)
    monkeypatch.setattr(runner, "exercises_of", lambda code: {})
    return tmp_path


def run(checkout, source, **options):
    (checkout / "notebooks/INF-10.py").write_text(source)
    return runner.run_notebook("inf-10", **options)


def test_a_run_without_exercises_says_so_and_saves_nothing(checkout):
    ran = run(checkout, SOURCE.format(value=2), save=True)
    assert ran.problems == ("it has 0 exercises; two are the least",)
    assert ran.results["claims"][0]["holds"] is True
    assert not (checkout / "notebooks/INF-10.ipynb").exists()


def test_a_good_run_is_saved_without_its_wrong_answers(checkout, monkeypatch):
    monkeypatch.setattr(runner, "_form_problems", lambda entry, results: [])
    ran = run(checkout, SOURCE.format(value=2), save=True)
    assert ran.problems == ()
    text = (checkout / "notebooks/INF-10.ipynb").read_text()
    book = json.loads(text)
    assert "hidden = 1" not in text and "INF-10 · KV Cache Implementation" in text and "image/png" in text
    assert book["cells"][-1]["metadata"]["jupyter"]["source_hidden"] is True
    kept = json.loads((checkout / "notebooks/results/INF-10.json").read_text())
    assert f"Runs in {kept['notebook_seconds']:.0f} s on" in text


@pytest.mark.parametrize(
    ("source", "before", "problem"),
    [
        (SOURCE.format(value=3), "", "measured 3, asserted exactly 2"),
        (SOURCE.format(value=2) + "import sys\nprint('careful', file=sys.stderr)\n", "", "stderr: careful"),
        (
            SOURCE.format(value="two"),
            "import builtins\nbuiltins.two = 4",
            "measured 4, asserted exactly 2",
        ),
        (SOURCE.format(value=2) + "class Engine:\n    pass\n", "", "class Engine; a notebook defines none"),
        ("# %%\nimport os\nos._exit(1)\n", "", "died"),
        ("# %%\n1\n", "", "it does not end with lesson.answer()"),
    ],
)
def test_what_fails_a_run(checkout, source, before, problem):
    ran = run(checkout, source, before=before, save=True)
    assert any(problem in found for found in ran.problems), ran.problems
    assert not (checkout / "notebooks/INF-10.ipynb").exists()


def test_a_run_that_reports_is_good_and_is_not_saved(checkout, monkeypatch):
    monkeypatch.setenv(MEASURED, "report")
    monkeypatch.setattr(runner, "_form_problems", lambda entry, results: [])
    source = SOURCE.format(value="lambda: 3")
    ran = run(checkout, source)
    assert ran.problems == () and "measured 3, asserted exactly 2" in ran.results["reported"][0]
    assert run(checkout, source, save=True).problems and not (checkout / "notebooks/INF-10.ipynb").exists()


@pytest.mark.parametrize(
    ("attempts", "refused", "problem"),
    [
        ([runner.UNANSWERED, "right"], 2, None),
        (["right", "right"], 2, "the stub is not answered"),
        ([runner.UNANSWERED, "too small"], 2, "its solution is refused"),
        ([runner.UNANSWERED, "right"], 1, "1 wrong answers were tried"),
    ],
)
def test_the_form_of_exercises(monkeypatch, attempts, refused, problem):
    task = Exercise(lambda answer, lesson: None, 1, 1, 5)
    monkeypatch.setattr(runner, "exercises_of", lambda code: {"a": task, "b": task})
    done = {"attempts": [runner.UNANSWERED, "right"], "refused": 2}
    results = {
        "claims": [1],
        "predictions": {"x": 1},
        "exercises": {"a": {"attempts": attempts, "refused": refused}, "b": done},
    }
    found = list(runner._form_problems(notebook("INF-10"), results))
    assert len(found) == (problem is not None) and all(problem in text for text in found)


def test_a_notebook_that_is_not_written(checkout):
    with pytest.raises(ConfigError, match="not written yet"):
        runner.run_notebook("INF-10")


def test_the_catalog_is_complete_and_in_teaching_order():
    codes = [entry.code for entry in NOTEBOOKS]
    assert len(codes) == len(set(codes)) == 20 and codes == sorted(codes)
    assert sum(entry.minutes for entry in NOTEBOOKS) // 60 == 13
    for number, entry in enumerate(NOTEBOOKS):
        assert set(entry.before) <= set(codes[:number]) and entry.able and entry.sentence.endswith("?")
