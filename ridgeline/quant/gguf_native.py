"""GGUF encoders that search for the best scales, in C++ (csrc/gguf_quantize.cpp): K-quants, and importance.

The bytes are those of llama.cpp, whichever instruction set runs. Rows are shared out over threads: ctypes
releases the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from ridgeline.library import load_library
from ridgeline.quant.formats import QuantFormat

_CHUNK_ELEMENTS = 1 << 17


def encode_rows(
    values: npt.NDArray[np.float32],
    fmt: QuantFormat,
    *,
    importance: npt.NDArray[np.float32] | None = None,
    isa: str | None = None,
) -> npt.NDArray[np.uint8]:
    """float32 [N, K], finite and contiguous -> blocks uint8 [N, row bytes].

    importance: float32 [K], weight of each column's squared error. Raises ConfigError without a library.
    """
    encode = load_library(isa)[1].rl_gguf_quantize
    num_rows, num_columns = values.shape
    row_bytes = num_columns // fmt.block_size * fmt.block_bytes
    blocks = np.empty((num_rows, row_bytes), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    rows_at_once = max(1, _CHUNK_ELEMENTS // num_columns)

    def run(start: int) -> None:
        count = min(rows_at_once, num_rows - start)
        source, target = values[start:].ctypes.data, blocks[start:].ctypes.data
        done = encode(fmt.ggml_type, source, count, num_columns, weights, target)
        assert done == 0, f"no encoder for {fmt.name}"

    share_out(run, range(0, num_rows, rows_at_once))
    return blocks


def share_out(run: Callable[[int], None], starts: Sequence[int]) -> None:
    """`run` for each start, on as many threads as there are processors. The first exception is raised."""
    num_processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = min(num_processors, len(starts))
    if num_threads <= 1:
        for start in starts:
            run(start)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(run, starts):
            pass
