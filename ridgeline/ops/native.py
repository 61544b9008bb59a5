"""Runs a Program in C++ through ctypes, with one call per step: no torch, no per-op dispatch.

The libraries are built from csrc/, one per instruction set; the best one that this processor supports is
loaded. Weights stay where they are (memory-mapped in the file's own format) where the interpreter reads that
format; others are dequantized to float32 once. ctypes releases the GIL during the step.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.logs import logger
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.program import Instruction, Opcode, Program
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

ISAS = ("avx2", "generic")
"""Best first."""
WEIGHT_FORMATS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Formats that csrc/blocks.h unpacks."""
PAGE_DTYPES: dict[str, tuple[int, npt.DTypeLike]] = {"float32": (0, np.float32), "float16": (1, np.float16)}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("opcode", ctypes.c_int32),
        ("output", ctypes.c_int32),
        ("inputs", ctypes.c_int32 * 2),
        ("weights", ctypes.c_int32 * 2),
        ("ints", ctypes.c_int32 * 4),
        ("floats", ctypes.c_float * 2),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_void_p),
        ("rows_are_logits", ctypes.c_int32),
        ("columns", ctypes.c_int32),
    ]


class _Weight(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        ("pages", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("num_layers", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "token_ids",
            "positions",
            "slot_mapping",
            "query_start_loc",
            "seq_lens",
            "block_tables",
            "logit_rows",
        )
    ] + [(name, ctypes.c_int32) for name in ("num_tokens", "num_seqs", "num_blocks_per_table", "num_logits")]


def _folders() -> list[Path]:
    """Where libraries may be: an editable install keeps them apart from the sources."""
    package = importlib.util.find_spec("ridgeline")
    assert package is not None and package.submodule_search_locations is not None
    return [Path(root) / "lib" for root in package.submodule_search_locations]


def _library_files() -> Iterator[tuple[str, Path]]:
    for isa in ISAS:
        for folder in _folders():
            path = folder / f"libridgeline_{isa}.so"
            if path.is_file():
                yield isa, path


def load_library(isa: str | None = None) -> tuple[str, ctypes.CDLL]:
    """The best library that this processor runs, or the one for `isa`, with its name.

    Raises ConfigError if there is none, saying what was looked for and how to build it.
    """
    found = dict(_library_files())
    if "generic" not in found:
        raise ConfigError(
            "executor 'native' needs the compiled library libridgeline_generic.so, which is not in "
            f"{', '.join(map(str, _folders()))}; install a C++ compiler and run "
            "`pip install .` again, or use executor='eager' with the torch extra"
        )
    supports = ctypes.CDLL(str(found["generic"])).rl_cpu_supports
    usable = [name for name in ISAS if name in found and supports(name.encode())]
    if isa is not None and isa not in usable:
        raise ConfigError(f"instruction set {isa!r} is not available here; available: {', '.join(usable)}")
    chosen = isa or usable[0]
    library = ctypes.CDLL(str(found[chosen]))
    library.rl_create.restype = ctypes.c_void_p
    library.rl_create.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
    ]
    library.rl_destroy.argtypes = [ctypes.c_void_p]
    library.rl_destroy.restype = None
    library.rl_set_buffers.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.rl_set_buffers.restype = None
    library.rl_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.rl_step.restype = None
    return chosen, library


def _operands(instruction: Instruction) -> tuple[list[int], list[float]]:
    """The numbers of an instruction in the order of the comments in csrc/interpreter.cpp."""
    values = dict(instruction.attributes)

    def integer(name: str) -> int:
        value = values[name]
        return -1 if value is None else int(value)

    def real(name: str) -> float:
        value = values[name]
        assert value is not None
        return float(value)

    match instruction.opcode:
        case Opcode.SCALE:
            return [], [real("factor")]
        case Opcode.RMS_NORM:
            return [], [real("eps"), real("offset")]
        case Opcode.ROPE_COS_SIN:
            return [integer("constant"), integer("max_position")], [real("attention_factor")]
        case Opcode.ROPE:
            return [integer("head_dim")], []
        case Opcode.STORE_KV:
            return [integer("layer")], []
        case Opcode.ATTENTION:
            ints = [integer(name) for name in ("layer", "head_dim", "window", "num_sinks")]
            return ints, [real("scale")]
        case Opcode.GLU:
            return [ACTIVATIONS[str(values["activation"])]], []
        case _:
            return [], []


def _padded(values: tuple[int, ...], length: int) -> tuple[int, ...]:
    return values + (-1,) * (length - len(values))


