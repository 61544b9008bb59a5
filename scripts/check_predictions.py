"""How good are the predictions of `ridgeline roofline` and `plan`? Every figure beside its measurement.

Each model is measured by the commands themselves, in fresh processes; `roofline --measure` takes the limits
of the machine and the rates of the kernels anew just before. Results: docs/results/predictions.json, a page.

    .venv/bin/python scripts/check_predictions.py MODEL.gguf ...
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ridgeline.bench.environment import environment

REPOSITORY = Path(__file__).resolve().parent.parent
OUT, PAGE = REPOSITORY / "docs/results/predictions.json", REPOSITORY / "docs/predictions.md"
BARS = {"decode": 0.15, "prefill": 0.20, "memory": 0.05}
PLAN_OPTIONS = (
    "--max-num-seqs",
    "4",
    "--max-model-len",
    "2048",
    "--kv-cache-tokens",
    "4096",
    "--formats",
    "Q4_0",
)


def command(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ridgeline"), *words, "--json"], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"ridgeline {' '.join(words)}: {done.stderr.strip()[-500:]}")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def measure(model: Path) -> dict[str, Any]:
    """One round: (predicted, measured) of decode and prefill in tok/s, and of the peak in bytes."""
    roofline = command("roofline", "-m", str(model), "--measure")
    prefill = next(e for e in roofline["grid"]["ttft"] if e["prompt_len"] == 512)
    decode = next(e for e in roofline["grid"]["tpot"] if e["batch_size"] == 1)
    plan = command("plan", "-m", str(model), *PLAN_OPTIONS, "--measure")
    return {
        "decode": [1 / decode["predicted_s"], 1 / decode["measured_s"]],
        "prefill": [512 / prefill["predicted_s"], 512 / prefill["measured_s"]],
        "memory": [plan["plan"]["total_bytes"], plan["measured_peak_bytes"]],
        "grid": roofline["grid"],
    }


def page(result: dict[str, Any]) -> str:
    """Markdown: medians over the rounds, and the error of the worst round."""
    counts = sorted({len(rounds) for rounds in result["models"].values()})
    lines = [
        "# Predictions and measurements",
        "",
        f"Made by `{result['command']}` from docs/results/predictions.json; do not edit. "
        f"{result['environment']['cpu']['model']}, {' or '.join(map(str, counts))} rounds, medians; "
        "in brackets the "
        "largest error of a round. Bars: "
        + ", ".join(f"{name} {bar:.0%}" for name, bar in BARS.items())
        + ".",
        "",
        "Decode is one sequence at context 128, prefill a prompt of 512 tokens, both in tok/s; memory is the "
        "peak of a process with the cache of 4,096 tokens filled.",
        "",
        "| model | " + " | ".join(f"{kind} predicted | measured | error" for kind in BARS) + " |",
        "|---" * (1 + 3 * len(BARS)) + "|",
    ]
    for name, rounds in result["models"].items():
        cells = [name]
        for kind in BARS:
            pairs = [r[kind] for r in rounds]
            predicted, measured = (statistics.median(p[i] for p in pairs) for i in (0, 1))
            errors = [p / m - 1 for p, m in pairs]
            shown = [
                f"{x / 2**20:,.0f} MiB" if kind == "memory" else f"{x:,.0f}" for x in (predicted, measured)
            ]
            worst = max(errors, key=abs)
            cells += [*shown, f"{statistics.median(errors):+.1%} ({worst:+.1%})"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "command": "scripts/check_predictions.py " + " ".join(m.name for m in args.models),
        "rounds": args.rounds,
        "bars": BARS,
        "environment": environment(),
        "models": {m.name: [] for m in args.models},
    }
    for _ in range(args.rounds):
        for model in args.models:
            found = measure(model)
            result["models"][model.name].append(found)
            errors = {kind: f"{found[kind][0] / found[kind][1] - 1:+.1%}" for kind in BARS}
            print(model.name, errors, flush=True)
            OUT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
