"""What a start costs, in fresh processes: import, load, first token, and peak memory.

Every iteration is a new Python that times itself: importing the engine, loading the model (mapping the file,
packing the weights, allocating the cache), one short prompt up to its first token. `process_s` is seen from
outside and holds the interpreter's own start as well. Peak memory is the high-water mark of the resident set
(VmHWM); pages of the mapped file that were read are in it. The file is in the page cache after the first
start, which does not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from typing import Any

from ridgeline.bench.repeat import Progress, RepeatOptions, Samples, repeat
from ridgeline.bench.result import Better, make_document
from ridgeline.config import EngineConfig
from ridgeline.errors import RidgelineError

METRICS: dict[str, tuple[str, Better]] = {
    "import_s": ("s", "lower"),
    "load_s": ("s", "lower"),
    "first_token_s": ("s", "lower"),
    "process_s": ("s", "lower"),
    "peak_memory_bytes": ("byte", "lower"),
}
DEFINITIONS = {
    "import_s": "importing the engine, in a Python that has just started",
    "load_s": "from there until the engine can take a request",
    "first_token_s": "a prompt of 8 tokens up to its first token, in the fresh engine",
    "process_s": "from starting the process to the first token being known outside of it",
    "peak_memory_bytes": "high-water mark of the process's resident set (VmHWM)",
}
_PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
_TIMEOUT_S = 600


def measure_startup(
    config: EngineConfig, repeats: RepeatOptions, *, progress: Progress | None = None
) -> dict[str, Any]:
    """The result document of kind "startup". Raises RidgelineError, also where the process fails."""

    def run(seed: int) -> Samples:
        return {name: [value] for name, value in start_once(config).items()}

    repeated = repeat(run, repeats, seed=config.seed, kinds=METRICS, progress=progress)
    return make_document(
        "startup",
        metrics=repeated.metrics,
        settings=config.flat() | asdict(repeats),
        seeds=repeated.seeds,
        details={**repeated.details(), "definitions": DEFINITIONS},
    )


def start_once(config: EngineConfig) -> dict[str, float]:
    """One fresh process -> its figures, under the names of METRICS."""
    command = [sys.executable, "-c", "from ridgeline.bench.startup import child; child()"]
    with tempfile.TemporaryFile("w+") as errors_file:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors_file, text=True
        )
        alarm = threading.Timer(_TIMEOUT_S, process.kill)
        alarm.start()
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(config.flat()) + "\n")
        process.stdin.close()
        first = process.stdout.readline()
        seconds = time.perf_counter() - started
        rest = process.stdout.read()
        process.stdout.close()
        process.wait()
        if alarm.finished.is_set():
            raise RidgelineError(f"the process did not end within {_TIMEOUT_S} s; try a smaller model")
        alarm.cancel()
        errors_file.seek(0)
        errors = errors_file.read()
    if process.returncode or not first:
        last = errors.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        raise RidgelineError(last.removeprefix("ridgeline.errors.").partition("Error: ")[2] or last)
    return {**json.loads(rest), "process_s": seconds}


def child() -> None:
    """In the fresh process: settings are one line on stdin, figures go to stdout after the first token."""
    settings = json.loads(sys.stdin.readline())
    started = time.perf_counter()
    from ridgeline.engine.engine import LLMEngine
    from ridgeline.sampling_params import SamplingParams

    imported = time.perf_counter()
    llm = LLMEngine.from_config(EngineConfig.from_options(**settings))
    loaded = time.perf_counter()
    llm.add_request({"prompt_token_ids": _PROMPT}, SamplingParams(temperature=0, max_tokens=1))
    while llm.has_unfinished:
        llm.step()
    finished = time.perf_counter()
    sys.stdout.write("first token\n")
    sys.stdout.flush()
    llm.close()
    figures = {
        "import_s": imported - started,
        "load_s": loaded - imported,
        "first_token_s": finished - loaded,
        "peak_memory_bytes": _peak_memory_bytes(),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def _peak_memory_bytes() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
