"""`ridgeline kernels`: tables for people, JSON on the last line, status 1 when a case fails."""

from __future__ import annotations

import json

import pytest

from ridgeline.cli import kernels as module
from ridgeline.cli.main import main
from ridgeline.library import ISAS
from ridgeline.ops.packing import GROUP_KERNELS, WEIGHT_FORMATS
from ridgeline.ops.run_case import CaseResult


def run(capsys, *arguments):
    """Exit status and output of one command."""
    status = 0
    try:
        main(["kernels", *map(str, arguments)])
    except SystemExit as error:
        status = error.code or 0
    return status, capsys.readouterr().out


def document(capsys, *arguments):
    status, out = run(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(out.splitlines()[-1])


def test_explain_lists_what_there_is(capsys):
    found = document(capsys, "explain")
    assert [s["isa"] for s in found["instruction_sets"]] == list(ISAS)
    assert [f["name"] for f in found["formats"]] == [*WEIGHT_FORMATS, *GROUP_KERNELS]
    assert found["isa"] in [s["isa"] for s in found["instruction_sets"] if s["usable"]]
    assert "residual" in found["fusion"] and all(found["fusion"].values())
    status, out = run(capsys, "explain")
    assert status == 0 and found["isa"] in out and "Q6_K" in out and "flash" in out


def test_test_runs_cases(capsys):
    found = document(capsys, "test", "--filter", "rms_norm 24", "--isa", "generic")
    assert found["passed"] and {c["isa"] for c in found["cases"]} == {"generic"}
    status, out = run(capsys, "test", "--filter", "rms_norm 24", "--isa", "generic")
    assert status == 0 and "4 runs, 0 failed" in out


def test_a_failed_case_is_status_1(capsys, monkeypatch):
    monkeypatch.setattr(
        module,
        "run_case",
        lambda case, isa, num_threads: CaseResult(
            case.name, case.group, isa, float("inf"), 1e-6, None, False
        ),
    )
    arguments = ("test", "--filter", "gather", "--isa", "generic")
    status, out = run(capsys, *arguments)
    assert status == 1 and "FAILED generic gather: off by inf" in out and "1 runs, 1 failed" in out
    status, out = run(capsys, *arguments, "--json")
    assert status == 1 and json.loads(out)["cases"][0]["error"] is None


def test_dump_writes_a_file_a_case(capsys, tmp_path):
    status, out = run(capsys, "test", "--filter", "glu silu", "--dump", tmp_path / "cases")
    assert status == 0 and out.startswith("3 cases in ")
    assert all(f.read_bytes().startswith(b"RLCASE02") for f in (tmp_path / "cases").iterdir())


def test_perf_times_formats_and_attention(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)
    sizes = ("--rows", 64, "--columns", 256, "--tokens", "1,3", "--format", "F32,Q4_0")
    found = document(capsys, "perf", *sizes)
    assert [(r["format"], r["tokens"]) for r in found["results"]] == [
        ("F32", 1),
        ("F32", 3),
        ("Q4_0", 1),
        ("Q4_0", 3),
    ]
    assert all(r["gmacs"] > 0 and r["weight_gb_per_s"] > 0 for r in found["results"])
    found = document(capsys, "perf", "attention", "--lengths", "40")
    assert [r["impl"] for r in found["results"]] == ["naive", "flash"]
    for arguments in (("perf", *sizes), ("perf", "attention", "--lengths", "40")):
        status, out = run(capsys, *arguments)
        assert status == 0 and "GMAC/s" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("test", "--filter", "no such case"), "no kernel case has 'no such case'"),
        (("test", "--isa", "sse"), "instruction set 'sse' is not available"),
        (("perf", "--format", "Q9_9"), "no kernel for Q9_9"),
        (("perf", "--tokens", "1,x"), "--tokens '1,x': expected positive whole numbers"),
        (("perf", "--columns", "100"), "must be a multiple of 256"),
        (("perf", "attention", "--impl", "sdpa"), "unknown attention sdpa"),
        (("perf", "attention", "--lengths", "0"), "expected positive whole numbers"),
    ],
)
def test_mistakes_are_one_line(arguments, expected):
    with pytest.raises(SystemExit) as stopped:
        main(["kernels", *arguments])
    message = str(stopped.value)
    assert message.startswith("ridgeline: ") and expected in message and "\n" not in message
