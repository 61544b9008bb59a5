"""GGUF encoders that search for the best scales, in C++ (csrc/gguf_quantize.cpp): K-quants, and importance.

The bytes are those of llama.cpp, whichever instruction set runs. Rows are shared out over threads: ctypes
releases the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import QuantFormat

ISAS = ("avx512", "avx2", "generic")
_CHUNK_ELEMENTS = 1 << 17


@cache
def _encoder(isa: str | None) -> Any:
    """rl_gguf_quantize of the best library that this processor runs, or of the one for `isa`."""
    found = dict(_library_files())
    supports = ctypes.CDLL(str(found["generic"])).rl_cpu_supports if "generic" in found else lambda _: False
    usable = [name for name in ISAS if name in found and supports(name.encode())]
    if not usable or (isa is not None and isa not in usable):
        raise CheckpointError(
            "quantizing to a K-quant, or by importance, needs the compiled library "
            f"libridgeline_{isa or 'generic'}.so; install a C++ compiler and run `pip install .` again, or "
            "choose Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 without importance"
        )
    encode: Any = ctypes.CDLL(str(found[isa or usable[0]])).rl_gguf_quantize
    encode.restype = ctypes.c_int32
    encode.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32] + [
        ctypes.c_void_p
    ] * 2
    return encode


def _library_files() -> Iterator[tuple[str, Path]]:
    package = importlib.util.find_spec("ridgeline")
    assert package is not None and package.submodule_search_locations is not None
    for folder in package.submodule_search_locations:
        for isa in ISAS:
            path = Path(folder) / "lib" / f"libridgeline_{isa}.so"
            if path.is_file():
                yield isa, path


def encode_rows(
    values: npt.NDArray[np.float32],
    fmt: QuantFormat,
    *,
    importance: npt.NDArray[np.float32] | None = None,
    isa: str | None = None,
) -> npt.NDArray[np.uint8]:
    """float32 [N, K], finite and contiguous -> blocks uint8 [N, row bytes].

    importance: float32 [K], weight of each column's squared error. Raises CheckpointError without a library.
    """
    encode = _encoder(isa)
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
