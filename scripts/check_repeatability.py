"""Does `ridgeline bench` find the same figure twice? Trials of two processes, iterations of A and B in turn.

In a good trial the 95 % intervals of A and B overlap for every median that is reported: the intervals for
measurements in turns, which leave out what the machine did to both. The claim is 19 good trials of 20, with
every half-width under 5 % of its median; how wide the intervals with the drift are stands beside it. Trials
are added to the file until it has as many as asked for, so that a long check can be done in parts; a file of
another model is begun anew.

    python scripts/check_repeatability.py smollm2 --trials 20
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ridgeline.bench.compare import took_turns
from ridgeline.bench.environment import environment
from ridgeline.bench.intervals import half_width
from ridgeline.bench.result import load_document

OUT = Path(__file__).parents[1] / "docs/results/repeatability.json"
OPTIONS = ("--input-len", "128", "--output-len", "33", "--num-iters", "120", "--max-time", "0")
"""Both processes make the same number of iterations, so that they see the machine in the same minute."""
ENOUGH = 0.95
HALF_WIDTH = 0.05


def measure_two(model: str) -> list[dict[str, Any]]:
    """Two fresh processes side by side, which take turns -> what each found."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.json" for name in "ab"]
        run = "import sys; from ridgeline.cli.bench import bench; bench(sys.argv[1:])"
        command = [sys.executable, "-c", run, "latency", "-m", model, *OPTIONS, "--save-result"]
        processes = [subprocess.Popen([*command, str(path)], stdout=subprocess.DEVNULL) for path in paths]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            sys.exit("a measurement failed")
        documents = [load_document(path) for path in paths]
        assert took_turns(*documents), "the two did not take turns"
        return [_shortened(document) for document in documents]


def _shortened(document: dict[str, Any]) -> dict[str, Any]:
    """Median and both intervals by metric, and how it was measured."""
    details = document["details"]
    in_turns = details["intervals_in_turns"]
    return {
        "seconds": round(details["seconds"], 1),
        "num_iters": details["num_iters"],
        "stopped": details["stopped"],
        "metrics": {
            name: {key: metric[key] for key in ("median", "ci95")}
            | {"in_turns": in_turns[name], "half_width": half_width(in_turns[name], metric["median"])}
            | {"half_width_with_drift": details["half_widths"][name]}
            for name, metric in document["metrics"].items()
        },
    }


def overlap(a: dict[str, Any], b: dict[str, Any]) -> dict[str, bool]:
    """By metric, whether the intervals have a point in common."""
    intervals = {n: (metric["in_turns"], b["metrics"][n]["in_turns"]) for n, metric in a["metrics"].items()}
    return {name: one[0] <= other[1] and other[0] <= one[1] for name, (one, other) in intervals.items()}


def summarize(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over the trials, and whether the claim holds for them."""
    good = sum(all(trial["overlap"].values()) for trial in trials)
    runs = [trial[which] for trial in trials for which in "ab"]
    names = runs[0]["metrics"]
    widest = {name: max(run["metrics"][name]["half_width"] for run in runs) for name in names}
    drifting = [max(m["half_width_with_drift"] for m in run["metrics"].values()) for run in runs]
    return {
        "trials": len(trials),
        "all_overlap": good,
        "overlap": {name: sum(trial["overlap"][name] for trial in trials) for name in names},
        "largest_half_width": widest,
        "with_drift": {
            "largest_half_width": max(drifting),
            "below_5_percent": sum(width < HALF_WIDTH for width in drifting),
        },
        "largest_difference": {
            name: max(
                abs(trial["b"]["metrics"][name]["median"] / trial["a"]["metrics"][name]["median"] - 1)
                for trial in trials
            )
            for name in names
        },
        "met": good >= ENOUGH * len(trials) and max(widest.values()) < HALF_WIDTH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--trials", type=int, default=20, help="trials the file shall have")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after the trial that passes this")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    started = time.monotonic()
    setup = {"model": Path(args.model).name, "options": list(OPTIONS), "intervals": "in turns"}
    trials: list[dict[str, Any]] = []
    if args.out.exists():
        kept = json.loads(args.out.read_text())
        trials = kept["trials"] if kept["setup"] == setup else []
    while len(trials) < args.trials and time.monotonic() - started < args.seconds:
        a, b = measure_two(args.model)
        trials.append({"overlap": overlap(a, b), "a": a, "b": b})
        document = {
            "setup": setup,
            "environment": environment(),
            "summary": summarize(trials),
            "trials": trials,
        }
        args.out.write_text(json.dumps(document, indent=1) + "\n")
        apart = [name for name, same in trials[-1]["overlap"].items() if not same]
        print(f"trial {len(trials)}: {'apart: ' + ', '.join(apart) if apart else 'overlap'}", flush=True)
    print(json.dumps(summarize(trials), indent=1))


if __name__ == "__main__":
    main()
