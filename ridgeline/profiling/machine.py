"""What this machine can do at best: memory bandwidth, arithmetic, and the cost of starting the threads.

The limits are measured by csrc/limits.cpp with the vectors and the thread pool of the kernels, kept in one
file per machine under the cache directory, and measured again when what they belong to (processor, cores,
instruction set, library) has changed. Every figure in a report stands beside one of these.

Bandwidth depends on where the bytes are, so it is a curve over the size of what is read: `read_gb_s` answers
for any size. Integer peaks are those of the instruction sequences that the kernels use.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.checkpoint.checkpoint import cache_directory
from ridgeline.errors import ConfigError
from ridgeline.library import library_files, load_library

SCHEMA = "ridgeline.machine/1"
MAX_AGE_DAYS = 30
READ_SIZES = tuple(2**power for power in (18, 20, 22, 23, 24, 25, 26, 27, 28, 29))
"""Bytes that are read in all, by all threads: from an L2 cache to DRAM."""
REPEATS = 5
COMPUTE_KINDS = {"fp32": 0, "int8": 1, "int16": 2}


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Medians. Rates are of all `num_threads` threads together."""

    name: str
    num_threads: int
    isa: str
    read: tuple[tuple[int, float], ...]
    """(bytes read in all, GB/s), ascending; the last is DRAM."""
    read_one_thread: tuple[tuple[int, float], ...]
    fp32_gflop_s: float
    int8_gop_s: float
    """8-bit codes with 8-bit activations; a multiply-add is two operations, as everywhere."""
    int16_gop_s: float
    """8-bit codes with 16-bit activations."""
    barrier_s: float
    """Starting and joining all threads once."""
    measured: str
    """ISO date and time, UTC; "data sheet" for a described device."""
    memory_bytes: int = 0
    identity: str = ""

    @property
    def dram_gb_s(self) -> float:
        return self.read[-1][1]

    @property
    def fp32_ridge(self) -> float:
        """Arithmetic intensity, in FLOPs per byte of DRAM, above which float32 work is compute-bound."""
        return self.fp32_gflop_s / self.dram_gb_s

    def read_gb_s(self, num_bytes: float) -> float:
        """Bandwidth of reading `num_bytes` over and over: between measured sizes, by their logarithms."""
        sizes = [math.log2(size) for size, _ in self.read]
        return float(np.interp(math.log2(max(num_bytes, 1)), sizes, [rate for _, rate in self.read]))


DEVICES: dict[str, MachineLimits] = {
    name: MachineLimits(
        name=title,
        num_threads=0,
        isa="cuda",
        read=((2**30, gb_s),),
        read_one_thread=(),
        fp32_gflop_s=bf16 * 1e3,
        int8_gop_s=int8 * 1e3,
        int16_gop_s=bf16 * 1e3,
        barrier_s=4e-6,
        measured="data sheet",
        memory_bytes=memory * 10**9,
    )
    for name, title, gb_s, bf16, int8, memory in (
        ("h200", "NVIDIA H200 SXM", 4800, 989, 1979, 141),
        ("h100", "NVIDIA H100 SXM", 3350, 989, 1979, 80),
        ("a100", "NVIDIA A100 SXM 80GB", 2039, 312, 624, 80),
        ("l40s", "NVIDIA L40S", 864, 362, 733, 48),
        ("l4", "NVIDIA L4", 300, 121, 242, 24),
        ("a10", "NVIDIA A10", 600, 125, 250, 24),
        ("t4", "NVIDIA T4", 320, 65, 130, 16),
        ("rtx4090", "NVIDIA GeForce RTX 4090", 1008, 165, 661, 24),
    )
}
"""Data sheets: GB/s, dense TFLOP/s of 16-bit tensor cores (there is no reason to use float32 ones), TOP/s of
int8, GB. A kernel launch stands in for the barrier. Bounds, not predictions."""


