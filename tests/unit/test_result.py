"""Result documents: what is in them, what is withheld, and that the page in docs names every key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ridgeline.bench.environment import environment
from ridgeline.bench.result import Metric, load_document, make_document, metric_of, save_document
from ridgeline.bench.workload import NAMED
from ridgeline.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs/results-schema.md"


def document(n=30, **fields):
    metric = Metric("ttft_s", "s", "lower", tuple(1.0 + i / 100 for i in range(n)))
    defaults = {"metrics": [metric], "settings": {"model": "m", "num_threads": 2}, "seeds": [1, 2]}
    return make_document("latency", **(defaults | fields))


def test_a_document_has_every_figure_its_samples_carry():
    entry = document(100)["metrics"]["ttft_s"]
    assert entry["n"] == 100 and entry["missing"] == {}
    assert entry["median"] == pytest.approx(1.495) and entry["p99"] == pytest.approx(1.9801)
    assert entry["ci95"][0] < entry["median"] < entry["ci95"][1]


@pytest.mark.parametrize(
    ("n", "missing"),
    [
        (99, {"p99": 1}),
        (20, {"p99": 80}),
        (19, {"p95": 1, "p99": 81}),
        (4, {"p95": 16, "p99": 96, "ci95": 1}),
        (0, {"p95": 20, "p99": 100, "ci95": 5}),
    ],
)
def test_a_figure_without_enough_samples_is_null(n, missing):
    entry = document(n)["metrics"]["ttft_s"]
    assert entry["missing"] == missing
    assert {name for name in ("p95", "p99", "ci95") if entry[name] is None} == set(missing)


def test_a_sample_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="x: a sample is not a finite number"):
        Metric("x", "s", "lower", (1.0, float("nan"))).summary()


def test_a_document_comes_back(tmp_path):
    path = tmp_path / "a.json"
    made = document()
    save_document(made, path)
    assert load_document(path) == json.loads(json.dumps(made))
    assert metric_of(load_document(path), "ttft_s").samples[:2] == (1.0, 1.01)
    path.write_text("progress\nmore\n" + json.dumps(made) + "\n")
    assert load_document(path)["seeds"] == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no", "no JSON document"),
        ("[]", "schema None, expected 'ridgeline.result/1'"),
        ('{"schema": "ridgeline.result/9"}', "schema 'ridgeline.result/9'"),
        ('{"schema": "ridgeline.result/1", "metrics": {}}', "kind is missing"),
    ],
)
def test_a_wrong_file_is_explained(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_document(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_document(tmp_path / "none.json")


def test_a_metric_without_samples_is_explained(tmp_path):
    made = document()
    del made["metrics"]["ttft_s"]["samples"]
    save_document(made, tmp_path / "a.json")
    with pytest.raises(ConfigError, match=r"metrics\.ttft_s\.samples is missing"):
        load_document(tmp_path / "a.json")


def test_the_environment_says_where():
    found = environment(num_threads=2)
    assert found["cpu"]["cores_usable"] >= 1 and found["threads"] == 2
    assert found["memory_bytes"] > 1e8 and found["libraries"]["numpy"]
    assert json.loads(json.dumps(found)) == found


def keys(value, path=""):
    """Paths of all keys, with names of metrics, variables and the like left open."""
    if isinstance(value, dict) and path not in ("settings", "details", "environment.variables"):
        for key, inner in value.items():
            name = "NAME" if path in ("metrics", "environment.libraries") else key
            yield f"{path}.{name}".lstrip(".")
            yield from keys(inner, f"{path}.{name}".lstrip("."))


def test_the_page_names_every_key():
    page = PAGE.read_text(encoding="utf-8")
    found = set(keys(document(workload=NAMED["w5"].describe())))
    assert len(found) > 50
    assert [key for key in sorted(found) if f"`{key}`" not in page] == []
