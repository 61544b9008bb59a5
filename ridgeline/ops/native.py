"""Runs a Program in C++ through ctypes, with one call per step: no torch, no per-op dispatch.

Weights are packed once (`ops.packing`). ctypes releases the GIL during the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ridgeline.distributed.collectives import Collectives, native_pointers
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.library import load_library
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.packing import PackedWeight, Packer, aligned_bytes
from ridgeline.ops.program import COLLECTIVES, Instruction, Opcode, Program
from ridgeline.quant.weight import ActivationQuant

PAGE_DTYPES = {"float32": 0, "float16": 1, "int8": 2}
ATTENTION_IMPLS = {"flash": 0, "naive": 1}
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
MAX_HEAD_DIM, MAX_Q_PER_KV = 1024, 64


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("opcode", ctypes.c_int32),
        ("outputs", ctypes.c_int32 * 3),
        ("inputs", ctypes.c_int32 * 5),
        ("weights", ctypes.c_int32 * 7),
        ("ints", ctypes.c_int32 * 6),
        ("floats", ctypes.c_float * 4),
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
        ("order", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("rounds_input", ctypes.c_int32),
        ("input_scale", ctypes.c_float),
        ("outlier", ctypes.c_float),
    ]

    @classmethod
    def of(cls, w: PackedWeight) -> _Weight:
        return cls(
            w.data.ctypes.data,
            None if w.order is None else w.order.ctypes.data,
            *(w.format, w.rows, w.columns),
            *activation_numbers(w.activation),
        )


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


EVENT = np.dtype(
    [
        ("begin_ns", np.int64),
        ("end_ns", np.int64),
        ("instruction", np.int32),
        ("thread", np.int16),
        ("kind", np.int16),
    ]
)
"""One range of a thread (`rl_event`), in ns of time.perf_counter_ns; instruction -1: between steps."""
EVENT_OP, EVENT_BUSY, EVENT_WAIT = 0, 1, 2
"""A whole instruction as thread 0 sees it; another thread at work; thread 0 waiting for the others."""


def _numbers(instruction: Instruction, attention: str) -> tuple[list[int], list[float]]:
    """The ints and floats of an instruction in the order of the comments in csrc/interpreter.cpp."""
    values = dict(instruction.attributes)

    def integer(name: str) -> int:
        value = values.get(name)
        return -1 if value is None else int(value)

    def real(name: str, default: float = 0.0) -> float:
        value = values.get(name, default)
        assert value is not None
        return float(value)

    match instruction.opcode:
        case Opcode.EMBED:
            first_row = values.get("first_row", 0)
            assert isinstance(first_row, int)
            return [first_row], [real("factor", 1.0)]
        case Opcode.SCALE:
            return [], [real("factor")]
        case Opcode.RMS_NORM:
            return [], [real("eps"), real("offset")]
        case Opcode.LINEAR:
            activation = values.get("activation")
            kind = -1 if activation is None else ACTIVATIONS[str(activation)]
            return [len(instruction.matrices), kind], [real("norm_eps"), real("norm_offset")]
        case Opcode.ROPE_COS_SIN:
            return [integer("constant"), integer("max_position")], [real("attention_factor")]
        case Opcode.ROPE:
            return [integer("head_dim")], []
        case Opcode.STORE_KV:
            return [integer("layer")], []
        case Opcode.ATTENTION:
            ints = [integer(name) for name in ("layer", "head_dim", "window", "num_sinks")]
            return [*ints, ATTENTION_IMPLS[attention]], [real("scale"), real("norm_eps"), real("norm_offset")]
        case Opcode.GLU:
            return [ACTIVATIONS[str(values["activation"])]], []
        case _:
            return [], []


def _padded(values: Sequence[int | None], length: int) -> list[int]:
    return [-1 if v is None else v for v in values] + [-1] * (length - len(values))


def encode_instructions(program: Program, attention: str) -> ctypes.Array[_Instruction]:
    """The instructions as csrc reads them: `rl_instruction` after `rl_instruction`."""
    encoded = (_Instruction * len(program.instructions))()
    for slot, instruction in zip(encoded, program.instructions, strict=True):
        ints, floats = _numbers(instruction, attention)
        slot.opcode = int(instruction.opcode)
        slot.outputs[:] = _padded(instruction.outputs, 3)
        slot.inputs[:] = _padded(instruction.inputs, 5)
        slot.weights[:] = _padded(instruction.weights, 7)
        slot.ints[: len(ints)] = ints
        slot.floats[: len(floats)] = floats
    return encoded


def activation_numbers(activation: ActivationQuant | None) -> tuple[int, float, float]:
    """rounds_input, input_scale and outlier of `rl_weight`; 0 for what is not there."""
    if activation is None:
        return 0, 0.0, 0.0
    return 1, activation.static_scale or 0.0, activation.outlier_threshold or 0.0


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
        attention: str = "flash",
        isa: str | None = None,
        packed_cache: Path | None = None,
        collectives: Collectives | None = None,
    ) -> None:
        """Buffers for max_tokens rows per step and max_logits logit rows; both grow on demand.

        `packed_cache`: a file to map the packed weights from, or to write them to where it is not there.
        `collectives`: of this rank, where the Program is the part of one; it is left open.
        Raises ConfigError for an attention shape that the kernels do not take.
        """
        self.isa, self._library = load_library(isa)
        self.num_threads = num_threads
        self._event_capacity = 0
        self._plan = program.plan_buffers()
        self._max_tokens = max_tokens
        _check_attention(program, layout)
        self._weights = Packer(self._library, num_threads).pack(program.weights, packed_cache)
        self.program = replace(program, weights=tuple(w.without_data() for w in program.weights))
        self._constants = [constant.astype(np.float32) for constant in program.constants]
        self.pages = aligned_bytes(layout.num_bytes)

        instructions = encode_instructions(program, attention)
        buffers = self._allocate_buffers(max_logits)
        weights = (_Weight * len(self._weights))(*(_Weight.of(w) for w in self._weights))
        constants = (ctypes.c_void_p * len(self._constants))(*(c.ctypes.data for c in self._constants))
        cache = _Cache(
            self.pages.ctypes.data,
            PAGE_DTYPES[layout.dtype],
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
        self._pointers = None if collectives is None else native_pointers(collectives)
        opcodes = {i.opcode for i in program.instructions}
        assert self._pointers or opcodes.isdisjoint(COLLECTIVES), "the Program of a rank needs collectives"
        if self._pointers:
            self._library.rl_set_collectives(self._handle, ctypes.byref(self._pointers.functions))
        self._has_logits = Opcode.SEND not in opcodes

    def _allocate_buffers(self, max_logits: int) -> ctypes.Array[_Buffer]:
        """Memory for every buffer, lifetimes that do not overlap sharing it."""
        self._max_logits = max_logits
        max_rows = {"T": self._max_tokens, "L": max_logits}
        self._arenas = [
            aligned_bytes(4 * max_rows[rows] * columns).view(np.float32)
            for rows, columns in self._plan.arenas
        ]
        place = self._plan.place
        return (_Buffer * len(self.program.buffers))(
            *(
                _Buffer(
                    self._arenas[place[b.index]].ctypes.data if place[b.index] >= 0 else None,
                    int(b.rows == "L"),
                    b.columns,
                )
                for b in self.program.buffers
            )
        )

    def step(self, batch: ForwardBatch) -> npt.NDArray[np.float32]:
        """Run one step -> logits [L, V], a view that the next step overwrites.

        A stage before the last has none: [L, 0]. Raises RankError if an exchange with another rank fails.
        """
        num_tokens, num_logits = len(batch.token_ids), len(batch.logit_rows)
        if num_tokens > self._max_tokens or num_logits > self._max_logits:  # logits of a whole prompt, say
            self._max_tokens = max(num_tokens, self._max_tokens)
            self._library.rl_set_buffers(
                self._handle, self._allocate_buffers(max(num_logits, self._max_logits))
            )
        arrays = [
            np.ascontiguousarray(a, np.int32)
            for a in (
                batch.token_ids,
                batch.positions,
                batch.slot_mapping,
                batch.query_start_loc,
                batch.seq_lens,
                batch.block_tables,
                batch.logit_rows,
            )
        ]
        call = _Batch(
            *(a.ctypes.data for a in arrays),
            num_tokens,
            len(batch.seq_lens),
            batch.block_tables.shape[1],
            num_logits,
        )
        if status := self._library.rl_step(self._handle, ctypes.byref(call)):
            assert self._pointers
            raise self._pointers.raised(status)
        if not self._has_logits:
            return np.empty((num_logits, 0), np.float32)
        return self.read_buffer(self.program.output, num_logits)

    def read_buffer(self, index: int, num_rows: int) -> npt.NDArray[np.float32]:
        """The first rows of a buffer as the last step left it; only the output is sure not to be reused."""
        columns = self.program.buffers[index].columns
        return self._arenas[self._plan.place[index]][: num_rows * columns].reshape(num_rows, columns)

    def greedy(
        self, logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """For each row of logits [L, V]: the first largest token, its logit, and log(sum(exp(logits))).

        The token is -1 where the logits have no finite largest one, or NaN anywhere.
        """
        rows, columns = logits.shape
        best, largest, total = (
            np.empty(rows, np.int32),
            np.empty(rows, np.float32),
            np.empty(rows, np.float64),
        )
        outs = (best.ctypes.data, largest.ctypes.data, total.ctypes.data)
        self._library.rl_greedy(self._handle, logits.ctypes.data, rows, columns, *outs)
        return best, largest, total

    def top_k(
        self, logits: npt.NDArray[np.float32], count: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Ids and values of the `count` largest of one row [V], largest first, ties by id."""
        ids, values = np.empty(count, np.int32), np.empty(count, np.float32)
        found = self._library.rl_top_k(
            logits.ctypes.data, len(logits), count, ids.ctypes.data, values.ctypes.data
        )
        return ids[:found], values[:found]

    def record_events(self, capacity: int | None = None) -> None:
        """Start to record what each thread does: once more, or with another capacity, it starts anew.

        `capacity`: events of a thread between two `take_events`; None: enough for any step; 0: stop.
        """
        if capacity is None:
            # A linear runs the pool once for every 128 tokens and once more to quantize; others less often.
            capacity = 1024 + (8 + self._max_tokens // 64) * len(self.program.instructions)
        self._event_capacity = capacity
        self._library.rl_timeline_start(self._handle, capacity)

    def take_events(self) -> npt.NDArray[np.void]:
        """The events (of dtype EVENT) since the last call, thread by thread; within one by their ends."""
        events = np.empty(max(1, self.num_threads) * self._event_capacity, EVENT)
        count = self._library.rl_timeline_take(self._handle, events.ctypes.data)
        assert count >= 0, f"more than {self._event_capacity} events of one thread"
        return events[:count].copy()

    def take_times(self) -> npt.NDArray[np.float64]:
        """Seconds of each instruction since the last call; the first call starts to record."""
        if not self._event_capacity:
            self.record_events()
        events = self.take_events()
        whole = events[events["kind"] == EVENT_OP]
        seconds = (whole["end_ns"] - whole["begin_ns"]) / 1e9
        return np.bincount(whole["instruction"], seconds, len(self.program.instructions)).astype(np.float64)

    @property
    def scratch_bytes(self) -> int:
        """What the kernels allocated themselves and keep."""
        return int(self._library.rl_scratch_bytes(self._handle))

    @property
    def packed_bytes(self) -> int:
        return sum(weight.data.nbytes for weight in self._weights)

    def close(self) -> None:
        """Stop the threads. Idempotent."""
        if getattr(self, "_handle", None):
            self._library.rl_destroy(self._handle)
            self._handle = None

    __del__ = close


def _check_attention(program: Program, layout: CacheLayout) -> None:
    for instruction in program.instructions:
        if instruction.opcode is Opcode.ATTENTION:
            heads = program.buffers[instruction.outputs[0]].columns // layout.head_dim
            per_kv = heads // layout.num_kv_heads
            if layout.head_dim > MAX_HEAD_DIM or per_kv > MAX_Q_PER_KV:
                raise ConfigError(
                    f"executor 'native' takes head_dim up to {MAX_HEAD_DIM} and up to {MAX_Q_PER_KV} query "
                    f"heads per KV head; this model has {layout.head_dim} and {per_kv}. Use executor='eager'"
                )
