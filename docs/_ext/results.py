"""Committed result files as the few figures that pages of the site state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


@cache
def result(name: str) -> Any:
    """docs/results/NAME.json."""
    return json.loads((ROOT / "docs/results" / f"{name}.json").read_text())


def rungs() -> Iterator[Row]:
    """Of the ladder, each with `before`: what the last rung that stayed had measured."""
    details = result("ladder")["details"]
    removals = {one["rung"]["name"]: one for one in details["removals"]}
    before = None
    for step in details["steps"]:
        name, now = step["rung"]["name"], step["measured"]
        tok_s = _median(now["output_tok_s"])
        yield {
            "name": name,
            "tok_s": tok_s,
            "hours": 1e6 / tok_s / 3600,
            "verdict": step["verdict"],
            "stayed": name in details["top"],
            "now": now,
            "before": before and before["now"],
            "times": before and tok_s / before["tok_s"],
            "total": step["speed_up_total"],
            "change": step["change"],
            "without": removals.get(name, {}).get("speed_up"),
        }
        if name in details["top"]:
            before = {"tok_s": tok_s, "now": now}


def rung(name: str) -> Row:
    """One of them by its name."""
    return next(one for one in rungs() if one["name"] == name)


def recipe(name: str) -> Row:
    """A recipe's size and its mean quality over seeds, against the model in float32."""
    rows = [row for row in result("pareto")["details"]["rows"] if row["name"] == name]
    return {
        "bits": rows[0]["sizes"]["bits"],
        "mib": rows[0]["sizes"]["num_bytes"] / 2**20,
        "smaller": rows[0]["sizes"]["ratio"],
        "perplexity": fmean(row["quality"]["perplexity_change"] for row in rows),
        "kl": fmean(row["quality"]["kl_mean"] for row in rows),
        "seconds": fmean(row["seconds"]["total"] for row in rows),
    }


def quantizer(name: str) -> Row:
    """Change of perplexity by a quantizer, all with the same calibration: mean and range over seeds."""
    changes = [
        math.expm1(fmean(run["windows"]["base"]) - fmean(run["windows"]["model"]))
        for key, run in result("quantizers")["runs"].items()
        if key.rpartition("-")[0] == name
    ]
    return {"mean": fmean(changes), "low": min(changes), "high": max(changes)}


def peer(name: str) -> Row:
    """A row of the comparison with llama.cpp: medians, and how many times ours."""
    samples = result("peers")["rows"][name]["samples"]
    ours, theirs = _median(samples["ridgeline"]), _median(samples["llama.cpp"])
    return {"ours": ours, "theirs": theirs, "times": ours / theirs}


def notebook_results(code: str) -> Row | None:
    """notebooks/results/CODE.json, which a run of the notebook wrote; None before the first."""
    path = ROOT / "notebooks/results" / f"{code}.json"
    return json.loads(path.read_text()) if path.exists() else None


def machine(environment: Row) -> str:
    """Of a result file, in words."""
    cpu = environment["cpu"]
    return f"{cpu['model']}, {cpu['cores_usable']} cores, {environment['memory_bytes'] / 2**30:.0f} GiB"


def _median(samples: list[float]) -> float:
    ordered = sorted(samples)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
