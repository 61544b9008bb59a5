"""Our quantizers and other people's: the same model, calibration tokens and evaluation tokens, one judge.

    .venv/bin/python scripts/compare_quantizers.py --peers VENV [--gptqmodel VENV]
    .venv/bin/python scripts/compare_quantizers.py --only gptq,awq --again     # after a change of ours
    .venv/bin/python scripts/compare_quantizers.py --page-only

The base is SmolLM2-135M with every matrix dequantized to float32. Peers run in their own environments
(`quantize_with_peers.py` says how to make these) and leave float32 values behind, which our eager executor
judges in float32, window by window against the base, like those of our own recipes. LLM.int8() of
bitsandbytes rounds activations too: it computes its own logits, of the first windows only because it is slow.

What is done is kept in docs/results/quantizers.json after every run, and a second call goes on from there.
From it the page docs/quantizers.md is made.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ridgeline import LLM
from ridgeline.bench.environment import environment
from ridgeline.compress.calibration import Calibration, calibration_tokens
from ridgeline.compress.quantize import quantize_model
from ridgeline.compress.recipe import recipe_named
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.models.load import LoadedModel, load_model
from ridgeline.models.locate import locate_model
from ridgeline.models.save import save_model
from ridgeline.quality.divergence import compare_logits
from ridgeline.quality.text import load_text, tokenize
from ridgeline.quality.windows import ROWS_AT_ONCE, Window, chunk_tokens, make_windows, window_logits

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "docs/results/quantizers.json"
PAGE = REPOSITORY / "docs/quantizers.md"
WORK = Path.home() / ".cache/ridgeline-quantizers"
MODEL = "smollm2"
CONTEXT, NUM_WINDOWS = 1024, 16
CALIBRATION = {"num_samples": 8, "length": 512}
SEEDS = (0, 1, 2)
SLOW_WINDOWS = 4
"""Of bitsandbytes, whose int8 product on a CPU is many times slower than the float one."""
Section = Literal["int4", "int8"]
Logits = npt.NDArray[np.floating[Any]]
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to quantize the linears of all layers; embedding and head stay float32 for everyone."""

    name: str
    title: str
    section: Section
    tool: str | None = None
    """of quantize_with_peers.py; None: the recipe `recipe` of ours"""
    recipe: str | None = None
    seeds: tuple[int, ...] = (0,)
    """one where the calibration does not matter, or where a run takes too long"""


CANDIDATES = (
    Candidate("llmcompressor-rtn", "llm-compressor, RTN", "int4", "llmcompressor-rtn"),
    Candidate("llmcompressor-gptq", "llm-compressor, GPTQ", "int4", "llmcompressor-gptq", seeds=SEEDS),
    Candidate("gptqmodel", "GPTQModel, GPTQ", "int4", "gptqmodel", seeds=SEEDS),
    Candidate("rtn", "`rtn-int4-g64`", "int4", recipe="rtn-int4-g64"),
    Candidate("gptq", "`gptq-int4-g64`", "int4", recipe="gptq-int4-g64", seeds=SEEDS),
    Candidate("awq", "`awq-int4-g64`", "int4", recipe="awq-int4-g64", seeds=SEEDS),
    Candidate("awq-gptq", "`awq-gptq-int4-g64`", "int4", recipe="awq-gptq-int4-g64", seeds=SEEDS),
    Candidate("bitsandbytes", "bitsandbytes, LLM.int8()", "int8", "bitsandbytes"),
    Candidate("llm-int8", "`llm-int8`", "int8", recipe="llm-int8"),
    Candidate("int8", "`int8`", "int8", recipe="int8"),
    Candidate("w8a8", "`w8a8`", "int8", recipe="w8a8"),
    Candidate("w8a8-smooth", "`w8a8-smooth`", "int8", recipe="w8a8-smooth", seeds=SEEDS),
)
BARS = (
    ("gptq", "llmcompressor-gptq"),
    ("gptq", "gptqmodel"),
    ("gptq", "rtn"),
    ("awq", "rtn"),
    ("llm-int8", "bitsandbytes"),
    ("rtn", "llmcompressor-rtn"),
)
"""The first is to be no worse than the second."""


