"""The notebooks as they lie in the repository: sources keep to the form, committed runs belong to them."""

import json

import pytest

from ridgeline.course.catalog import NOTEBOOKS
from ridgeline.course.exercises import exercises_of
from ridgeline.course.runner import read_source, results_path, source_path
from ridgeline.course.sources import exported_names, source_problems

pytest.importorskip("jupytext")
WRITTEN = [entry for entry in NOTEBOOKS if source_path(entry).exists()]
EXPORTED = exported_names()


@pytest.mark.parametrize("entry", WRITTEN, ids=lambda entry: entry.code)
def test_a_notebook_defines_no_engine(entry):
    assert list(source_problems(source_path(entry), EXPORTED)) == []


def test_the_rule_itself(tmp_path):
    path = tmp_path / "INF-10.py"
    path.write_text(
        "def f():\n    a = 1\n    a = 1\n    a = 1\n    a = 1\n    a = 1\n\n\ndef quantize(): ...\n"
    )
    assert len(list(source_problems(path, frozenset({"quantize"})))) == 2
    assert {"LLM", "Scheduler", "Program"} <= EXPORTED


@pytest.mark.parametrize("entry", WRITTEN, ids=lambda entry: entry.code)
def test_the_form_of_a_source(entry):
    book = read_source(entry)
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    headings = (
        "The question",
        "The arithmetic",
        "Where it does not help",
        "Exercises",
        "In production",
        "Reading list",
    )
    places = [text.find(f"## {heading}") for heading in headings]
    assert -1 not in places and places == sorted(places), dict(zip(headings, places, strict=True))
    code = "\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    for name in exercises_of(entry.code):
        assert f'lesson.exercise("{name}")' in code, name
    assert "lesson.source(" in code and "lesson.predict(" in code and "figure(" in code


@pytest.mark.parametrize("entry", WRITTEN, ids=lambda entry: entry.code)
def test_the_committed_notebook_is_a_run_of_its_source(entry):
    path = source_path(entry).with_suffix(".ipynb")
    book = json.loads(path.read_text())
    ran = ["".join(cell["source"]) for cell in book["cells"]][1:]
    wanted = [c.source for c in read_source(entry).cells[1:] if "wrong" not in c.metadata.get("tags", ())]
    assert ran == wanted, f"run it again: ridgeline course run {entry.code} --save"
    assert not any(
        output.get("name") == "stderr" for cell in book["cells"] for output in cell.get("outputs", ())
    )
    results = json.loads(results_path(entry.code).read_text())
    assert results["claims"] and results["code"] == entry.code
    assert "image/png" in path.read_text(), "a notebook has a plot"
