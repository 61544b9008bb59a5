"""Where a figure was measured, as plain data: without it no two figures can be compared.

Everything is read from /proc, /sys and the interpreter; what cannot be read is None. `compare` names the
entries that differ between two results, so nothing goes in here that changes by itself from run to run,
except under `load`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import ridgeline

FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
)
"""Of the processor's flags, those that decide which kernels run; bf16 and fp16 ones are torch's only."""
LIBRARIES = ("numpy", "tokenizers", "torch")
VARIABLES = ("RIDGELINE_", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "GOMP_", "MALLOC_", "LD_PRELOAD")
"""Environment variables that begin like this change speed."""


def environment(*, num_threads: int | None = None) -> dict[str, Any]:
    """Machine, system, versions, git state, threads, variables and the load at this moment."""
    cpu = _cpu()
    return {
        "cpu": cpu,
        "memory_bytes": _memory_bytes(),
        "cgroup_cpus": _cgroup_cpus(),
        "os": _os_name(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "ridgeline": ridgeline.__version__,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "git": _git_state(),
        "threads": num_threads if num_threads is not None else cpu["cores_usable"],
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
        "load": {"average_1min": _load_average()},
    }


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or fields.get("CPU part") or platform.processor() or None,
        "microcode": fields.get("microcode"),
        "hypervisor": "hypervisor" in flags,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads_per_core": _threads_per_core(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge_pages": _chosen(_read("/sys/kernel/mm/transparent_hugepage/enabled")),
    }


def _threads_per_core() -> int | None:
    siblings = _read("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    if siblings is None:
        return None
    ranges = [part.partition("-") for part in siblings.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def _chosen(text: str | None) -> str | None:
    """The word in brackets of "always [madvise] never"."""
    return text[text.index("[") + 1 : text.index("]")] if text and "[" in text else text


def _memory_bytes() -> int | None:
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_cpus() -> float | None:
    """The CPU quota of a container, in cores."""
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", sys.platform)
    except OSError:
        return platform.platform()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from, and whether it was changed; None outside of one."""
    root = Path(ridgeline.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for arguments in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "changed": bool(changes.strip())}
