"""GGUF block formats against the gguf package, byte for byte and bit for bit."""

from __future__ import annotations

import tracemalloc
from operator import attrgetter

import numpy as np
import pytest

from ridgeline import library
from ridgeline.errors import CheckpointError, ConfigError
from ridgeline.quant.formats import FORMATS, QuantFormat
from ridgeline.quant.gguf_blocks import LAYOUTS, dequantize, quantize, random_blocks
from ridgeline.quant.gguf_native import encode_rows

gguf = pytest.importorskip("gguf")

READABLE = [f for f in FORMATS.values() if f.ggml_type is not None]
BLOCK_FORMATS = [FORMATS[name] for name in LAYOUTS]
ENCODABLE = [FORMATS[name] for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]
LEGACY = [f for f in ENCODABLE if f.block_size == 32]
SEARCHED = [f for f in LEGACY if f.name != "Q8_0"]
K_QUANTS = [f for f in BLOCK_FORMATS if f.block_size == 256]
BY_NAME = attrgetter("name")


def bits(array: np.ndarray) -> np.ndarray:
    """Compares NaNs too."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def oracle(fmt: QuantFormat, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(fmt.ggml_type)))


def oracle_quantize(fmt: QuantFormat, values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.quantize(values, gguf.GGMLQuantizationType(fmt.ggml_type)))


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=BY_NAME)
def test_layout_has_the_size_of_the_block(fmt: QuantFormat) -> None:
    assert LAYOUTS[fmt.name].itemsize == fmt.block_bytes
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(fmt.ggml_type)] == (
        fmt.block_size,
        fmt.block_bytes,
    )


@pytest.mark.parametrize("fmt", [f for f in READABLE if f.name != "F64"], ids=BY_NAME)
def test_dequantize_any_bytes_is_exact(fmt: QuantFormat) -> None:
    # Any bytes: scales that are subnormal, infinite and NaN are among them.
    raw = np.random.default_rng(0).integers(0, 256, (7, 600 * fmt.block_bytes), np.uint8)
    expected = oracle(fmt, raw)
    assert (bits(dequantize(raw, fmt, (7, 600 * fmt.block_size))) == bits(expected)).all()


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=BY_NAME)
def test_dequantize_subnormal_scales_is_exact(fmt: QuantFormat) -> None:
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (64, fmt.block_bytes), np.uint8)
    blocks = raw.reshape(-1).view(LAYOUTS[fmt.name])
    for field in {"d", "m", "dmin"} & set(blocks.dtype.names or ()):
        blocks[field] = rng.integers(1, 1024, 64, np.uint16).view(np.float16)
    values = dequantize(raw, fmt, (64, fmt.block_size))
    assert np.isfinite(values).all()
    assert np.abs(values).max() > 0
    assert (bits(values) == bits(oracle(fmt, raw))).all()


def test_float64_stays_float64() -> None:
    values = np.random.default_rng(2).standard_normal((3, 5))
    restored = dequantize(values, FORMATS["F64"], (3, 5))
    assert restored.dtype == np.float64
    assert (restored == values).all()


@pytest.mark.parametrize("fmt", READABLE, ids=BY_NAME)
def test_dequantize_gives_an_array_of_its_own(fmt: QuantFormat) -> None:
    raw = random_blocks(fmt, 4, np.random.default_rng(3))
    raw.flags.writeable = False
    values = dequantize(raw, fmt, (2, 2 * fmt.block_size))
    assert values.flags.writeable
    assert values.shape == (2, 2 * fmt.block_size)
    assert not np.shares_memory(values, raw)


@pytest.mark.parametrize("shape", [(1, 31), (2, 32), (0, 32)])
def test_dequantize_refuses_a_shape_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"Q8_0 tensor of shape .*34 bytes"):
        dequantize(np.zeros(34, np.uint8), FORMATS["Q8_0"], shape)


@pytest.mark.parametrize("fmt", [FORMATS["Q4_K"], FORMATS["Q4_1"]], ids=BY_NAME)
def test_dequantize_needs_little_more_memory_than_its_result(fmt: QuantFormat) -> None:
    num_blocks = (1 << 22) // fmt.block_size
    raw = random_blocks(fmt, num_blocks, np.random.default_rng(4))
    tracemalloc.start()
    values = dequantize(raw, fmt, (16, (1 << 22) // 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * values.nbytes


def awkward_rows() -> np.ndarray:
    """Rows of 96: ordinary, wide, tiny, zero, signed zeros, constant, ties of +max and -max, exact halves."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((3000, 96), np.float32)
    rows[:1000] *= np.exp2(rng.integers(-30, 12, (1000, 1))).astype(np.float32)
    rows[1000] = 0
    rows[1001] = -0.0
    rows[1002] = 0.37
    rows[1003] = -0.37
    rows[1004, ::2] = rows[1004].max()
    rows[1005] = np.where(np.arange(96) % 2, 3.0, -3.0)
    rows[1006] = np.where(np.arange(96) % 2, -3.0, 3.0)
    rows[1007] = np.arange(96) - 48
    rows[1008:1500] = rng.integers(-127, 128, (492, 96))
    rows[1008:1500, ::32] = 127
    rows[1500:2000] = rng.integers(-254, 255, (500, 96)) / 2
    rows[1500:2000, 5::32] = 127
    rows[2000:2200] = rng.integers(-15, 17, (200, 96)) / 2
    rows[2000:2200, 9::32] = -8
    return rows


