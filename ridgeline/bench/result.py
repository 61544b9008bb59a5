"""One measurement, one JSON document: what was run, where, every sample, and how sure the figures are.

The schema is `ridgeline.result/1`, described in docs/results-schema.md. A figure is stated only where the
samples carry it: a P95 needs 20 of them, a P99 needs 100, an interval 5; below that the figure is null and
`missing` says how many samples are wanting. All samples are kept, in time order.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ridgeline.bench.environment import environment
from ridgeline.bench.intervals import MIN_SAMPLES, PROCESS_SPREAD, bootstrap_interval, percentile
from ridgeline.errors import ConfigError

SCHEMA = "ridgeline.result/1"
MIN_FOR_PERCENTILE = {"p95": 20, "p99": 100}
"""Samples a percentile needs: with fewer it is one of the largest two or the maximum itself."""

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Metric:
    """Samples of one quantity, in time order."""

    name: str
    unit: str
    better: Better
    samples: tuple[float, ...]
    rounds: tuple[int, ...] = ()
    """How many consecutive samples come from each independent round; empty: no rounds."""

    def interval(self, *, in_turns: bool = False) -> tuple[float, float]:
        """The 95 % interval of the median; `in_turns`: without the drift of the machine, see `intervals`.

        Raises ConfigError for fewer than MIN_SAMPLES samples.
        """
        return bootstrap_interval(
            self.samples, rounds=self.rounds, process_spread=PROCESS_SPREAD, in_turns=in_turns
        )

    def summary(self) -> dict[str, Any]:
        """The entry of the document; samples that are not finite raise ConfigError."""
        if not all(math.isfinite(sample) for sample in self.samples):
            raise ConfigError(f"metric {self.name}: a sample is not a finite number; leave such samples out")
        n = len(self.samples)
        figures: dict[str, Any] = {
            "mean": statistics.fmean(self.samples) if n else None,
            "median": statistics.median(self.samples) if n else None,
        }
        missing = {}
        for name, needed in MIN_FOR_PERCENTILE.items():
            figures[name] = percentile(self.samples, float(name[1:])) if n >= needed else None
            if n < needed:
                missing[name] = needed - n
        figures["ci95"] = list(self.interval()) if n >= MIN_SAMPLES else None
        if n < MIN_SAMPLES:
            missing["ci95"] = MIN_SAMPLES - n
        return {
            "unit": self.unit,
            "better": self.better,
            "n": n,
            **figures,
            "missing": missing,
            "rounds": list(self.rounds),
            "samples": list(self.samples),
        }


def make_document(
    kind: str,
    *,
    metrics: Sequence[Metric],
    settings: Mapping[str, Any],
    workload: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (),
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The result document of a measurement that was made just now by this process.

    kind: what was measured, as "latency"; settings: everything that was chosen, ready for JSON; workload:
    `Workload.describe()`; seeds: of the prompts, one a repetition; details: anything more. A `num_threads`
    in the settings is the environment's `threads`.
    """
    num_threads = settings.get("num_threads")
    return {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(sys.argv),
        "environment": environment(num_threads=num_threads),
        "settings": dict(settings),
        "workload": None if workload is None else dict(workload),
        "seeds": list(seeds),
        "metrics": {metric.name: metric.summary() for metric in metrics},
        "details": dict(details or {}),
    }


_KEYS: Mapping[str, type] = {
    "schema": str,
    "kind": str,
    "created": str,
    "command": list,
    "environment": dict,
    "settings": dict,
    "seeds": list,
    "metrics": dict,
    "details": dict,
}
_METRIC_KEYS: Mapping[str, type] = {"unit": str, "better": str, "n": int, "samples": list}


def load_document(path: str | Path) -> dict[str, Any]:
    """Read a result: a file with one document, or the output of a `--json` command (its last line counts).

    Raises ConfigError for a file that cannot be read, is no JSON, has another schema or lacks a key.
    """
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"result {path}: cannot be read ({error}); give a file that bench wrote") from None
    for candidate in (text, text.rpartition("\n")[2]):
        try:
            document = json.loads(candidate)
            break
        except ValueError:
            continue
    else:
        raise ConfigError(f"result {path}: no JSON document; give a file written by --save-result or --json")
    check_document(document, str(path))
    assert isinstance(document, dict)
    return document


def check_document(document: Any, source: str) -> None:
    """Raises ConfigError that names what is wrong with a document."""
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise ConfigError(
            f"result {source}: schema {found!r}, expected {SCHEMA!r}; measure again with this version"
        )
    named = document["metrics"].items() if isinstance(document.get("metrics"), dict) else ()
    for entry, keys, where in (
        (document, _KEYS, ""),
        *((metric, _METRIC_KEYS, f"metrics.{name}.") for name, metric in named),
    ):
        for key, kind in keys.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise ConfigError(
                    f"result {source}: {where}{key} is missing or no {kind.__name__}; "
                    "give a file that bench wrote"
                )


def save_document(document: Mapping[str, Any], path: str | Path) -> None:
    """Write it for people and git alike: indented. Raises ConfigError."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"result {path}: cannot be written ({error}); choose another path") from None


def metric_of(document: Mapping[str, Any], name: str) -> Metric:
    """A metric of a loaded document, with its samples."""
    entry = document["metrics"][name]
    return Metric(
        name, entry["unit"], entry["better"], tuple(entry["samples"]), tuple(entry.get("rounds", ()))
    )
