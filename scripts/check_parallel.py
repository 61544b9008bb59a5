"""Do several ranks give the same tokens, and what do they cost?

Tokens: greedy answers of the real model by every arrangement of ranks, against one process; where they part,
the difference of the two largest logits there (the margin) says whether rounding could decide it. Speed: one
process with two threads and two ranks with one thread each, in turn, on W3 and on a single stream. Memory:
peak of each rank beside the plan. Results: docs/results/parallel.json, page: docs/parallel.md.

    python scripts/check_parallel.py tokens speed memory --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ridgeline import LLM, SamplingParams
from ridgeline.bench.drive import drive
from ridgeline.bench.environment import environment
from ridgeline.bench.throughput import samples_of
from ridgeline.bench.workload import NAMED
from ridgeline.config import EngineConfig
from ridgeline.models.load import describe_model
from ridgeline.models.locate import locate_model
from ridgeline.models.synth import synthesize
from ridgeline.profiling.plan import (
    measure_peak,
    measure_process,
    measure_rank_peaks,
    measure_rank_process,
    plan_memory,
    plan_ranks,
)

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS, PAGE = REPOSITORY / "docs/results/parallel.json", REPOSITORY / "docs/parallel.md"
MODEL = "smollm2"
ARRANGEMENTS = ((2, 1), (3, 1), (1, 2), (1, 3), (2, 2))
KINDS: dict[str, dict[str, Any]] = {
    "native": {"executor": "native"},
    "native float32": {"executor": "native", "dtype": "float32", "kv_cache_dtype": "float32"},
    "eager float32": {"executor": "eager", "dtype": "float32"},
}
NUM_PROMPTS, NUM_TOKENS = 20, 32
SPEED = {"one process": {"num_threads": 2}}
SPEED |= {"TP=2": {"num_threads": 1, "tp_size": 2}, "PP=2": {"num_threads": 1, "pp_size": 2}}
BARS = {("TP=2", "w3"): 0.80, ("TP=2", "decode"): 0.75, ("PP=2", "w3"): 0.85}
MEMORY_ERROR = 0.05


def prompts() -> list[list[int]]:
    """Pieces of the evaluation text, each longer than the last, the first 32 tokens of all of them alike."""
    from ridgeline.quality.text import load_text, tokenize

    with LLM(MODEL, max_model_len=512, kv_cache_tokens=512) as llm:
        ids = tokenize(llm, load_text(), num_tokens=NUM_PROMPTS * 128)
    return [ids[:32] + ids[128 * i + 32 : 128 * i + 40 + 4 * i] for i in range(NUM_PROMPTS)]


def answers(asked: list[list[int]], **options: Any) -> tuple[list[Any], Any]:
    """Outputs with the two most likely tokens of each place, and what rank 0 communicated."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    common = {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_tokens": 2048, "max_num_batched_tokens": 64}
    with LLM(MODEL, num_threads=1, **common, **options) as llm:
        outputs = [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in asked], params)]
        executor = llm.engine.executor
        traffic = executor.communication()[0] if hasattr(executor, "communication") else {}
    return outputs, {name: t.num_bytes for name, t in traffic.items()}


def compare_tokens() -> dict[str, Any]:
    """Continuous batching of 8, chunks of 64 tokens, a shared prefix, a small cache."""
    asked, found = prompts(), {}
    for kind, options in KINDS.items():
        base, _ = answers(asked, **options)
        for tp, pp in ARRANGEMENTS:
            outputs, traffic = answers(asked, **options, tp_size=tp, pp_size=pp)
            margins = []
            for one, other in zip(base, outputs, strict=True):
                differs = [
                    i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if a != b
                ]
                if differs:
                    best, second = sorted(
                        (e.logprob for e in one.logprobs[differs[0]].values()), reverse=True
                    )[:2]
                    margins.append(best - second)
            name = f"{kind}, TP={tp} PP={pp}"
            found[name] = {
                "num_identical": NUM_PROMPTS - len(margins),
                "margins": margins,
                "rank_0_bytes": traffic,
            }
            print(name, found[name], flush=True)
    return found


