"""Runs a kernel case on a library and compares, or writes it to a file for csrc/run_cases.cpp."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ridgeline.ops.emulate import EPS
from ridgeline.ops.native import PAGE_DTYPES, NativeProgram, activation_numbers, encode_instructions
from ridgeline.ops.packing import file_rows, format_number, group_layout, packed_format, packed_order
from ridgeline.ops.sketch import KernelCase
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

POISON = 0xFF
"""Every byte of the pages before the first step: NaN as float32, as float16, and as the scale of int8."""
FILE_MAGIC = b"RLCASE02"


@dataclass(frozen=True, slots=True)
class CaseResult:
    """`error` and `tolerance` of the element that is closest to failing, or fails most."""

    name: str
    group: str
    isa: str
    error: float
    tolerance: float
    rounding_error: float | None
    passed: bool


def run_case(case: KernelCase, isa: str | None = None, *, num_threads: int = 2) -> CaseResult:
    """Run every step on the library for `isa` (None: the best) and compare the output of the last one."""
    built = case.make()
    native = NativeProgram(
        built.program,
        built.layout,
        max_tokens=max(len(b.token_ids) for b in built.batches),
        max_logits=1,
        num_threads=num_threads,
        attention=built.attention,
        isa=isa,
    )
    native.pages.fill(POISON)
    for batch in built.batches:
        native.step(batch)
    output = native.read_buffer(built.program.output, len(built.expected)).astype(np.float64)
    native.close()
    error = np.abs(output - built.expected)
    error = np.where(np.isfinite(error), error, np.inf)
    worst = int(np.argmax(error - built.tolerance))
    return CaseResult(
        case.name,
        case.group,
        native.isa,
        float(error.flat[worst]),
        float(built.tolerance.flat[worst]),
        built.rounding_error,
        bool((error <= built.tolerance).all()),
    )


def _weight_bytes(weight: Weight) -> bytes:
    """Its fields of `rl_weight`, how its groups lie in the file, its order and its rows."""
    is_vector = len(weight.shape) == 1
    format = FORMATS["F32"] if is_vector else packed_format(weight)
    order = None if is_vector else packed_order(weight, format)
    rows, columns = (*weight.shape, 1)[:2]
    ints = (len(weight.shape), format_number(format), rows, columns, *group_layout(weight, format))
    out = struct.pack("<7i2f", *ints, *activation_numbers(weight.activation))
    for data in (b"" if order is None else order.tobytes(), file_rows(weight, format).tobytes()):
        out += struct.pack("<q", len(data)) + data
    return out


def dump_case(case: KernelCase, folder: Path) -> Path:
    """Write the case as one little-endian file, which csrc/run_cases.cpp reads and runs without Python."""
    built = case.make()
    program, layout = built.program, built.layout
    out = bytearray(FILE_MAGIC)

    def ints(*values: int) -> None:
        out.extend(struct.pack(f"<{len(values)}i", *values))

    def blob(data: bytes) -> None:
        out.extend(struct.pack("<q", len(data)) + data)

    blob(case.name.encode())
    ints(len(program.instructions))
    out.extend(bytes(encode_instructions(program, built.attention)))
    ints(len(program.buffers))
    for buffer in program.buffers:
        ints(int(buffer.rows == "L"), buffer.columns)
    ints(len(program.weights))
    for weight in program.weights:
        out.extend(_weight_bytes(weight))
    ints(len(program.constants))
    for constant in program.constants:
        blob(constant.astype(np.float32).tobytes())
    ints(PAGE_DTYPES[layout.dtype], layout.num_layers, layout.num_blocks, layout.block_size)
    ints(layout.num_kv_heads, layout.head_dim)
    out.extend(struct.pack("<q", layout.num_bytes))
    ints(len(built.batches))
    for b in built.batches:
        ints(len(b.token_ids), len(b.seq_lens), b.block_tables.shape[1], len(b.logit_rows))
        for array in (
            *(b.token_ids, b.positions, b.slot_mapping, b.query_start_loc),
            *(b.seq_lens, b.block_tables, b.logit_rows),
        ):
            blob(np.ascontiguousarray(array, np.int32).tobytes())
    ints(program.output)
    expected = built.expected.astype(np.float32)
    blob(expected.tobytes())
    slack = np.abs(built.expected) * EPS  # of writing it as float32
    blob((built.tolerance + slack).astype(np.float32).tobytes())
    path = folder / (case.name.replace(" ", "_").replace("/", "-") + ".case")
    path.write_bytes(out)
    return path
