"""`ridgeline kernels`: test, time and explain the native kernels on this machine.

Tests are the cases of `ops.cases`. Times are of single instructions, with every buffer touched before, and
are given beside what the same processor does in plain float32 on a matrix that stays in its cache, measured
in the same run.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import App, Parameter

from ridgeline.cli.options import make_app, print_json
from ridgeline.errors import ConfigError
from ridgeline.library import ISA_VARIABLE, ISAS, library_files, load_library, usable_isas
from ridgeline.ops.cases import all_cases
from ridgeline.ops.fuse import RULES
from ridgeline.ops.native import ATTENTION_IMPLS, PAGE_DTYPES
from ridgeline.ops.packing import GROUP_KERNELS, KERNELS, WEIGHT_FORMATS, format_number
from ridgeline.ops.run_case import dump_case, run_case
from ridgeline.ops.sketch import KernelCase
from ridgeline.profiling.kernel_times import (
    measure_attention,
    measure_fma,
    measure_linear,
)
from ridgeline.quant.formats import FORMATS, QuantFormat, format_named

kernels = make_app(
    name="kernels",
    help="""Test, time and explain the native kernels on this machine.

    Examples of use:

        ridgeline kernels explain

        ridgeline kernels test --filter Q4_0

        ridgeline kernels perf --format Q4_0,Q8_0 --tokens 1,128

        ridgeline kernels perf attention --lengths 128,512
    """,
)
perf = App(name="perf")
kernels.command(perf)

CPU_FLAGS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "generic": (),
}
"""Names in /proc/cpuinfo of what rl_cpu_supports asks for, each with what the next one needs."""
SECONDS = 0.2
"""Spent on each measurement, at least three repeats."""

Names = Annotated[str | None, Parameter(show_default=False)]


@dataclass(frozen=True, slots=True)
class FormatInfo:
    name: str
    kernel: str
    bytes_per_weight: float
    file_bytes_per_weight: float


@kernels.command(name="test")
def run_tests(
    *, isa: Names = None, filter: str = "", dump: Path | None = None, threads: int = 2, json: bool = False
) -> None:
    """Run the kernel cases and compare with float64. Exit status 1 if any fails.

    Examples:

        ridgeline kernels test

        ridgeline kernels test --isa generic --filter "attention flash"

        ridgeline kernels test --dump /tmp/cases

    Parameters
    ----------
    isa
        Instruction sets with commas between; all that this machine runs if left out.
    filter
        Only cases whose name contains this.
    dump
        Write the cases as files for csrc/run_cases.cpp into this directory instead of running them.
    threads
        Threads of the kernels.
    json
        End with one JSON document that holds every case.
    """
    cases = all_cases(filter)
    if not cases:
        raise ConfigError(f"no kernel case has {filter!r} in its name; leave --filter out to see all names")
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        for case in cases:
            dump_case(case, dump)
        sys.stdout.write(f"{len(cases)} cases in {dump}\n")
        return
    names = _isas(isa)
    results = [run_case(case, name, num_threads=threads) for name in names for case in cases]
    failed = [r for r in results if not r.passed]
    if json:
        print_json(
            {
                "passed": not failed,
                # A NaN or an infinity in the output is an infinite error, which JSON has not.
                "cases": [asdict(r) | {"error": r.error if np.isfinite(r.error) else None} for r in results],
            }
        )
    else:
        sys.stdout.write(_test_table(cases, names, {(r.isa, r.name): r.passed for r in results}))
        for r in failed:
            sys.stdout.write(f"FAILED {r.isa} {r.name}: off by {r.error:.3g}, may be {r.tolerance:.3g}\n")
        sys.stdout.write(f"{len(results)} runs, {len(failed)} failed\n")
    if failed:
        sys.exit(1)


def _isas(text: str | None) -> tuple[str, ...]:
    """The named instruction sets, or all usable ones."""
    names = usable_isas() if text is None else tuple(name.strip() for name in text.split(","))
    for name in names:
        load_library(name)  # refuses what is not there
    return names


def _test_table(cases: Sequence[KernelCase], isas: Sequence[str], passed: dict[tuple[str, str], bool]) -> str:
    """Passed / all for each group and instruction set."""
    lines = [f"{'':10}" + "".join(f"{isa:>12}" for isa in isas)]
    for group in dict.fromkeys(c.group for c in cases):
        names = [c.name for c in cases if c.group == group]
        cells = (f"{sum(passed[isa, n] for n in names)}/{len(names)}" for isa in isas)
        lines.append(f"{group:10}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines) + "\n"


@perf.default
def linear(
    *,
    isa: Names = None,
    format: Names = None,
    tokens: str = "1,4,16,128",
    rows: int = 2048,
    columns: int = 2048,
    threads: int = 1,
    json: bool = False,
) -> None:
    """Time the matrix kernels: for each format and number of tokens, multiply-adds and weight bytes a second.

    Examples:

        ridgeline kernels perf

        ridgeline kernels perf --isa avx2 --format Q4_0,F32 --tokens 1,128

    Parameters
    ----------
    isa
        One instruction set; the best if left out.
    format
        Weight formats with commas between; all if left out.
    tokens
        Numbers of tokens with commas between.
    rows
        Rows (outputs) of the matrix.
    columns
        Columns (inputs) of the matrix, a multiple of 256.
    threads
        Threads of the kernels.
    json
        End with one JSON document.
    """
    chosen, _ = load_library(isa)
    formats = KERNELS if format is None else tuple(name.strip() for name in format.split(","))
    if unknown := [name for name in formats if name not in KERNELS]:
        raise ConfigError(f"no kernel for {', '.join(unknown)}; formats: {', '.join(KERNELS)}")
    if columns % 256 or columns < 1 or rows < 1:
        raise ConfigError(
            f"--rows {rows} --columns {columns}: columns must be a multiple of 256, rows positive"
        )
    common: dict[str, Any] = {"isa": chosen, "num_threads": threads, "seconds": SECONDS}
    counts = _numbers(tokens, "--tokens")
    fma = measure_fma(**common)
    results = [
        measure_linear(name, count, fma, rows=rows, columns=columns, **common)
        for name in formats
        for count in counts
    ]
    if json:
        print_json(
            {"isa": chosen, "threads": threads, "fma_gmacs": fma, "results": [asdict(r) for r in results]}
        )
        return
    write = sys.stdout.write
    write(f"{chosen}, {threads} threads, {rows} x {columns}; float32 in cache: {fma:.1f} GMAC/s\n")
    write(f"{'format':8}{'tokens':>8}{'ms':>10}{'GMAC/s':>10}{'GB/s':>8}{'of fp32':>9}\n")
    for r in results:
        write(f"{r.format:8}{r.tokens:8}{r.milliseconds:10.3f}{r.gmacs:10.1f}")
        write(f"{r.weight_gb_per_s:8.1f}{r.share_of_fma:9.2f}\n")


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{flag} {text!r}: expected positive whole numbers with commas between, as 1,16")
    return numbers


@perf.command
def attention(
    *,
    impl: str = "naive,flash",
    lengths: str = "128,512,2048",
    isa: Names = None,
    threads: int = 1,
    json: bool = False,
) -> None:
    """Time attention over a prompt, 9 query heads and 3 KV heads of 64 as in SmolLM2, float32 pages.

    Examples:

        ridgeline kernels perf attention

        ridgeline kernels perf attention --impl flash --lengths 128,4096

    Parameters
    ----------
    impl
        Implementations with commas between.
    lengths
        Tokens of the prompt, with commas between.
    isa
        One instruction set; the best if left out.
    threads
        Threads of the kernels.
    json
        End with one JSON document.
    """
    chosen, _ = load_library(isa)
    impls = [part.strip() for part in impl.split(",")]
    if unknown := [name for name in impls if name not in ATTENTION_IMPLS]:
        raise ConfigError(f"unknown attention {', '.join(unknown)}; there are {', '.join(ATTENTION_IMPLS)}")
    known = [name for name in ("naive", "flash") if name in impls]
    results = [
        measure_attention(name, length, isa=chosen, num_threads=threads, seconds=SECONDS)
        for name in known
        for length in _numbers(lengths, "--lengths")
    ]
    if json:
        print_json({"isa": chosen, "threads": threads, "results": [asdict(r) for r in results]})
        return
    write = sys.stdout.write
    write(f"{chosen}, {threads} threads, 9 query heads and 3 KV heads of 64\n")
    write(f"{'':8}{'tokens':>8}{'ms':>10}{'GMAC/s':>10}{'scratch bytes':>16}{'moved bytes':>16}\n")
    for r in results:
        write(f"{r.impl:8}{r.length:8}{r.milliseconds:10.2f}{r.gmacs:10.1f}")
        write(f"{r.scratch_bytes:16,}{r.moved_bytes:16,}\n")


@kernels.command
def explain(*, json: bool = False) -> None:
    """What there is: instruction sets and which is used, weight formats, page types, attention, fusion rules.

    Examples:

        ridgeline kernels explain

        ridgeline kernels explain --json | tail -1 | jq .isa

    Parameters
    ----------
    json
        End with one JSON document.
    """
    chosen, library = load_library()
    usable, built, flags = usable_isas(), dict(library_files()), _cpu_flags()
    sets = []
    for isa in ISAS:
        missing = [flag for flag in CPU_FLAGS[isa] if flag not in flags]
        if isa not in built:
            why = "no library was built"
        elif isa in usable:
            why = "usable"
        else:
            why = f"the processor lacks {', '.join(missing) or 'it'}"
        sets.append({"isa": isa, "built": isa in built, "usable": isa in usable, "why": why})
    reason = "the best usable one" if chosen == usable[0] else f"{ISA_VARIABLE}={chosen}"
    formats = [
        FormatInfo(
            format.name,
            _kernel_of(format),
            library.rl_packed_bytes(format_number(format), 16, 1024) / (16 * 1024),
            format.bits_per_weight / 8,
        )
        for format in map(format_named, (*WEIGHT_FORMATS, *GROUP_KERNELS))
    ]
    rules = {name: (rule.__doc__ or "").partition("\n")[0] for name, rule in RULES.items()}
    if json:
        print_json(
            {
                "isa": chosen,
                "reason": reason,
                "machine": platform.machine(),
                "instruction_sets": sets,
                "formats": [asdict(f) for f in formats],
                "page_dtypes": list(PAGE_DTYPES),
                "attention": list(ATTENTION_IMPLS),
                "fusion": rules,
            }
        )
        return
    lines = [f"instruction set: {chosen} ({reason}), machine {platform.machine()}"]
    lines += [f"  {s['isa']:9} {s['why']}" for s in sets]
    lines += ["", "weight formats (packed and file bytes per weight)"]
    lines += [
        f"  {f.name:13}{f.bytes_per_weight:8.4f}{f.file_bytes_per_weight:8.4f}  {f.kernel}" for f in formats
    ]
    others = [name for name in FORMATS if name not in WEIGHT_FORMATS]
    lines += [
        f"  {', '.join(others)}: no kernel, held as F32",
        "  other groups are packed by the largest of 64, 32 and 16 that divides them, else held as F32;",
        "  symmetric ones get a zero point",
    ]
    lines += ["", f"KV pages: {', '.join(PAGE_DTYPES)}", f"attention: {', '.join(ATTENTION_IMPLS)}"]
    lines += ["", "fusion rules, in order"] + [f"  {name:20} {text}" for name, text in rules.items()]
    sys.stdout.write("\n".join(lines) + "\n")


def _cpu_flags() -> frozenset[str]:
    """Of the first processor; empty where there is no /proc."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


PLANES = {2: "2", 3: "2 + 1", 4: "4", 5: "4 + 1", 6: "4 + 2", 8: "8"}
"""How csrc/packed.h splits the bits of a code."""


def _kernel_of(format: QuantFormat) -> str:
    """How a matrix of this format is multiplied."""
    name = format.name
    if format.codes is not None:
        bits, columns, mins = format.codes.bits, format.block_size, " and a zero point"
    elif name.startswith("Q"):
        bits, columns = int(name[1]), 16 if name in ("Q2_K", "Q3_K", "Q6_K") else 32
        mins = " and a min" if name.endswith("_1") or name in ("Q2_K", "Q4_K", "Q5_K") else ""
    else:
        return "float columns, float32 activations"
    inputs = "int16" if bits == 8 else "int8"
    return (
        f"{bits}-bit codes in planes of {PLANES[bits]}, a scale{mins} for {columns} columns, "
        f"{inputs} activations"
    )