class NativeProgram:
    """A Program with its buffers and KV pages, ready to step. Owns all memory that C++ points into."""

    def __init__(
        self,
        program: Program,
        layout: CacheLayout,
        *,
        max_tokens: int,
        max_logits: int,
        num_threads: int,
        isa: str | None = None,
    ) -> None:
        """Buffers for at most max_tokens rows per step, and max_logits logit rows, which grow on demand."""
        self.isa, self._library = load_library(isa)
        self._program = program
        self._plan = program.plan_buffers()
        self._max_tokens = max_tokens
        self._weights = [_as_native(weight) for weight in program.weights]
        self._constants = [constant.astype(np.float32) for constant in program.constants]
        dtype_code, dtype = PAGE_DTYPES[layout.dtype]
        page_elements = layout.num_slots * layout.num_kv_heads * layout.head_dim
        self.pages = np.empty((layout.num_layers, 2 * page_elements), dtype)

        instructions = (_Instruction * len(program.instructions))()
        for slot, instruction in zip(instructions, program.instructions, strict=True):
            ints, floats = _operands(instruction)
            slot.opcode = int(instruction.opcode)
            slot.output = -1 if instruction.output is None else instruction.output
            slot.inputs[:] = _padded(instruction.inputs, 2)
            slot.weights[:] = _padded(instruction.weights, 2)
            slot.ints[: len(ints)] = ints
            slot.floats[: len(floats)] = floats
        buffers = self._allocate_buffers(max_logits)
        weights = (_Weight * len(self._weights))(
            *(
                _Weight(
                    w.data.ctypes.data, w.format.ggml_type, w.shape[0], w.shape[1] if len(w.shape) > 1 else 1
                )
                for w in self._weights
            )
        )
        constants = (ctypes.c_void_p * len(self._constants))(*(c.ctypes.data for c in self._constants))
        cache = _Cache(
            self.pages.ctypes.data,
            dtype_code,
            layout.num_layers,
            layout.num_blocks,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        )
        self._handle = self._library.rl_create(
            instructions,
            len(instructions),
            buffers,
            len(buffers),
            weights,
            len(weights),
            constants,
            len(constants),
            ctypes.byref(cache),
            num_threads,
        )
        assert self._handle, "the library does not know an opcode or format of this Program"

    def _allocate_buffers(self, max_logits: int) -> ctypes.Array[_Buffer]:
        """Memory for every buffer, lifetimes that do not overlap sharing it."""
        self._max_logits = max_logits
        max_rows = {"T": self._max_tokens, "L": max_logits}
        self._arenas = [
            np.empty((max_rows[rows], columns), np.float32) for rows, columns in self._plan.arenas
        ]
        place = self._plan.place
        return (_Buffer * len(self._program.buffers))(
            *(
                _Buffer(self._arenas[place[b.index]].ctypes.data, int(b.rows == "L"), b.columns)
                for b in self._program.buffers
            )
        )

    def step(self, batch: ForwardBatch) -> npt.NDArray[np.float32]:
        """Run one step -> logits [L, V], a view that the next step overwrites."""
        num_tokens, num_logits = len(batch.token_ids), len(batch.logit_rows)
        assert num_tokens <= self._max_tokens
        if num_logits > self._max_logits:  # logits of a whole prompt were asked for
            self._library.rl_set_buffers(self._handle, self._allocate_buffers(num_logits))
        arrays = (
            batch.token_ids,
            batch.positions,
            batch.slot_mapping,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_tables,
            batch.logit_rows,
        )
        call = _Batch(
            *(np.ascontiguousarray(a, np.int32).ctypes.data for a in arrays),
            num_tokens,
            len(batch.seq_lens),
            batch.block_tables.shape[1],
            num_logits,
        )
        self._library.rl_step(self._handle, ctypes.byref(call))
        return self.read_buffer(self._program.output, num_logits)

    def read_buffer(self, index: int, num_rows: int) -> npt.NDArray[np.float32]:
        """The first rows of a buffer as the last step left it; only the output is sure not to be reused."""
        columns = self._program.buffers[index].columns
        arena = self._arenas[self._plan.place[index]].reshape(-1)
        return arena[: num_rows * columns].reshape(num_rows, columns)

    def close(self) -> None:
        """Stop the threads. Idempotent."""
        if getattr(self, "_handle", None):
            self._library.rl_destroy(self._handle)
            self._handle = None

    __del__ = close


def _as_native(weight: Weight) -> Weight:
    """The weight in a form that csrc reads: vectors as float32, unknown formats dequantized."""
    if weight.format.name == "F32" or (len(weight.shape) > 1 and weight.format.name in WEIGHT_FORMATS):
        data = np.ascontiguousarray(weight.data)
        return Weight(weight.name, weight.format, weight.shape, {"data": data})
    if len(weight.shape) > 1:
        logger.info("%s: %s has no native kernel yet; held as F32", weight.name, weight.format.name)
    values = np.ascontiguousarray(weight.dequantize(), np.float32)
    return Weight(weight.name, FORMATS["F32"], weight.shape, {"data": values})