def compare_speed(rounds: int) -> dict[str, Any]:
    """In turn, so that a slow minute slows all of them."""
    common = {"max_num_seqs": 16, "max_model_len": 1024, "kv_cache_tokens": 16 * 1024}
    llms = {name: LLM(MODEL, **common, **options) for name, options in SPEED.items()}
    w3 = replace(NAMED["w3"], max_concurrency=None)
    found: dict[str, dict[str, list[float]]] = {n: {"w3": [], "decode": [], "collectives": []} for n in llms}
    stream = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    for seed in range(-1, rounds):
        for name, llm in llms.items():
            executor = llm.engine.executor
            before = _collective_s(executor)
            requests = w3.requests(vocab_size=llm.engine.model.config.vocab_size, seed=seed + 1)
            started = time.perf_counter()
            times = drive(llm.engine, requests)
            elapsed = time.perf_counter() - started
            share = (_collective_s(executor) - before) / elapsed
            ids = [int(i) + 100 for i in range(32)]
            ids[0] += seed + 1
            llm.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=1))
            started = time.perf_counter()
            llm.generate([{"prompt_token_ids": ids}], stream)
            decode = 128 / (time.perf_counter() - started)
            if seed >= 0:
                found[name]["w3"] += samples_of(times)["output_throughput"]
                found[name]["decode"].append(decode)
                found[name]["collectives"].append(share)
    for llm in llms.values():
        llm.close()
    result: dict[str, Any] = {"samples": found, "ratios": {}}
    for (name, figure), bar in BARS.items():
        pairs = zip(found[name][figure], found["one process"][figure], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        result["ratios"][f"{name} {figure}"] = {"ratio": ratio, "bar": bar, "met": ratio >= bar}
        print(f"{name} {figure}: {ratio:.3f} of one process (bar {bar})", flush=True)
    return result


def _collective_s(executor: Any) -> float:
    return (
        sum(t.seconds for t in executor.communication()[0].values())
        if hasattr(executor, "communication")
        else 0.0
    )


def compare_memory() -> dict[str, Any]:
    """SmolLM2, and a seeded model of the shape of Llama 3.2 1B, the cache filled."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        large = synthesize("llama-1b", "Q4_0", path=Path(folder) / "1b.gguf")
        for path in (locate_model(MODEL), large):
            for tp, pp in ((1, 1), *ARRANGEMENTS):
                options: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 2, "kv_cache_tokens": 2048}
                options |= {"num_threads": 1, "executor": "native", "tp_size": tp, "pp_size": pp}
                name = f"{Path(path).stem}, TP={tp} PP={pp}"
                process = measure_process(str(path)) if tp * pp == 1 else measure_rank_process()
                found[name] = _memory(path, options, process)
                print(name, found[name], flush=True)
    return found


def _memory(path: Path, options: dict[str, Any], process_bytes: int) -> dict[str, Any]:
    """The whole cache filled, by `ridgeline plan --measure`'s own processes."""
    config = EngineConfig.from_options(str(path), **options)
    model = describe_model(path)
    if config.parallel.world_size == 1:
        plans = [plan_memory(model, config, process_bytes=process_bytes)]
        peaks = [measure_peak(str(path), options)]
    else:
        plans = plan_ranks(model, config, process_bytes=process_bytes)
        peaks = measure_rank_peaks(str(path), options)
    return {"planned": [plan.total_bytes for plan in plans], "peak": peaks}


def page(document: dict[str, Any]) -> str:
    """The tables of docs/parallel.md."""
    env = document["environment"]
    lines = [
        "# Ranks: the same tokens, and what they cost",
        "",
        "Made by `scripts/check_parallel.py` from docs/results/parallel.json; do not edit. "
        f"{env['cpu']['model']}, {env['threads']} cores.",
    ]
    if "tokens" in document:
        lines += [
            "",
            "## Tokens",
            "",
            f"Greedy answers of {NUM_TOKENS} tokens to {NUM_PROMPTS} prompts of SmolLM2, 8 at a time, "
            "prompts in chunks of 64 tokens, a shared prefix, a cache that is too small for all. Where an "
            "answer differs, the margin is what one process gave the best token over the second there, in "
            "nats.",
            "",
            "| kernels and ranks | identical | largest margin of a difference |",
            "|---|---|---|",
        ]
        for name, row in document["tokens"].items():
            margin = f"{max(row['margins']):.4f}" if row["margins"] else "–"
            lines.append(f"| {name} | {row['num_identical']} of {NUM_PROMPTS} | {margin} |")
    if "speed" in document:
        lines += [
            "",
            "## Speed",
            "",
            "One process with two threads, and two ranks with one thread each, in turn; medians.",
            "",
            "| | W3, tok/s | of one process | one stream, tok/s | of one process | in collectives |",
            "|---|---|---|---|---|---|",
        ]
        samples = document["speed"]["samples"]
        base = samples["one process"]
        for name, row in samples.items():
            cells = []
            for figure in ("w3", "decode"):
                ratio = statistics.median(a / b for a, b in zip(row[figure], base[figure], strict=True))
                cells += [f"{statistics.median(row[figure]):,.0f}", f"{ratio:.2f}"]
            share = statistics.median(row["collectives"])
            lines.append(f"| {name} | {' | '.join(cells)} | {100 * share:.1f} % |")
    if "memory" in document and all("peak" in row for row in document["memory"].values()):
        lines += ["", "## Memory", "", "Peak of every rank beside `ridgeline plan --tp --pp`, MiB.", ""]
        lines += ["| model and ranks | planned | measured | largest error |", "|---|---|---|---|"]
        for name, row in document["memory"].items():
            planned = ", ".join(f"{b / 2**20:,.0f}" for b in row["planned"])
            errors = [p / m - 1 for p, m in zip(row["planned"], row["peak"], strict=True)]
            worst = max(errors, key=abs)
            peaks = ", ".join(f"{b / 2**20:,.0f}" for b in row["peak"])
            lines.append(f"| {name} | {planned} | {peaks} | {100 * worst:+.1f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the named parts, keep the others as they were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["tokens", "speed", "memory", []])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    document = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {"schema": "ridgeline.parallel-check/1"}
    )
    document["environment"] = environment(num_threads=2)
    if "tokens" in args.parts:
        document["tokens"] = compare_tokens()
    if "speed" in args.parts:
        document["speed"] = compare_speed(args.rounds)
    if "memory" in args.parts:
        document["memory"] = compare_memory()
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(page(document))


if __name__ == "__main__":
    main()
