"""Every op in C++ against the torch reference: float64 is the truth, float32 torch sets the tolerance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ridgeline.kvcache.layout import CacheLayout
from ridgeline.library import ISAS
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.packing import WEIGHT_FORMATS
from ridgeline.ops.program import Opcode
from ridgeline.ops.recorder import Recorder
from ridgeline.ops.torch_ops import TorchBatch, TorchOps
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.gguf_blocks import quantize, random_blocks
from ridgeline.quant.weight import Weight

LAYOUT = CacheLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=32, num_blocks=1)
INV_FREQ = 1.0 / 100.0 ** (np.arange(4) / 4)


def weight(name: str, *shape: int, format: str = "F32") -> Weight:
    rng = np.random.default_rng(len(name) + sum(shape))
    if format.endswith("_K"):
        rows, columns = shape
        blocks = random_blocks(FORMATS[format], rows * columns // 256, rng).reshape(rows, -1)
        return Weight(name, FORMATS[format], shape, {"data": blocks})
    values = rng.standard_normal(shape).astype(np.float32)
    data = values if format == "F32" else quantize(values, FORMATS[format])
    return Weight(name, FORMATS[format], shape, {"data": data})


def batch(num_tokens: int) -> ForwardBatch:
    rng = np.random.default_rng(num_tokens)
    one = np.arange(num_tokens, dtype=np.int32)
    return ForwardBatch(
        token_ids=rng.integers(0, 50, num_tokens).astype(np.int32),
        positions=(37 * one % 101).astype(np.int32),
        slot_mapping=np.full(num_tokens, -1, np.int32),
        query_start_loc=np.array([0, num_tokens], np.int32),
        seq_lens=np.array([0], np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        logit_rows=one[::2].copy(),
        max_query_len=num_tokens,
        max_seq_len=0,
    )


def embed(ops, b, columns=24, format="F32"):
    return ops.embed(ops.bind(weight("table", 50, columns, format=format)), b)


def linear(format: str, num_in: int, num_out: int, *, bias: bool = False) -> Callable:
    w = weight("w", num_out, num_in, format=format)
    bias_weight = weight("bias", num_out)

    def function(ops, b):
        return ops.linear(embed(ops, b, num_in), ops.bind(w), ops.bind(bias_weight) if bias else None)

    return function


def rotate(head_dim: int, max_position: int | None = None) -> Callable:
    def function(ops, b):
        cos_sin = ops.rope_cos_sin(
            ops.bind_constant(INV_FREQ), b, attention_factor=1.3, max_position=max_position
        )
        return ops.rope(embed(ops, b), cos_sin, head_dim=head_dim)

    return function


FUNCTIONS: dict[str, Callable] = {
    "scale": lambda ops, b: ops.scale(embed(ops, b), 1.7),
    "rms_norm": lambda ops, b: ops.rms_norm(embed(ops, b), ops.bind(weight("n", 24)), eps=1e-5, offset=0.0),
    "rms_norm offset": lambda ops, b: ops.rms_norm(
        embed(ops, b, 37), ops.bind(weight("n", 37)), eps=1e-6, offset=1.0
    ),
    "qk_norm": lambda ops, b: ops.rms_norm(embed(ops, b), ops.bind(weight("n", 8)), eps=1e-6, offset=0.0),
    "rope": rotate(8),
    "rope partial": rotate(12),
    "rope clamped": rotate(8, max_position=40),
    "silu": lambda ops, b: ops.glu(embed(ops, b, 29), ops.scale(embed(ops, b, 29), 3.0), activation="silu"),
    "gelu": lambda ops, b: ops.glu(ops.scale(embed(ops, b), 4.0), embed(ops, b), activation="gelu_tanh"),
    "add": lambda ops, b: ops.add(embed(ops, b), ops.scale(embed(ops, b), 0.3)),
    "gather": lambda ops, b: ops.gather_logit_rows(embed(ops, b), b),
    "linear bias": linear("F32", 33, 19, bias=True),
    **{f"linear F32 {k}x{n}": linear("F32", k, n) for k, n in ((1, 1), (7, 5), (8, 4), (31, 3), (255, 17))},
    **{f"linear {f}": linear(f, 96, 21) for f in ("F32", "F16", "BF16")},
    **{f"embed {f}": lambda ops, b, f=f: embed(ops, b, 256, f) for f in WEIGHT_FORMATS},
}
QUANTIZED = {f"linear {f}": linear(f, 256, 21) for f in WEIGHT_FORMATS if f.startswith("Q")}
"""Their activations are rounded to 8 bits: `ops.cases` has the oracle for the values."""


def run_torch(function: Callable, b: ForwardBatch, dtype: str) -> np.ndarray:
    ops = TorchOps(LAYOUT, dtype=dtype, device="cpu", attention="naive")
    with torch.inference_mode():
        return function(ops, TorchBatch.from_host(b, "cpu")).double().numpy()


def run_native(
    function: Callable, b: ForwardBatch, *, isa: str | None = None, num_threads: int = 2
) -> np.ndarray:
    recorder = Recorder()
    program = recorder.program(function(recorder, None))
    native = NativeProgram(
        program, LAYOUT, max_tokens=len(b.token_ids), max_logits=1, num_threads=num_threads, isa=isa
    )
    output = program.buffers[program.output]
    rows = len(b.logit_rows) if output.rows == "L" else len(b.token_ids)
    native.step(b)
    result = native.read_buffer(output.index, rows).copy()
    native.close()
    return result


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_native_errs_at_most_twice_as_much_as_torch_float32(name, isa, available_isas):
    if isa not in available_isas:
        pytest.skip(f"this machine does not run {isa}")
    for num_tokens in (1, 2, 3, 5, 31, 100):
        b = batch(num_tokens)
        truth = run_torch(FUNCTIONS[name], b, "float64")
        reference = np.abs(run_torch(FUNCTIONS[name], b, "float32") - truth).max()
        ulp = np.finfo(np.float32).eps * max(np.abs(truth).max(), 1.0)
        assert np.abs(run_native(FUNCTIONS[name], b, isa=isa) - truth).max() <= 2 * reference + 4 * ulp


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [*FUNCTIONS, *QUANTIZED])
def test_native_bits_depend_neither_on_the_batch_nor_on_threads(name, isa, available_isas):
    if isa not in available_isas:
        pytest.skip(f"this machine does not run {isa}")
    function = (FUNCTIONS | QUANTIZED)[name]
    b = batch(31)
    together = run_native(function, b, isa=isa, num_threads=2)
    np.testing.assert_array_equal(together, run_native(function, b, isa=isa, num_threads=1))
    for row in (0, 2, 30):
        alone = ForwardBatch(
            b.token_ids[row : row + 1],
            b.positions[row : row + 1],
            b.slot_mapping[:1],
            np.array([0, 1], np.int32),
            b.seq_lens,
            b.block_tables,
            np.zeros(1, np.int32),
            1,
            0,
        )
        expected = together[row // 2 if name == "gather" else row]
        np.testing.assert_array_equal(run_native(function, alone, isa=isa)[0], expected)


def test_opcodes_are_the_ones_of_the_header():
    header = (Path(__file__).parents[2] / "csrc/ridgeline.h").read_text()
    for opcode in Opcode:
        assert f"RL_{opcode.name} = {opcode.value}," in header
