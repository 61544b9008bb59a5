"""Is a 4-bit group-64 model as fast as Q4_0? The same linears in both formats, the same Q8_0 head, in turns.

    python scripts/compare_int4.py Q4_0.gguf [--turns 9]

The group-64 model is made from the file in memory (round to nearest: the method does not change the speed).
Prints the median ratio INT4_G64 / Q4_0 of decode and prefill with its quartiles, for every instruction set
of this machine, each in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from ridgeline.bench.latency import LatencyOptions, time_batch
from ridgeline.compress.quantize import quantize_model
from ridgeline.compress.recipe import recipe_named
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.library import ISA_VARIABLE, usable_isas
from ridgeline.models.load import LoadedModel, load_model

WORKLOAD = LatencyOptions(input_len=512, output_len=65).workload()


def engine_of(model: LoadedModel) -> LLMEngine:
    options = EngineConfig.from_options("in memory", max_model_len=1024, max_num_seqs=1)
    return LLMEngine(options, model, None)


def measure(path: Path, turns: int) -> dict[str, list[float]]:
    """Ratios of each turn, after one that does not count."""
    base = load_model(path)
    grouped = quantize_model(base, recipe_named("rtn-int4-g64").with_options(head_format="keep")).model
    ours, theirs = engine_of(grouped), engine_of(base)
    ratios: dict[str, list[float]] = {"decode_tok_s": [], "prefill_tok_s": []}
    for turn in range(turns + 1):
        a, b = time_batch(ours, WORKLOAD, 2 * turn), time_batch(theirs, WORKLOAD, 2 * turn + 1)
        for name, kept in ratios.items():
            kept.append(a[name][0] / b[name][0])
    return {name: kept[1:] for name, kept in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a Q4_0 file")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--one", action="store_true", help="in this process; ends with JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.model, args.turns)))
        return
    for isa in usable_isas():
        command = [sys.executable, __file__, str(args.model), "--turns", str(args.turns), "--one"]
        found = subprocess.run(
            command, env=os.environ | {ISA_VARIABLE: isa}, capture_output=True, text=True, check=True
        )
        for name, ratios in json.loads(found.stdout.splitlines()[-1]).items():
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{isa:8} {name:13} INT4_G64 / Q4_0: {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
