"""Every kernel case on every instruction set that this machine runs, and a guard against slow code generation."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ridgeline.library import ISAS
from ridgeline.ops.cases import all_cases
from ridgeline.ops.packing import GROUP_KERNELS, WEIGHT_FORMATS
from ridgeline.ops.run_case import dump_case, run_case
from ridgeline.ops.sketch import KernelCase, Sketch, Texts
from ridgeline.profiling.kernel_times import measure_attention, measure_linear

CASES = all_cases()
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case, isa, available_isas):
    if isa not in available_isas:
        pytest.skip(f"this machine does not run {isa}")
    result = run_case(case, isa)
    assert result.passed, f"off by {result.error:.3g}, may be {result.tolerance:.3g}"


def test_the_list_names_every_weight_format_and_page_type():
    names = [case.name for case in CASES]
    for word in (*WEIGHT_FORMATS, *GROUP_KERNELS, "float32", "float16", "int8"):
        assert sum(word in name.replace("+", " ").split() for name in names) > 10, word


@pytest.mark.parametrize("format", [f for f in (*WEIGHT_FORMATS, *GROUP_KERNELS) if f[0] in "QI"])
def test_one_wrong_code_would_fail(format):
    """A code that is off by one moves a sum by a scale times an activation, far beyond the tolerance."""
    [case] = all_cases(f"linear {format} 9x37x256")
    built = case.make()
    weight = built.program.weights[-1]
    values = np.unique(np.abs(np.diff(np.sort(weight.dequantize()[0, :16]))))
    step = values[values > 1e-6].min()
    x = np.abs(built.program.weights[0].dequantize())
    assert step * np.median(x) > 20 * built.tolerance.max()


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_a_quantized_matrix_is_faster_than_a_float_one(isa, available_isas):
    """Q4_0 multiplies integers: at 128 tokens at least 1.6 times the rate of F32. Bad code generation shows here."""
    if isa not in available_isas:
        pytest.skip(f"this machine does not run {isa}")
    ratios = []
    for _ in range(3):  # the best of three: other work on the machine only slows down
        f32, q4_0 = (
            measure_linear(name, 128, 1.0, isa=isa, rows=512, columns=512, seconds=0.1)
            for name in ("F32", "Q4_0")
        )
        ratios.append(q4_0.gmacs / f32.gmacs)
        if ratios[-1] >= 1.6:
            break
    assert max(ratios) >= 1.6, ratios


def test_only_naive_attention_holds_the_scores():
    naive, flash = (measure_attention(impl, 512, seconds=0.0) for impl in ("naive", "flash"))
    assert naive.scratch_bytes >= 4 * 512 * 512 > 2 * flash.scratch_bytes
    assert naive.moved_bytes - flash.moved_bytes == 4 * 4 * 9 * 512 * 512


def test_wrong_outputs_fail():
    """The comparison itself: NaN, and an output that is off by more than the tolerance."""
    [case] = [c for c in CASES if c.name == "add"]
    built = case.make()
    for change in (np.nan, 1e-4):
        wrong = dataclasses.replace(built, expected=built.expected + change)
        assert not run_case(KernelCase("wrong", "rows", lambda w=wrong: w)).passed


def test_sketch_attention_is_the_definition():
    """One query, two keys, by hand."""
    sketch = Sketch(Texts(((0, 2),)), 1)
    q, k, v = (sketch.input(name, 2) for name in "qkv")
    sketch.store_kv(k, v, "float32", 2)
    out = sketch.attention(q, scale=0.5).value
    weights = np.exp(0.5 * (k.value @ q.value[1]))
    np.testing.assert_allclose(out[0], v.value[0])
    np.testing.assert_allclose(out[1], weights @ v.value / weights.sum(), rtol=1e-12)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_cases_run_without_python(tmp_path):
    """The files are read as they were written: a few cases pass, and one with other expectations fails."""
    binary = tmp_path / "run_cases"
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-Wno-psabi", "-ffp-contract=off", f"-o{binary}", "-pthread"]
        + [str(CSRC / name) for name in ("run_cases.cpp", "interpreter.cpp")],
        check=True,
    )
    names = ("add", "gather", "rope clamped", "linear Q4_K 5x37x256", "attention flash GQA 3")
    names += ("linear INT3_G48_SYM 9x21x192", "linear INT8_G192_SYM outliers ordered 9")
    files = [dump_case(case, tmp_path) for case in CASES if case.name in names]
    done = subprocess.run([binary, *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "7 cases, 0 failed\n")

    [case] = [c for c in CASES if c.name == "add"]
    built = case.make()
    wrong = KernelCase("wrong", "rows", lambda: dataclasses.replace(built, expected=built.expected + 1))
    truncated = tmp_path / "cut.case"
    truncated.write_bytes(files[0].read_bytes()[:-5])
    done = subprocess.run([binary, dump_case(wrong, tmp_path), truncated], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED wrong: row 0 column 0: " in done.stdout and "ends too early" in done.stdout
    assert done.stdout.endswith("2 cases, 2 failed\n")
