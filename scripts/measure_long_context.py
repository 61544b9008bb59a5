#!/usr/bin/env python3
"""Loss by position of SmolLM2 beyond the 8,192 tokens it was trained for, one setting at a time.

    scripts/measure_long_context.py none yarn --length 12288

A window of 12,288 tokens takes half a minute on two cores, so this is measured once and kept in
docs/results/long_context.json; settings that are named replace what the file holds of them. INF-23 reads it.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline import LLM
from ridgeline.bench.environment import environment
from ridgeline.quality.perplexity import perplexity
from ridgeline.quality.text import load_text, tokenize

OUT = Path(__file__).parents[1] / "docs/results/long_context.json"
BIN = 1024
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "NTK": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "window": {"sliding_window": 1024},
    "window and sinks": {"sliding_window": 1024, "num_sinks": 4},
}


def measure(name: str, length: int, num_windows: int) -> dict[str, Any]:
    """The losses of all windows by thousands of positions."""
    options = SETTINGS[name] | {"max_model_len": length, "kv_cache_tokens": length, "max_num_seqs": 1}
    with LLM("smollm2", executor="native", **options) as llm:
        tokens = tokenize(llm, load_text(), num_tokens=length * num_windows)
        result = perplexity(llm, tokens, context=length)
    losses = -np.array(result.log_likelihoods)  # [windows, length - 1], of positions 1, 2, ...
    bins = [losses[:, max(start - 1, 0) : start + BIN - 1] for start in range(0, length, BIN)]
    return {
        "options": SETTINGS[name],
        "length": length,
        "num_windows": num_windows,
        "bin": BIN,
        "nll": [float(b.mean()) for b in bins],
        "nll_of_windows": [[float(row.mean()) for row in b] for b in bins],
        "seconds": result.seconds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), help=", ".join(SETTINGS))
    parser.add_argument("--length", type=int, default=12288)
    parser.add_argument("--windows", type=int, default=1)
    args = parser.parse_args()
    document = json.loads(OUT.read_text()) if OUT.exists() else {"settings": {}}
    for name in args.settings:
        document["settings"][name] = measure(name, args.length, args.windows)
        document["command"] = "scripts/measure_long_context.py"
        document["date"] = document["settings"][name]["date"]
        document["environment"] = environment()
        OUT.write_text(json.dumps(document, indent=1) + "\n")
        nll = document["settings"][name]["nll"]
        sys.stdout.write(f"{name}: " + " ".join(f"{np.exp(x):.1f}" for x in nll) + "\n")


if __name__ == "__main__":
    main()
