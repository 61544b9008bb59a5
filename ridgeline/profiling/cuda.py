"""Limits of a CUDA device, measured with torch: memory bandwidth, matrix products, the cost of a launch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from ridgeline.errors import ConfigError
from ridgeline.profiling.machine import REPEATS, MachineLimits

COPY_BYTES = 2**30
MATRIX = 8192


def measure_cuda() -> MachineLimits:
    """HBM bandwidth of a copy (read and write counted), dense bfloat16 and int8 products, an empty launch.

    Raises ConfigError where torch is missing or sees no device.
    """
    try:
        import torch
    except ImportError:
        raise ConfigError("device 'cuda' needs torch: pip install 'ridgeline[torch]'") from None
    if not torch.cuda.is_available():
        raise ConfigError("device 'cuda': torch sees no CUDA device here; for a data sheet use --device h100")

    def seconds(call: Callable[[], object], number: int) -> float:
        times = []
        call()
        for _ in range(REPEATS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(number):
                call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / number)
        return statistics.median(times)

    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source), 10)
    # Not zeros or ones: a chip that toggles few bits runs faster than with real values.
    half = torch.randn((MATRIX, MATRIX), device="cuda", dtype=torch.bfloat16)
    half_s = seconds(lambda: half @ half, 10)
    whole = torch.randint(-127, 128, (MATRIX, MATRIX), device="cuda", dtype=torch.int8)
    int8_s = seconds(lambda: torch._int_mm(whole, whole.t()), 10)
    one = torch.zeros(1, device="cuda")
    launch_s = seconds(lambda: one.add_(1), 1000)
    operations = 2 * MATRIX**3 / 1e9
    properties = torch.cuda.get_device_properties(0)
    return MachineLimits(
        name=properties.name,
        num_threads=0,
        isa="cuda",
        read=((COPY_BYTES, 2 * COPY_BYTES / copy_s / 1e9),),
        read_one_thread=(),
        fp32_gflop_s=operations / half_s,
        int8_gop_s=operations / int8_s,
        int16_gop_s=operations / half_s,
        barrier_s=launch_s,
        measured=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        memory_bytes=properties.total_memory,
    )