def engine_for(model: LoadedModel) -> LLMEngine:
    options = {"executor": "eager", "dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 1}
    return LLMEngine(EngineConfig.from_options("in memory", **options), model, None)


class Judge:
    """Owns the evaluation windows and the base model's logits of them, kept in a file of 3 GB."""

    def __init__(self, base: LoadedModel, windows: Sequence[Window], file: Path) -> None:
        self.windows = windows
        if not file.exists():
            temporary = file.with_suffix(".part")
            shape = (len(windows), CONTEXT - 1, base.config.vocab_size)
            kept = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            for index, chunks in enumerate(logits_of(base, windows)):
                kept[index] = np.concatenate(list(chunks))
            kept.flush()
            temporary.rename(file)
        self.base_logits: Logits = np.load(file, mmap_mode="r")

    def judge(self, candidate: LoadedModel | Logits) -> dict[str, list[float]]:
        """Means over each window: ln p of the base and of the candidate, KL, share of equal top tokens."""
        if isinstance(candidate, LoadedModel):
            found = logits_of(candidate, self.windows)
        else:
            found = ([logits] for logits in candidate)
        means: dict[str, list[float]] = {name: [] for name in ("base", "model", "kl", "top1")}
        with ThreadPoolExecutor() as pool:
            for window, base, chunks in zip(self.windows, self.base_logits, found, strict=False):
                done, parts = 0, []
                for ours in chunks:
                    rows = slice(done, done + len(ours))
                    cuts = range(ROWS_AT_ONCE, len(ours), ROWS_AT_ONCE)
                    blocks = (np.split(a, cuts) for a in (base[rows], ours, window.targets[rows]))
                    parts += pool.map(compare_logits, *blocks)
                    done += len(ours)
                compared = np.concatenate(parts, axis=1)
                assert compared.shape[1] == CONTEXT - 1
                for name, values in zip(means, compared, strict=False):
                    means[name].append(float(values.mean()))
        return means


def logits_of(model: LoadedModel, windows: Iterable[Window]) -> Iterator[Iterable[Logits]]:
    """For each window its logits, a chunk at a time."""
    engine = engine_for(model)
    for window in windows:
        yield window_logits(engine, window, chunk=chunk_tokens(engine))
    engine.close()


def prepare(work: Path) -> dict[str, Any]:
    """The base model as a directory and the tokens, as the peers read them -> the tokens."""
    work.mkdir(parents=True, exist_ok=True)
    base = load_model(locate_model(MODEL))
    if not (work / "base").exists():
        save_model(base, work / "base", kind="hf")
    tokens_file = work / "tokens.json"
    if not tokens_file.exists():
        with LLM(MODEL, executor="eager", max_model_len=CONTEXT) as llm:
            token_ids = tokenize(llm, load_text(), num_tokens=CONTEXT * NUM_WINDOWS)
            tokenizer = llm.engine.tokenizer
        assert tokenizer is not None
        windows = make_windows(token_ids, context=CONTEXT, prefix_ids=tokenizer.prefix_ids)
        calibrations = {
            str(seed): calibration_tokens(tokenizer, seed=seed, **CALIBRATION).token_ids for seed in SEEDS
        }
        document = {"evaluation": [w.token_ids for w in windows], "calibration": calibrations}
        tokens_file.write_text(json.dumps(document), encoding="utf-8")
    tokens: dict[str, Any] = json.loads(tokens_file.read_text(encoding="utf-8"))
    return tokens


def run_peer(candidate: Candidate, seed: int, work: Path, python: Path) -> Result:
    """What quantize_with_peers.py says of its run; a run that is already there is not repeated."""
    assert candidate.tool
    out = work / f"{candidate.name}-{seed}"
    if not (out / "run.json").exists():
        script = Path(__file__).with_name("quantize_with_peers.py")
        command = [python, script, candidate.tool, "--base", work / "base", "--tokens", work / "tokens.json"]
        command += ["--seed", seed, "--windows", SLOW_WINDOWS, "--out", out]
        subprocess.run([str(part) for part in command], check=True)
    found: Result = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return found


def measure(
    candidate: Candidate, seed: int, *, base: LoadedModel, tokens: dict[str, Any], judge: Judge, args: Any
) -> Result | None:
    """One run, judged; None where its tool is not at hand."""
    if candidate.tool is None:
        assert candidate.recipe
        recipe = recipe_named(candidate.recipe).with_options(head_format="keep")
        calibration = Calibration(tokens["calibration"][str(seed)], seed)
        wall, cpu = time.perf_counter(), time.process_time()
        quantized = quantize_model(base, recipe, calibration=calibration)
        run: Result = {"tool": "ridgeline", "seconds": round(time.perf_counter() - wall, 1)}
        run["cpu_seconds"] = round(time.process_time() - cpu, 1)
        return run | {"windows": judge.judge(quantized.model)}
    folder = args.work / f"{candidate.name}-{seed}"
    python = args.gptqmodel if candidate.tool == "gptqmodel" else args.peers
    if python is None and not (folder / "run.json").exists():
        return None
    run = run_peer(candidate, seed, args.work, (python or Path()) / "bin/python")
    if (folder / "logits.npy").exists():
        return run | {"windows": judge.judge(np.load(folder / "logits.npy", mmap_mode="r"))}
    return run | {"windows": judge.judge(load_model(folder / "weights"))}


@dataclass(frozen=True, slots=True)
class Figures:
    """For each run of a candidate the mean over its windows; perplexity as a change in per cent."""

    perplexity: tuple[float, ...]
    kl: tuple[float, ...]
    top1: tuple[float, ...]
    seconds: float
    """of the least disturbed run"""
    cpu_seconds: float | None
    num_windows: int


def runs_of(result: Result, name: str) -> list[Result]:
    return [run for key, run in result["runs"].items() if key.rpartition("-")[0] == name]


def figures(runs: Sequence[Result], num_windows: int | None = None) -> Figures:
    """`num_windows`: only the first so many, to compare with a candidate that has no more."""

    def mean(run: Result, name: str) -> float:
        return statistics.fmean(run["windows"][name][:num_windows])

    return Figures(
        tuple(percent(mean(run, "model") - mean(run, "base")) for run in runs),
        tuple(mean(run, "kl") for run in runs),
        tuple(mean(run, "top1") for run in runs),
        min(run["seconds"] for run in runs),
        min((run["cpu_seconds"] for run in runs if "cpu_seconds" in run), default=None),
        min(len(run["windows"]["kl"][:num_windows]) for run in runs),
    )


def percent(log_likelihood_difference: float) -> float:
    return 100 * math.expm1(-log_likelihood_difference)


def difference(ours: Sequence[Result], theirs: Sequence[Result], name: str) -> tuple[float, float]:
    """Ours less theirs, means over runs, and the standard error: of paired windows and of seeds together.

    A candidate with a single run adds nothing for its seeds, whose spread is then unknown.
    """
    count = min(len(run["windows"][name]) for run in (*ours, *theirs))
    values = [np.array([run["windows"][name][:count] for run in runs]) for runs in (ours, theirs)]
    paired = values[0].mean(axis=0) - values[1].mean(axis=0)
    variance = paired.var(ddof=1) / count
    variance += sum(v.mean(axis=1).var(ddof=1) / len(v) for v in values if len(v) > 1)
    return float(paired.mean()), math.sqrt(variance)


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and least to most where there are several."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def table(result: Result, section: Section, num_windows: int | None = None) -> Iterator[str]:
    """`num_windows`: of the first so many windows only."""
    yield "| quantizer | runs | windows | perplexity, % | KL, nats | same top-1, % | seconds | CPU seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for candidate in CANDIDATES:
        runs = runs_of(result, candidate.name)
        if candidate.section != section or not runs:
            continue
        f = figures(runs, num_windows)
        threads = {run["threads"] for run in runs if "threads" in run} - {result["environment"]["threads"]}
        apart = "".join(f" ({number} thread)" for number in threads)
        cells = [candidate.title + apart, str(len(runs)), str(f.num_windows)]
        cells += [spread(f.perplexity, "+.2f"), spread(f.kl, ".4f")]
        cells.append(spread([100 * share for share in f.top1], ".1f"))
        # bitsandbytes has nothing to calibrate; its seconds are those of the logits.
        cells += (
            ["–"] * 2
            if candidate.tool == "bitsandbytes"
            else [f"{f.seconds:.1f}", "–" if f.cpu_seconds is None else f"{f.cpu_seconds:.1f}"]
        )
        yield f"| {' | '.join(cells)} |"


def bars(result: Result) -> Iterator[str]:
    titles = {c.name: c.title for c in CANDIDATES}
    yield "| ours | against | windows | perplexity, % | KL, nats | |"
    yield "|---|---|---|---|---|---|"
    for ours, theirs in BARS:
        pair = runs_of(result, ours), runs_of(result, theirs)
        if not all(pair):
            continue
        likelihood, likelihood_error = difference(*pair, "model")
        kl, kl_error = difference(*pair, "kl")
        cells = [titles[ours], titles[theirs]]
        cells.append(str(min(len(run["windows"]["kl"]) for runs in pair for run in runs)))
        cells += [f"{percent(likelihood):+.2f} ± {100 * likelihood_error:.2f}", f"{kl:+.4f} ± {kl_error:.4f}"]
        cells.append(verdict((-likelihood, likelihood_error), (kl, kl_error)))
        yield f"| {' | '.join(cells)} |"


def verdict(*excesses: tuple[float, float]) -> str:
    """Of how much worse we are by several measures, each with its standard error."""
    if any(excess > 2 * error for excess, error in excesses):
        return "**worse**"
    if any(excess > 0 for excess, _ in excesses):
        return "the same within errors"
    return "better" if any(excess < -2 * error for excess, error in excesses) else "no worse"


def page(result: Result) -> str:
    env = result["environment"]
    versions = {name: v for run in result["runs"].values() for name, v in run.get("versions", {}).items()}
    base = statistics.fmean(next(iter(result["runs"].values()))["windows"]["base"])
    samples, length = CALIBRATION["num_samples"], CALIBRATION["length"]
    tools = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return f"""# Quantizers, side by side

Made by `scripts/compare_quantizers.py` from `docs/results/quantizers.json`; last run {result["date"]}.
Recipes in code font are ours.

- Model: SmolLM2-135M, dequantized to float32 from the Q4_1 file that there is: perplexity
  {math.exp(-base):.3f}. Only the linears of the layers are quantized: embedding and head stay float32.
- Evaluation: State of the Union addresses of even years, {NUM_WINDOWS} windows of {CONTEXT} tokens. All is
  judged by our eager executor in float32, on the values that its quantizer left. Change of perplexity,
  KL(base || model) and share of equal likeliest tokens: mean over runs (least to most).
- Calibration: {samples} windows of {length} tokens of odd years, the same for every tool. A run for each
  of the seeds {", ".join(map(str, SEEDS))}; a single one where calibration does not matter or a tool is slow.
- Machine: {env["cpu"]["model"]}, {env["threads"]} threads. Seconds: the quantization alone, least of
  the runs; CPU seconds count both cores and mind other work on the machine less.
- Ridgeline {env["ridgeline"]}, Python {env["python"]}; {tools}.

## 4 bits, asymmetric, groups of 64 columns

{lines(table(result, "int4"))}

## 8 bits, a scale for each row

bitsandbytes computes its own logits, of the first windows only; the second table has everyone on these.

{lines(table(result, "int8"))}

{lines(table(result, "int8", SLOW_WINDOWS))}

## Differences

Ours less theirs: below zero is better. ± is one standard error, of paired windows and of seeds together;
"worse" and "better" are more than two of them.

{lines(bars(result))}
"""


def lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--peers", type=Path, help="environment with llmcompressor and bitsandbytes")
    parser.add_argument("--gptqmodel", type=Path, help="environment with gptqmodel")
    parser.add_argument("--only", help="names of candidates, or of single runs (gptq-1), with commas between")
    parser.add_argument("--again", action="store_true", help="also what is done; peers' files are used again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--page-only", action="store_true")
    args = parser.parse_args()
    result: Result = {"runs": {}}
    if args.out.exists():
        result = json.loads(args.out.read_text(encoding="utf-8"))
    if not args.page_only:
        only = args.only.split(",") if args.only else None
        tokens = prepare(args.work)
        base = load_model(args.work / "base")
        windows = [Window(tuple(ids), 1) for ids in tokens["evaluation"]]
        judge = Judge(base, windows, args.work / "base-logits.npy")
        for candidate in CANDIDATES:
            for seed in candidate.seeds:
                name = f"{candidate.name}-{seed}"
                wanted = only is None or candidate.name in only or name in only
                if not wanted or (name in result["runs"] and not args.again):
                    continue
                run = measure(candidate, seed, base=base, tokens=tokens, judge=judge, args=args)
                if run is None:
                    print(f"{name}: left out, no environment given for {candidate.tool}")
                    continue
                result["runs"][name] = run
                result["environment"] = environment()
                result["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                f = figures([run])
                print(f"{name}: {f.perplexity[0]:+.2f} %, KL {f.kl[0]:.4f}, {f.seconds} s", flush=True)
    args.page.write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
