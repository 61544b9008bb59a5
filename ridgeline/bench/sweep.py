"""The highest request rate at which a server keeps its promise.

The promise is a service level objective (SLO), such as `p95_ttft_ms=500,p95_tpot_ms=50`. The rate is doubled
(or halved) until one rate keeps it and the next does not; then the gap is bisected, geometrically, until it
is narrow. Every point has enough requests for its percentiles, lasts long enough for a queue to show, has
words of its own, and stays in the document. A request that fails breaks the promise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ridgeline.bench.load import Progress
from ridgeline.bench.result import MIN_FOR_PERCENTILE, Metric, make_document
from ridgeline.bench.serve import ServeOptions, measure_serve
from ridgeline.errors import ConfigError

_NAME = re.compile(r"(mean|median|p50|p95|p99)_((?:ttft|tpot|itl|e2el)_ms)")
_GOODPUT_SHARE = "goodput_share"
_MAX_DOUBLINGS = 8


@dataclass(frozen=True, slots=True)
class Objective:
    """One limit: a statistic of a latency at most, or the share of good requests at least."""

    name: str
    limit: float

    def value(self, document: Mapping[str, Any]) -> float | None:
        """The figure of a result of `measure_serve`; None where the samples are too few for it."""
        if self.name == _GOODPUT_SHARE:
            found = document["details"][_GOODPUT_SHARE]
        else:
            statistic, _, metric = self.name.partition("_")
            found = document["metrics"][metric]["median" if statistic == "p50" else statistic]
        return None if found is None else float(found)

    def is_met(self, document: Mapping[str, Any]) -> bool:
        value = self.value(document)
        if value is None:
            return False
        return value >= self.limit if self.name == _GOODPUT_SHARE else value <= self.limit


def parse_slo(text: str) -> tuple[Objective, ...]:
    """Read NAME=LIMIT,NAME=LIMIT. Raises ConfigError.

    A name is mean, median, p50, p95 or p99 of ttft_ms, tpot_ms, itl_ms or e2el_ms, or goodput_share.
    """
    objectives = []
    for part in text.split(","):
        name, _, limit = part.strip().partition("=")
        try:
            objectives.append(Objective(name, float(limit)))
        except ValueError:
            name = ""
        if name != _GOODPUT_SHARE and not _NAME.fullmatch(name):
            raise ConfigError(
                f"--slo {part.strip()!r}: expected such as p95_ttft_ms=500 (mean, median, p95 or p99 of "
                "ttft_ms, tpot_ms, itl_ms or e2el_ms) or goodput_share=0.9, with commas between"
            )
    return tuple(objectives)


def highest_rate(
    meets: Callable[[float], bool], *, start: float, tolerance: float
) -> tuple[float | None, float | None]:
    """(highest rate found that meets, lowest found that does not); None: no such rate within reach.

    The two are at most a factor 1 + tolerance apart, unless one is None.
    """
    kept: float | None = None
    broken: float | None = None
    rate = start
    for _ in range(_MAX_DOUBLINGS + 1):
        if meets(rate):
            kept, rate = rate, rate * 2
        else:
            broken, rate = rate, rate / 2
        if kept is not None and broken is not None:
            break
    while kept is not None and broken is not None and broken > kept * (1 + tolerance):
        rate = math.sqrt(kept * broken)
        if meets(rate):
            kept = rate
        else:
            broken = rate
    return kept, broken


def sweep(
    options: ServeOptions,
    *,
    slo: str,
    tolerance: float = 0.1,
    point_s: float = 20.0,
    measure: Callable[..., dict[str, Any]] = measure_serve,
    progress: Callable[[float], Progress | None] = lambda rate: None,
) -> dict[str, Any]:
    """Find the highest rate that meets the SLO, starting at --request-rate (or 1 request/s).

    A point has at least --num-prompts requests, as many as the SLO's percentiles need, and `point_s` seconds
    of arrivals. `progress` is given each rate and returns what to tell of that point. Raises ConfigError.
    """
    objectives = parse_slo(slo)
    if not tolerance > 0 or not point_s > 0:
        raise ConfigError(f"tolerance={tolerance}, point_s={point_s}: expected more than 0 of both")
    if any(o.name == _GOODPUT_SHARE for o in objectives) and not options.limits_ms:
        raise ConfigError(
            "--slo goodput_share needs the limits of a good request: --goodput ttft:500 tpot:50"
        )
    needed = max(MIN_FOR_PERCENTILE.get(o.name.partition("_")[0], 1) for o in objectives)
    documents: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []

    def meets(rate: float) -> bool:
        wanted = max(options.num_prompts or 0, needed, math.ceil(rate * point_s))
        turns = options.chosen_workload().turns
        document = measure(
            replace(
                options,
                request_rate=rate,
                num_prompts=-(-wanted // turns) * turns,
                seed=options.seed + len(points) * options.num_runs,
                num_warmups=0 if points else options.num_warmups,
            ),
            progress=progress(rate),
        )
        failed = document["details"]["num_failed"]
        kept = failed == 0 and all(objective.is_met(document) for objective in objectives)
        documents.append(document)
        points.append(
            {
                "request_rate": rate,
                "meets_slo": kept,
                "slo": {o.name: o.value(document) for o in objectives},
                "num_requests": document["details"]["num_requests"],
                "num_failed": failed,
                "seeds": document["seeds"],
                "metrics": document["metrics"],
                "warnings": document["details"]["warnings"],
                "client": document["details"]["client"],
            }
        )
        return kept

    kept, broken = highest_rate(meets, start=options.request_rate or 1.0, tolerance=tolerance)
    first = documents[0]
    settings = {"goodput": [*options.goodput], "slo": slo, "tolerance": tolerance, "point_s": point_s}
    best = [point for point in points if point["request_rate"] == kept]
    return make_document(
        "serve-sweep",
        metrics=[Metric("max_request_rate", "requests/s", "higher", () if kept is None else (kept,))],
        settings=asdict(options) | settings,
        workload=first["workload"],
        seeds=[seed for point in points for seed in point["seeds"]],
        details={
            "definitions": first["details"]["definitions"],
            "server": first["details"]["server"],
            "max_request_rate": kept,
            "lowest_rate_that_fails": broken,
            "output_throughput": best[0]["metrics"]["output_throughput"]["mean"] if best else None,
            "points": sorted(points, key=lambda point: float(point["request_rate"])),
        },
    )


def sweep_summary(document: Mapping[str, Any]) -> str:
    """A result of `sweep` for people."""
    found = document["details"]
    rows = []
    for point in found["points"]:
        figures = ", ".join(f"{k}={'-' if v is None else format(v, ',.2f')}" for k, v in point["slo"].items())
        verdict = "meets" if point["meets_slo"] else "FAILS"
        rows.append(
            f"{point['request_rate']:>9.3f} requests/s  {verdict}  {figures}  "
            f"({point['num_requests']} requests, {point['num_failed']} failed)"
        )
    kept, broken = found["max_request_rate"], found["lowest_rate_that_fails"]
    if kept is None:
        rows.append(f"no rate down to {broken:.3g} requests/s meets {document['settings']['slo']}")
    elif broken is None:
        rows.append(f"{kept:.3g} requests/s still meets {document['settings']['slo']}; the limit is higher")
    else:
        rows.append(
            f"highest rate that meets {document['settings']['slo']}: {kept:.3f} requests/s "
            f"({broken:.3f} does not)"
        )
    return "\n".join(rows)