@pytest.mark.parametrize("fmt", ENCODABLE, ids=BY_NAME)
def test_quantize_is_byte_exact(fmt: QuantFormat) -> None:
    rows = awkward_rows()
    ours = quantize(rows, fmt)
    expected = oracle_quantize(fmt, rows)
    assert (bits(ours) == bits(expected)).all()
    # What `Weight.data` holds, so that the bytes can be used as they are.
    assert ours.dtype == {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}.get(fmt.name, np.uint8)
    assert ours.shape == (3000, 96 // fmt.block_size * fmt.block_bytes // ours.itemsize)


@pytest.mark.parametrize("fmt", LEGACY, ids=BY_NAME)
@pytest.mark.parametrize("shape", [(0, 64), (32,), (1, 32), (3, 2, 224)])
def test_quantize_any_shape(fmt: QuantFormat, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    ours = quantize(values, fmt)
    assert ours.shape == (*shape[:-1], shape[-1] // 32 * fmt.block_bytes)
    if ours.size:
        assert (ours == oracle_quantize(fmt, values)).all()
    # A whole step where the positive end is clipped, else half a step; and the rounding of d and m.
    step = {"Q4_0": 1 / 8, "Q4_1": 1 / 15, "Q5_0": 1 / 16, "Q5_1": 1 / 31, "Q8_0": 1 / 254}[fmt.name]
    error = np.abs(dequantize(ours, fmt, shape) - values)
    assert error.max(initial=0) <= (step + 0.001) * np.abs(values).max(initial=0)


@pytest.mark.parametrize("fmt", LEGACY, ids=BY_NAME)
def test_quantize_values_whose_scale_has_no_inverse(fmt: QuantFormat) -> None:
    values = np.full((1, 32), 1e-44, np.float32)
    values[0, 3] = -1e-44
    assert (np.abs(dequantize(quantize(values, fmt), fmt, (1, 32))) == 0).all()


@pytest.mark.parametrize("fmt", [*LEGACY, *K_QUANTS], ids=BY_NAME)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_quantize_refuses_what_a_block_cannot_hold(fmt: QuantFormat, bad: float) -> None:
    values = np.ones((2, 2 * fmt.block_size), np.float32)
    values[1, 40] = bad
    with pytest.raises(CheckpointError, match=f"cannot quantize to {fmt.name}.*finite"):
        quantize(values, fmt)


def test_bf16_rounds_to_even_and_keeps_nan() -> None:
    patterns = [
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x7F7FFFFF,
        0x7F800000,
        0x7F800001,
        0xFFFFFFFF,
        0x80000000,
    ]
    values = np.array(patterns, np.uint32).view(np.float32)
    stored = quantize(values, FORMATS["BF16"])
    assert stored.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7F80, 0x7FC0, 0xFFFF, 0x8000]

    every = np.random.default_rng(7).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    assert (bits(quantize(every, FORMATS["BF16"])) == bits(oracle_quantize(FORMATS["BF16"], every))).all()


def test_quantize_names_what_it_can_write() -> None:
    with pytest.raises(CheckpointError, match="cannot quantize to F64; choose one of F32.*Q8_0.*Q6_K"):
        quantize(np.zeros((1, 256), np.float32), FORMATS["F64"])


@pytest.mark.parametrize("fmt", K_QUANTS, ids=BY_NAME)
def test_k_quants_of_any_shape(fmt: QuantFormat) -> None:
    # Their bytes are compared with ggml's in tests/golden.
    values = np.random.default_rng(9).standard_normal((3, 2, 512)).astype(np.float32)
    ours = quantize(values, fmt)
    assert ours.shape == (3, 2, 2 * fmt.block_bytes)
    error = dequantize(ours, fmt, values.shape) - values
    # No worse than round to nearest with the step that the bits allow for the largest of 32 or so values.
    assert error.std() < {"Q2_K": 0.45, "Q3_K": 0.2, "Q4_K": 0.09, "Q5_K": 0.045, "Q6_K": 0.025}[fmt.name]
    assert quantize(values[:0], fmt).shape == (0, 2, 2 * fmt.block_bytes)


@pytest.mark.parametrize("fmt", [*SEARCHED, *K_QUANTS], ids=BY_NAME)
def test_importance_moves_the_error_away_from_what_matters(fmt: QuantFormat) -> None:
    values = np.random.default_rng(10).standard_normal((64, 512)).astype(np.float32)
    importance = np.where(np.arange(512) % 4 == 0, 100.0, 0.01)

    def error(weights: np.ndarray | None) -> float:
        found = dequantize(quantize(values, fmt, importance=weights), fmt, values.shape)
        return float((importance * (found - values) ** 2).mean())

    assert error(importance) < 0.9 * error(None)


@pytest.mark.parametrize(
    "bad", [np.ones(511), np.full(512, np.nan), np.full(512, np.inf), -np.ones(512), np.ones((1, 512))]
)
def test_importance_is_checked(bad: np.ndarray) -> None:
    with pytest.raises(CheckpointError, match="importance of shape .*expected 512 finite numbers"):
        quantize(np.ones((2, 512), np.float32), FORMATS["Q4_K"], importance=bad)


def test_without_a_library_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="instruction set 'sse9' is not available here"):
        encode_rows(np.ones((1, 256), np.float32), FORMATS["Q4_K"], isa="sse9")
    monkeypatch.setattr(library, "library_files", lambda: iter(()))
    assert quantize(np.ones((1, 256)), FORMATS["Q4_0"]).shape == (1, 144)
    with pytest.raises(ConfigError, match="quantize to Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0"):
        quantize(np.ones((1, 256)), FORMATS["Q4_K"])


@pytest.mark.parametrize("shape", [(), (31,), (32, 33)])
def test_quantize_refuses_a_part_of_a_block(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="multiple of 32"):
        quantize(np.zeros(shape, np.float32), FORMATS["Q4_0"])


@pytest.mark.parametrize("fmt", READABLE, ids=BY_NAME)
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_random_blocks_have_the_wanted_spread(fmt: QuantFormat, std: float) -> None:
    num_blocks = 65536 // fmt.block_size
    raw = random_blocks(fmt, num_blocks, np.random.default_rng(8), std=std)
    assert raw.shape == (num_blocks, fmt.block_bytes)
    values = dequantize(raw, fmt, (num_blocks * fmt.block_size,))
    assert np.isfinite(values).all()
    assert 0.9 * std < values.std() < 1.1 * std
    assert abs(values.mean()) < 0.15 * std
    again = random_blocks(fmt, num_blocks, np.random.default_rng(8), std=std)
    assert (raw == again).all()
