"""The compiled kernels: one shared object per instruction set, built from csrc/ and called through ctypes.

The best one that this processor supports is loaded. ctypes releases the GIL during every call.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ridgeline.errors import ConfigError

ISAS = ("avx512", "avx2", "generic")
"""Best first."""
ISA_VARIABLE = "RIDGELINE_ISA"
"""Environment variable that overrides the choice, for tests and comparisons."""


def _folders() -> list[Path]:
    """Where libraries may be: an editable install keeps them apart from the sources."""
    package = importlib.util.find_spec("ridgeline")
    assert package is not None and package.submodule_search_locations is not None
    return [Path(root) / "lib" for root in package.submodule_search_locations]


def library_files() -> Iterator[tuple[str, Path]]:
    """Every instruction set that is built, best first, with its library."""
    for isa in ISAS:
        for folder in _folders():
            path = folder / f"libridgeline_{isa}.so"
            if path.is_file():
                yield isa, path


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "rl_create": (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_int32] * 4 + [ctypes.c_void_p, ctypes.c_int32],
    ),
    "rl_destroy": (None, [ctypes.c_void_p]),
    "rl_set_buffers": (None, [ctypes.c_void_p] * 2),
    "rl_set_collectives": (None, [ctypes.c_void_p] * 2),
    "rl_step": (ctypes.c_int32, [ctypes.c_void_p] * 2),
    "rl_timeline_start": (None, [ctypes.c_void_p, ctypes.c_int64]),
    "rl_timeline_take": (ctypes.c_int64, [ctypes.c_void_p] * 2),
    "rl_scratch_bytes": (ctypes.c_int64, [ctypes.c_void_p]),
    "rl_greedy": (None, [ctypes.c_void_p] * 2 + [ctypes.c_int32] * 2 + [ctypes.c_void_p] * 3),
    "rl_top_k": (ctypes.c_int32, [ctypes.c_void_p] + [ctypes.c_int32] * 2 + [ctypes.c_void_p] * 2),
    "rl_packed_bytes": (ctypes.c_int64, [ctypes.c_int32] * 3),
    "rl_pack": (None, [ctypes.c_int32] * 3 + [ctypes.c_void_p] + [ctypes.c_int32] * 4 + [ctypes.c_void_p]),
    "rl_limit_read": (None, [ctypes.c_int32, ctypes.c_int64] + [ctypes.c_int32] * 2 + [ctypes.c_void_p]),
    "rl_limit_compute": (
        ctypes.c_int64,
        [ctypes.c_int32] * 2 + [ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p],
    ),
    "rl_limit_barrier": (None, [ctypes.c_int32] * 3 + [ctypes.c_void_p]),
    "rl_gguf_quantize": (
        ctypes.c_int32,
        [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32] + [ctypes.c_void_p] * 2,
    ),
    "rl_region_bytes": (ctypes.c_int64, [ctypes.c_int32] * 2 + [ctypes.c_int64]),
    "rl_region_init": (None, [ctypes.c_void_p] + [ctypes.c_int32] * 2 + [ctypes.c_int64]),
    "rl_region_abort": (None, [ctypes.c_void_p]),
    "rl_join": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int64] + [ctypes.c_int32] * 4),
    "rl_leave": (None, [ctypes.c_void_p]),
    "rl_all_reduce": (ctypes.c_int32, [ctypes.c_void_p] * 4 + [ctypes.c_int64, ctypes.c_int32]),
    "rl_all_gather": (
        ctypes.c_int32,
        [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32],
    ),
    "rl_send": (ctypes.c_int32, [ctypes.c_void_p] * 2 + [ctypes.c_int64]),
    "rl_receive": (ctypes.c_int32, [ctypes.c_void_p] * 2 + [ctypes.c_int64]),
    "rl_pointers": (None, [ctypes.c_void_p] * 2),
    "rl_traffic_of": (None, [ctypes.c_void_p] * 2),
    "rl_cpu_supports": (ctypes.c_int32, [ctypes.c_char_p]),
}


def usable_isas() -> tuple[str, ...]:
    """Instruction sets that are built and that this processor has, best first.

    Raises ConfigError if there is none, saying what was looked for and how to build it.
    """
    found = dict(library_files())
    if "generic" not in found:
        raise ConfigError(
            "executor 'native', and quantizing to a K-quant or by importance, need the compiled library "
            f"libridgeline_generic.so, which is not in {', '.join(map(str, _folders()))}; install a C++ "
            "compiler and run `pip install .` again, or use executor='eager' with the torch extra, and "
            "quantize to Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 without importance"
        )
    supports = ctypes.CDLL(str(found["generic"])).rl_cpu_supports
    return tuple(name for name in ISAS if name in found and supports(name.encode()))


def load_library(isa: str | None = None) -> tuple[str, ctypes.CDLL]:
    """The best library that this processor runs, or the one for `isa`, with its name.

    None: what the environment variable RIDGELINE_ISA says, else the best. Raises ConfigError.
    """
    usable = usable_isas()
    isa = isa or os.environ.get(ISA_VARIABLE) or usable[0]
    if isa not in usable:
        raise ConfigError(f"instruction set {isa!r} is not available here; available: {', '.join(usable)}")
    library = ctypes.CDLL(str(dict(library_files())[isa]))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return isa, library
