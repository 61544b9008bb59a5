"""The kernel cases of matrices: every format, rounded inputs, and what is fused around a linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ridgeline.config import Activation
from ridgeline.ops.packing import GROUP_KERNELS, WEIGHT_FORMATS
from ridgeline.ops.sketch import BuiltCase, KernelCase, Sketch, rows_of
from ridgeline.quant.weight import ActivationQuant

ROUNDINGS = {
    "dynamic": ActivationQuant(),
    "static": ActivationQuant(static_scale=0.011),
    "outliers": ActivationQuant(outlier_threshold=2.25),
    "static outliers": ActivationQuant(static_scale=0.02, outlier_threshold=2.5),
    "no outlier": ActivationQuant(outlier_threshold=100.0),
    "all outliers": ActivationQuant(outlier_threshold=1e-6),
}
"""How an input may be rounded by its token; the first static scale is small enough to clip some codes."""


def _linear(
    format: str,
    count: int,
    n: int,
    k: int,
    *,
    bias: bool = False,
    rows: str = "normal",
    activation: ActivationQuant | None = None,
    is_ordered: bool = False,
) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(rows_of(count), 1)
        x = s.input("x", k, _activations(s.rng, count, k, rows))
        w = s.weight("w", n, k, format=format, activation=activation, is_ordered=is_ordered)
        return s.build(s.linear(x, w, s.weight("bias", n) if bias else None))

    return make


def _activations(rng: np.random.Generator, count: int, k: int, kind: str) -> npt.NDArray[np.float32]:
    x = rng.standard_normal((count, k), np.float32)
    if kind == "zero":
        x[::2] = 0
        x[1::2, :32] = 0
    elif kind == "outlier":
        x[:, ::37] *= 1000
    elif kind == "tiny":
        x[::2] *= np.float32(1e-39)
    return x


def _merged(
    formats: Sequence[str],
    count: int,
    output: int,
    *,
    bias: bool = False,
    roundings: Sequence[ActivationQuant | None] = (None,) * 3,
) -> Callable[[], BuiltCase]:
    """q, k and v of one input in one instruction; the case looks at one of the outputs."""

    def make() -> BuiltCase:
        s = Sketch(rows_of(count), 2)
        x = s.input("x", 256)
        outputs = []
        for name, n, format, how in zip("qkv", (53, 16, 19), formats, roundings, strict=False):
            w = s.weight(name, n, 256, format=format, activation=how)
            outputs.append(s.linear(x, w, s.weight(f"{name}.bias", n) if bias else None))
        return s.build(outputs[output], fused=True)

    return make


def _mlp(
    formats: tuple[str, str],
    activation: Activation,
    count: int,
    *,
    norm: bool,
    rounding: ActivationQuant | None = None,
) -> Callable[[], BuiltCase]:
    """rms_norm, gate and up, glu: fused into one linear."""

    def make() -> BuiltCase:
        s = Sketch(rows_of(count), 3)
        x = s.input("x", 256)
        if norm:
            x = s.rms_norm(x, s.weight("norm", 256), eps=1e-5, offset=1.0)
        gate, up = (
            s.linear(x, s.weight(name, 37, 256, format=format, std=0.1, activation=rounding))
            for name, format in zip(("gate", "up"), formats, strict=True)
        )
        return s.build(s.glu(gate, up, activation), fused=True)

    return make


def _normed(
    format: str,
    count: int,
    k: int,
    *,
    residual: bool,
    bias: bool = False,
    activation: ActivationQuant | None = None,
    is_ordered: bool = False,
) -> Callable[[], BuiltCase]:
    def make() -> BuiltCase:
        s = Sketch(rows_of(count), 4)
        x = s.input("x", k)
        old = s.input("residual", 37) if residual else None
        y = s.rms_norm(x, s.weight("norm", k), eps=1e-5, offset=0.0)
        w = s.weight("w", 37, k, format=format, activation=activation, is_ordered=is_ordered)
        y = s.linear(y, w, s.weight("bias", 37) if bias else None)
        return s.build(y if old is None else s.add(old, y), fused=True)

    return make


def linear_cases() -> Iterator[KernelCase]:
    def case(name: str, make: Callable[[], BuiltCase]) -> KernelCase:
        return KernelCase(f"linear {name}", "linear", make)

    for format in (*WEIGHT_FORMATS, *GROUP_KERNELS):
        for count in (1, 2, 3, 5, 7, 8, 9, 31, 33):
            yield case(f"{format} {count}x37x256", _linear(format, count, 37, 256))
        multiple = 256 if format.endswith("_K") else 64 if "_G64" in format else 32
        for k in (32, 64, 96, 256, 576, 768):
            if k % multiple:
                continue
            yield case(f"{format} 3x21x{k}", _linear(format, 3, 21, k))
        for kind in ("zero", "outlier", "tiny"):
            yield case(f"{format} 6x16x256 {kind}", _linear(format, 6, 16, 256, rows=kind))
        yield case(f"{format} bias", _linear(format, 9, 37, 256, bias=True))
    for format in ("F32", "F16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "INT4_G64", "INT3_G64", "INT8_G16"):
        yield case(f"{format} 255x37x256", _linear(format, 255, 37, 256))
    for k, n in ((1, 1), (7, 5), (33, 19), (255, 17)):
        yield case(f"F32 5x{n}x{k}", _linear("F32", 5, n, k))
    for formats in (
        ("F32",) * 3,
        ("Q4_0",) * 3,
        ("Q4_K", "Q4_K", "Q6_K"),
        ("Q8_0", "F16", "Q4_0"),
        ("Q5_1",) * 2,
    ):
        for bias in (False, True):
            for output in range(len(formats)):
                name = f"merged {'+'.join(formats)} output {output}{' bias' if bias else ''}"
                yield case(name, _merged(formats, 5, output, bias=bias))
    for activation in ("silu", "gelu_tanh"):
        for formats in (("F32", "F32"), ("Q4_0", "Q4_0"), ("Q4_K", "Q6_K"), ("Q8_0", "F16")):
            for count in (1, 9, 33, 130):
                name = f"gated {activation} {'+'.join(formats)} {count}"
                yield case(name, _mlp(formats, activation, count, norm=count != 9))
    for format in ("F32", "BF16", "Q4_0", "Q6_K"):
        for count in (1, 5, 33):
            yield case(f"norm {format} {count}", _normed(format, count, 256, residual=False))
            yield case(
                f"norm, residual {format} {count}",
                _normed(format, count, 768, residual=True, bias=count == 5),
            )
    yield from (case(name, make) for name, make in _group_cases())
    yield from (case(name, make) for name, make in _rounded_cases())


def _group_cases() -> Iterator[tuple[str, Callable[[], BuiltCase]]]:
    """Groups that are not packed as they are, and columns in an order of their own."""
    for bits in (2, 3, 4, 8):
        for size in (24, 48, 96, 128, 160, 192, 576, 960):  # 24: F32; 48: by 16; 96, 160: by 32; else by 64
            for kind in ("", "_SYM", "_SYM_F32"):
                format = f"INT{bits}_G{size}{kind}"
                for count in (1, 9):
                    k = size if size >= 192 else 4 * size
                    yield f"{format} {count}x21x{k}", _linear(format, count, 21, k)
    for format in ("INT2_G32", "INT4_G64", "INT4_G64_SYM", "INT8_G64", "INT4_G24"):
        for count in (1, 9, 40):
            k = 192
            yield f"{format} ordered {count}", _linear(format, count, 37, k, is_ordered=True)
            yield (
                f"norm, {format} ordered {count}",
                _normed(format, count, k, residual=count == 9, is_ordered=True),
            )
    for formats in (("INT4_G64",) * 3, ("INT4_G64", "INT8_G256_SYM", "Q6_K")):
        for output in range(3):
            yield f"merged {'+'.join(formats)} output {output}", _merged(formats, 5, output)
    for count in (1, 33):
        yield f"gated INT4_G64+INT3_G32 {count}", _mlp(("INT4_G64", "INT3_G32"), "silu", count, norm=True)


def _rounded_cases() -> Iterator[tuple[str, Callable[[], BuiltCase]]]:
    """Inputs in int8 by their token: W8A8, W4A8, LLM.int8()."""
    formats = ("INT8_G192_SYM", "INT8_G192", "INT8_G32", "INT8_G48", "INT4_G64", "INT4_G192_SYM", "INT3_G64")
    for format in (*formats, "INT2_G64_F32", "Q8_0", "Q4_0", "Q5_1", "F16", "F32", "INT8_G24"):
        for name, how in ROUNDINGS.items():
            for count in (1, 2, 9, 33, 70):
                yield f"{format} {name} {count}", _linear(format, count, 37, 192, activation=how)
        for kind in ("zero", "outlier", "tiny"):
            how = ROUNDINGS["outliers" if kind == "outlier" else "dynamic"]
            yield f"{format} rounded {kind}", _linear(format, 6, 16, 192, rows=kind, activation=how)
    how = ROUNDINGS["outliers"]
    for format in ("INT8_G192_SYM", "INT4_G64", "INT8_G24"):
        for count in (1, 9, 40):
            make = _linear(format, count, 37, 192, activation=how, is_ordered=True)
            yield f"{format} outliers ordered {count}", make
            yield (
                f"norm, {format} dynamic {count}",
                _normed(
                    format, count, 192, residual=True, activation=ROUNDINGS["dynamic"], is_ordered=count == 9
                ),
            )
    for k in (5, 33):
        yield f"F32 outliers 3x7x{k}", _linear("F32", 3, 7, k, activation=how)
    mixed = ("INT8_G256_SYM", "F32", "INT4_G64")
    for output in range(3):
        yield f"merged rounded output {output}", _merged(mixed, 5, output, roundings=(how,) * 3)
        yield f"not merged output {output}", _merged(mixed, 5, output, roundings=(how, None, how))
    for count in (1, 9, 130):
        make = _mlp(("INT8_G256_SYM",) * 2, "silu", count, norm=count != 9, rounding=ROUNDINGS["dynamic"])
        yield f"gated rounded {count}", make
