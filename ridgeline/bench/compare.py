"""Which differences between two results are real.

Per metric, the ratio of the medians with its interval from resampling both results. One metric in twenty
would seem different by chance, so p-values are adjusted for the number of metrics (Holm): the verdicts better
and worse then hold for all of them at once. Where the two took turns, what the machine did meanwhile happened
to both, and is left out of the intervals. A ratio says nothing about its cause; where machines, versions or
settings differ, the differences are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from ridgeline.bench.intervals import MIN_SAMPLES, PROCESS_SPREAD, Difference, difference, holm
from ridgeline.bench.result import metric_of
from ridgeline.errors import ConfigError

Verdict = Literal["better", "worse", "no difference shown", "too few samples"]
SIGNIFICANCE = 0.05

INTERLEAVED_SHARE = 0.9
"""Of the iterations, by when they began: so many have one of the other result next."""

_ASIDE = ("created", "command", "environment.load", "settings.seed")
"""Differences that say nothing."""


@dataclass(frozen=True, slots=True)
class ComparedMetric:
    """One metric of both results; ratio and interval are of b to a, None where samples are too few."""

    name: str
    unit: str
    better: str
    median_a: float | None
    median_b: float | None
    ratio: float | None
    low: float | None
    high: float | None
    p_value: float | None
    """Adjusted for the number of metrics."""
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Changed:
    """A value that is not the same in both results."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """b against a."""

    metrics: tuple[ComparedMetric, ...]
    interleaved: bool
    """The two took turns on one machine."""
    changed: tuple[Changed, ...]
    """Settings, workload and environment that differ."""
    missing: tuple[str, ...]
    """Metrics that only one of the results has."""

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {"schema": "ridgeline.comparison/1", **asdict(self)}


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """b against a, both loaded. Raises ConfigError for results of different kinds, or nothing in common."""
    if a["kind"] != b["kind"]:
        raise ConfigError(
            f"a {a['kind']} result and a {b['kind']} result have no metric in common; give two alike"
        )
    names = [name for name in a["metrics"] if name in b["metrics"]]
    if not names:
        raise ConfigError("the results have no metric in common; measure both with the same command")
    interleaved = took_turns(a, b)
    found = {name: _difference(a, b, name, interleaved) for name in names}
    p_values = holm({name: one.p_value for name, one in found.items() if one is not None})
    return Comparison(
        tuple(_compared(a, b, name, found[name], p_values.get(name)) for name in names),
        interleaved,
        tuple(_changes(a, b)),
        tuple(sorted(set(a["metrics"]) ^ set(b["metrics"]))),
    )


def took_turns(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether nearly all iterations of the two alternate. Results without times are taken to be apart."""
    times = [document["details"].get("started_at") or [] for document in (a, b)]
    order = [which for _, which in sorted((at, which) for which in (0, 1) for at in times[which])]
    changes = sum(one != other for one, other in pairwise(order))
    return len(order) > 2 and changes >= INTERLEAVED_SHARE * (len(order) - 1)


def _difference(
    a: Mapping[str, Any], b: Mapping[str, Any], name: str, interleaved: bool
) -> Difference | None:
    one, other = metric_of(a, name), metric_of(b, name)
    if (one.unit, one.better) != (other.unit, other.better):
        raise ConfigError(f"metric {name} is in {one.unit} in one result and {other.unit} in the other")
    if min(len(one.samples), len(other.samples)) < MIN_SAMPLES:
        return None
    if min(a["metrics"][name]["median"], b["metrics"][name]["median"]) <= 0:
        return None
    return difference(
        one.samples,
        other.samples,
        rounds_a=one.rounds,
        rounds_b=other.rounds,
        process_spread=PROCESS_SPREAD,
        in_turns=interleaved,
    )


def _compared(
    a: Mapping[str, Any], b: Mapping[str, Any], name: str, found: Difference | None, p_value: float | None
) -> ComparedMetric:
    one, other = a["metrics"][name], b["metrics"][name]
    verdict: Verdict = "no difference shown"
    if found is None or p_value is None:
        verdict = "too few samples"
    elif p_value < SIGNIFICANCE:
        verdict = "better" if (found.ratio > 1) == (one["better"] == "higher") else "worse"
    return ComparedMetric(
        name,
        one["unit"],
        one["better"],
        one["median"],
        other["median"],
        found.ratio if found else None,
        found.low if found else None,
        found.high if found else None,
        p_value,
        verdict,
    )


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Changed]:
    for group in ("settings", "workload", "environment"):
        one, other = (dict(_leaves(document.get(group), group)) for document in (a, b))
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name) and not name.startswith(_ASIDE):
                yield Changed(name, one.get(name), other.get(name))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    else:
        yield name, value
