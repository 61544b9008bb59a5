"""`ridgeline machine`: the limits that every other figure stands beside."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict

from ridgeline.cli.options import print_json
from ridgeline.cli.terminal import say, show_bytes
from ridgeline.library import load_library
from ridgeline.profiling.machine import (
    DEVICES,
    MachineLimits,
    describe_device,
    limits_path,
    machine_limits,
    read_limits,
    staleness,
)


def machine(
    *, device: str | None = None, num_threads: int | None = None, refresh: bool = False, json: bool = False
) -> None:
    """Memory bandwidth by size, arithmetic peaks and the cost of starting threads, measured once and kept.

    Examples:

        ridgeline machine

        ridgeline machine --refresh

        ridgeline machine --device h100

    Parameters
    ----------
    device
        Show the data sheet of an accelerator instead; "cuda": measure the one that is here.
    num_threads
        Threads that share the work; all cores if left out.
    refresh
        Measure again although the kept limits still hold.
    json
        End with one JSON document.
    """
    if device == "cuda":
        from ridgeline.profiling.cuda import measure_cuda

        limits, kept = measure_cuda(), "measured now"
    elif device is not None:
        limits, kept = describe_device(device), "data sheet"
    else:
        load_library()  # refuses a machine without kernels before anything is read
        threads = num_threads or len(os.sched_getaffinity(0))
        path = limits_path(threads)
        before = read_limits(path)
        reason = None if before is None else staleness(before)
        if reason is not None:
            say(f"measuring again: {reason}")
        limits = machine_limits(
            num_threads=threads, refresh=refresh, progress=lambda line: say(f"measuring {line} ...")
        )
        kept = f"measured {limits.measured}, kept in {path}"
    if json:
        print_json({"limits": asdict(limits), "fp32_ridge": limits.fp32_ridge, "devices": sorted(DEVICES)})
        return
    sys.stdout.write("\n".join(_lines(limits, kept)) + "\n")


def _lines(limits: MachineLimits, kept: str) -> list[str]:
    lines = [f"{limits.name}, {limits.isa}, {limits.num_threads} threads", kept, ""]
    one = dict(limits.read_one_thread)
    for size, rate in limits.read:
        alone = f"   one thread {one[size]:8.1f}" if size in one else ""
        lines.append(f"  read {show_bytes(size):>10}  {rate:8.1f} GB/s{alone}")
    lines += [
        "",
        f"  float32        {limits.fp32_gflop_s:10,.1f} GFLOP/s",
        f"  int8 x int8    {limits.int8_gop_s:10,.1f} GOP/s",
        f"  int8 x int16   {limits.int16_gop_s:10,.1f} GOP/s",
        f"  start and join {1e6 * limits.barrier_s:10,.2f} us",
        f"  memory         {show_bytes(limits.memory_bytes):>14}",
        "",
        f"  Work with fewer than {limits.fp32_ridge:.1f} float32 operations for each byte from memory "
        f"({limits.int8_gop_s / limits.dram_gb_s:.1f} of int8) waits for memory.",
    ]
    return lines
