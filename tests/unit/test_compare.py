"""Comparing results: differences are called real only where they are, and what else differs is named."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from ridgeline.bench.compare import compare, took_turns
from ridgeline.bench.result import Metric, make_document, save_document
from ridgeline.errors import ConfigError


def result(medians, *, n=30, seed=0, kind="latency", **settings):
    """Metrics named a..., with 2 % of noise."""
    rng = np.random.default_rng(seed)
    metrics = [
        Metric(name, "ms", "lower", tuple(median * (1 + 0.02 * rng.standard_normal(n))))
        for name, median in medians.items()
    ]
    document = make_document(kind, metrics=metrics, settings={"model": "m"} | settings)
    return json.loads(json.dumps(document))


def verdicts(a, b):
    return {m.name: m.verdict for m in compare(a, b).metrics}


def test_real_differences_are_told_from_noise():
    a = result({"same": 10, "slower": 10, "faster": 10})
    b = result({"same": 10, "slower": 11, "faster": 9}, seed=1)
    assert verdicts(a, b) == {"same": "no difference shown", "slower": "worse", "faster": "better"}
    slower = compare(a, b).metrics[1]
    assert slower.low < 1.1 < slower.high and slower.low > 1
    assert slower.ratio == pytest.approx(1.1, rel=0.02)


def test_higher_can_be_better():
    a, b = result({"speed": 10}), result({"speed": 11}, seed=1)
    for document in (a, b):
        document["metrics"]["speed"]["better"] = "higher"
    assert verdicts(a, b) == {"speed": "better"}


def test_results_in_turns_are_compared_without_the_drift_of_the_machine():
    """Both saw the machine slow down by 20 %; one is 3 % slower."""
    course = np.repeat([1.0, 1.2], 20)
    rng = np.random.default_rng(4)
    documents = []
    for number, slower in enumerate((1.0, 1.03)):
        samples = tuple(10 * slower * course * (1 + 0.01 * rng.standard_normal(40)))
        times = [float(2 * i + number) for i in range(40)]
        details = {"started_at": times}
        made = make_document(
            "latency", metrics=[Metric("m", "ms", "lower", samples)], settings={}, details=details
        )
        documents.append(json.loads(json.dumps(made)))
    a, b = documents
    assert took_turns(a, b)
    found = compare(a, b)
    assert found.interleaved and found.metrics[0].verdict == "worse"
    assert found.document()["interleaved"] is True
    for times in ([2 * t for t in a["details"]["started_at"]], [t + 1000 for t in range(40)], []):
        b["details"]["started_at"] = times
        found = compare(a, b)
        assert not found.interleaved and found.metrics[0].verdict == "no difference shown"


def test_many_metrics_without_a_difference_show_none():
    names = {f"m{i}": 10 for i in range(20)}
    shown = 0
    for seed in range(8):
        found = verdicts(result(names, n=10, seed=seed), result(names, n=10, seed=100 + seed))
        shown += "better" in found.values() or "worse" in found.values()
    assert shown <= 1


def test_few_samples_get_no_verdict():
    found = compare(result({"m": 10}, n=4), result({"m": 20}, n=30)).metrics[0]
    assert found.verdict == "too few samples" and found.ratio is None and found.median_b > 19


def test_what_differs_beside_the_figures_is_named():
    a, b = result({"m": 10}, num_threads=1), result({"m": 10, "extra": 3}, num_threads=2)
    b["environment"]["cpu"]["model"] = "another"
    b["environment"]["load"]["average_1min"] = 99
    found = compare(a, b)
    assert {c.name for c in found.changed} == {
        "settings.num_threads",
        "environment.threads",
        "environment.cpu.model",
    }
    assert found.missing == ("extra",)
    assert compare(a, a).changed == ()


def test_results_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigError, match="latency result and a startup result"):
        compare(result({"m": 1}), result({"m": 1}, kind="startup"))
    with pytest.raises(ConfigError, match="no metric in common"):
        compare(result({"m": 1}), result({"k": 1}))


def test_the_command_prints_a_table_and_json(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    save_document(result({"ttft_ms": 10}), a)
    save_document(result({"ttft_ms": 12}, seed=1, num_threads=3), b)
    run = [sys.executable, "-c", "import sys; from ridgeline.cli.bench import bench; bench(sys.argv[1:])"]
    done = subprocess.run([*run, "compare", str(a), str(b)], capture_output=True, text=True, check=True)
    assert "worse" in done.stdout and "settings.num_threads: None -> 3" in done.stdout
    done = subprocess.run(
        [*run, "compare", str(a), str(b), "--json"], capture_output=True, text=True, check=True
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["schema"] == "ridgeline.comparison/1"
    assert document["metrics"][0]["verdict"] == "worse"
