"""Does lm-eval, through our server, find what the engine itself finds?

Starts `ridgeline serve`, lets lm-eval (https://github.com/EleutherAI/lm-evaluation-harness, `pip install
lm-eval[api]`, in an environment of its own) run the two tasks of docs/examples/lm_eval with the server's own
tokenizer, and compares the log-likelihood of every single request with the one that an engine in this process
gives the same tokens. Results: docs/results/lm_eval.json.

    .venv/bin/python scripts/check_lm_eval.py smollm2 --lm-eval ~/lm-eval/bin/lm_eval
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ridgeline.bench.environment import environment
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.quality.windows import Window, chunk_tokens, log_likelihoods, window_logits

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES, OUT = REPOSITORY / "docs/examples/lm_eval", REPOSITORY / "docs/results/lm_eval.json"
TASKS = ("ridgeline_text", "ridgeline_choice")
MAX_LENGTH = 512
"""Of lm-eval: texts longer than this are scored in windows."""


def served(model: str) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-c", "from ridgeline.cli.main import main; main()"]
    command += ["serve", "-m", model, "--port", "0", "--max-model-len", str(MAX_LENGTH + 1)]
    process = subprocess.Popen([*command, "--max-num-seqs", "4"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()[0]


def run_lm_eval(program: Path, address: str, model: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Its metrics of each task, and its samples."""
    arguments = {
        "model": model,
        "base_url": f"{address}/v1/completions",
        "tokenizer_backend": "remote",
        "max_length": MAX_LENGTH,
        "num_concurrent": 4,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--model", "local-completions", "--include_path", ".", "--log_samples"]
        command += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())]
        command += ["--tasks", ",".join(TASKS), "--output_path", folder]
        done = subprocess.run(list(map(str, command)), cwd=EXAMPLES, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{program}: {done.stderr[-3000:]}")
        [results] = Path(folder).rglob("results_*.json")
        samples = {
            task: [json.loads(line) for line in next(Path(folder).rglob(f"samples_{task}_*")).open()]
            for task in TASKS
        }
        return json.loads(results.read_text())["results"], samples


def rolling_windows(tokens: list[int], prefix: int) -> Iterator[Window]:
    """lm-eval's: MAX_LENGTH - 2 tokens are predicted at a time; the last reaches back to be as long."""
    size = MAX_LENGTH - 2
    sequence = [prefix, *tokens]
    for done in range(1, len(sequence), size):
        end = min(done + size, len(sequence))
        start = 0 if done == 1 else end - size - 1
        yield Window(tuple(sequence[start:end]), done - start)


def log_likelihood(llm: LLMEngine, window: Window) -> float:
    """Of the scored tokens of a window, by the engine alone."""
    total, done = 0.0, 0
    for logits in window_logits(llm, window, chunk=chunk_tokens(llm)):
        total += float(log_likelihoods(logits, window.targets[done : done + len(logits)]).sum())
        done += len(logits)
    return total


def ours(llm: LLMEngine, task: str, sample: dict[str, Any]) -> list[float]:
    """Log-likelihoods of one sample's requests."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    if task == "ridgeline_text":
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_ids[0]
        windows = rolling_windows(encode(sample["doc"]["text"]), prefix)
        return [sum(log_likelihood(llm, window) for window in windows)]
    context = encode(sample["doc"]["question"])
    return [
        log_likelihood(llm, Window(tuple(encode(f"{sample['doc']['question']} {choice}")), len(context)))
        for choice in sample["doc"]["choices"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lm-eval", type=Path, required=True, help="its program")
    args = parser.parse_args()
    process, address = served(args.model)
    try:
        results, samples = run_lm_eval(args.lm_eval.absolute(), address, Path(args.model).name)
    finally:
        process.terminate()
        process.wait(30)
    llm = LLMEngine.from_config(
        EngineConfig.from_options(args.model, max_num_seqs=1, max_model_len=MAX_LENGTH + 1)
    )
    compared: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        pairs: list[tuple[float, float]] = []
        for sample in samples[task]:
            theirs = [float(response[0][0]) if isinstance(response[0], list) else float(response[0])
                      for response in sample["resps"]]  # fmt: skip
            pairs += zip(theirs, ours(llm, task, sample), strict=True)
        worst = max(abs(a / b - 1) for a, b in pairs)
        compared[task] = {
            "metrics": {k: v for k, v in results[task].items() if isinstance(v, float)},
            "num_requests": len(pairs),
            "largest_relative_difference": worst,
            "log_likelihoods": [{"lm_eval": a, "engine": b} for a, b in pairs],
        }
        print(task, compared[task]["metrics"], f"{len(pairs)} log-likelihoods, off by at most {worst:.2g}")
    llm.close()
    document = {"model": Path(args.model).name, "environment": environment(), "tasks": compared}
    OUT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