def describe_device(name: str) -> MachineLimits:
    """The data sheet of an accelerator. Raises ConfigError for an unknown one."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in DEVICES:
        raise ConfigError(f"--device {name}: no data sheet; known: {', '.join(DEVICES)}")
    return DEVICES[key]


def machine_limits(
    *, num_threads: int | None = None, refresh: bool = False, progress: Callable[[str], None] | None = None
) -> MachineLimits:
    """Limits of this machine: from the file, or measured (about 10 s) and kept.

    `progress` gets a line for each part that is measured. Raises ConfigError without a native library.
    """
    num_threads = num_threads or len(os.sched_getaffinity(0))
    path = limits_path(num_threads)
    if not refresh:
        kept = read_limits(path)
        if kept is not None and staleness(kept) is None:
            return kept
    limits = measure_limits(num_threads, progress or (lambda line: None))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"schema": SCHEMA, **asdict(limits)}, indent=1) + "\n")
    partial.replace(path)
    return limits


def cached_limits(*, num_threads: int | None = None) -> MachineLimits | None:
    """The limits if they were measured before and still hold; measures nothing."""
    kept = read_limits(limits_path(num_threads or len(os.sched_getaffinity(0))))
    return kept if kept is not None and staleness(kept) is None else None


def limits_path(num_threads: int) -> Path:
    key = hashlib.sha256(f"{processor()} {platform.node()}".encode()).hexdigest()[:12]
    return cache_directory() / "machine" / f"{key}-{num_threads}.json"


def read_limits(path: Path) -> MachineLimits | None:
    """What the file holds; None where it is not there or of another version."""
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        if document.pop("schema") != SCHEMA:
            return None
        limits = MachineLimits(**document)
        curves = (limits.read, limits.read_one_thread)
        read, one = (tuple((int(size), float(rate)) for size, rate in curve) for curve in curves)
        return replace(limits, read=read, read_one_thread=one)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def staleness(limits: MachineLimits) -> str | None:
    """Why kept limits no longer hold, in words; None if they do."""
    if limits.identity != identity():
        return "processor, cores, instruction set or kernel library have changed since"
    age = time.time() - time.mktime(time.strptime(limits.measured, "%Y-%m-%dT%H:%M:%SZ")) + time.timezone
    if age > MAX_AGE_DAYS * 86400:
        return f"they are {age / 86400:.0f} days old (limit {MAX_AGE_DAYS})"
    return None


def identity() -> str:
    """What limits depend on: processor, cores, instruction set, the library's build."""
    isa, _ = load_library()
    library = dict(library_files())[isa].stat()
    cores = sorted(os.sched_getaffinity(0))
    return f"{processor()}, cores {cores}, {isa}, library {library.st_size} bytes"


def processor() -> str:
    """Model name of the processor, with family and model number where they are stated."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def memory_bytes() -> int:
    """Of the machine, or less under a cgroup limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return total if limit == "max" else min(total, int(limit))
    except (OSError, ValueError):
        return total


def measure_read(num_threads: int, num_bytes: int) -> float:
    """GB/s at this moment of reading `num_bytes` over and over, by all threads together."""
    _, library = load_library()
    passes = max(1, min(2**31 // num_bytes, 4096))
    seconds = np.empty(REPEATS)
    library.rl_limit_read(num_threads, num_bytes, passes, REPEATS, seconds.ctypes.data)
    return float(passes * num_bytes / statistics.median(seconds.tolist()) / 1e9)


def measure_limits(num_threads: int, progress: Callable[[str], None]) -> MachineLimits:
    """Measure everything now."""
    isa, library = load_library()

    def compute(kind: int) -> float:
        seconds = np.empty(REPEATS)
        library.rl_limit_compute(kind, num_threads, 10**5, 1, seconds.ctypes.data)
        rounds = int(10**5 * 0.1 / max(float(seconds[0]), 1e-6))
        macs = library.rl_limit_compute(kind, num_threads, rounds, REPEATS, seconds.ctypes.data)
        return float(2 * macs / statistics.median(seconds.tolist()) / 1e9)

    def curve(threads: int) -> tuple[tuple[int, float], ...]:
        progress(f"memory bandwidth, {threads} thread{'s' * (threads > 1)}")
        return tuple((size, measure_read(threads, size)) for size in READ_SIZES)

    one, every = curve(1), curve(num_threads)
    progress("arithmetic")
    rates = {name: compute(kind) for name, kind in COMPUTE_KINDS.items()}
    barrier = np.empty(REPEATS)
    library.rl_limit_barrier(num_threads, 10_000, REPEATS, barrier.ctypes.data)
    return MachineLimits(
        name=processor(),
        num_threads=num_threads,
        isa=isa,
        read=every,
        read_one_thread=one,
        fp32_gflop_s=rates["fp32"],
        int8_gop_s=rates["int8"],
        int16_gop_s=rates["int16"],
        barrier_s=statistics.median(barrier.tolist()),
        measured=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        memory_bytes=memory_bytes(),
        identity=identity(),
    )
