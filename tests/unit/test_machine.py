"""Limits: plausible, kept, and measured again when what they belong to has changed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ridgeline.cli.main import main as ridgeline
from ridgeline.errors import ConfigError
from ridgeline.profiling import machine as module
from ridgeline.profiling.machine import describe_device, machine_limits, measure_limits, staleness


def main(arguments):
    """Run a command that must end well."""
    with pytest.raises(SystemExit) as end:
        ridgeline(arguments)
    if end.value.code:
        raise end.value


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A cache of its own, and sizes that take no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "READ_SIZES", (2**16, 2**20))
    monkeypatch.setattr(module, "REPEATS", 3)
    measured = []
    real = measure_limits
    monkeypatch.setattr(module, "measure_limits", lambda *a: measured.append(1) or real(*a))
    return measured


def test_limits_are_those_of_a_processor(quick):
    limits = machine_limits(num_threads=2)
    assert [size for size, _ in limits.read] == [2**16, 2**20]
    assert all(1 < rate < 20_000 for _, rate in limits.read + limits.read_one_thread)
    assert 1 < limits.fp32_gflop_s < 100_000
    # Sixteen sums of bytes take no more instructions than sixteen of floats, on every instruction set.
    assert limits.int8_gop_s > limits.fp32_gflop_s > 0 and limits.int16_gop_s > 0
    assert 1e-9 < limits.barrier_s < 1e-3
    assert limits.fp32_ridge == limits.fp32_gflop_s / limits.read[-1][1]


def test_they_are_kept_until_something_changes(quick, monkeypatch):
    first = machine_limits(num_threads=1)
    assert machine_limits(num_threads=1) == first and len(quick) == 1
    machine_limits(num_threads=1, refresh=True)
    assert len(quick) == 2
    monkeypatch.setattr(module, "identity", lambda: "another library")
    assert "changed" in staleness(first)
    assert machine_limits(num_threads=1).identity == "another library" and len(quick) == 3


def test_they_grow_old(quick):
    limits = machine_limits(num_threads=1)
    assert staleness(limits) is None
    assert "days old" in staleness(replace(limits, measured="2020-01-01T00:00:00Z"))


def test_a_damaged_file_is_measured_again(quick):
    machine_limits(num_threads=1)
    module.limits_path(1).write_text('{"schema": "ridgeline.machine/1", "name": ')
    machine_limits(num_threads=1)
    assert len(quick) == 2


def test_bandwidth_lies_between_what_was_measured():
    limits = replace(describe_device("h100"), read=((2**20, 100.0), (2**24, 20.0)))
    assert limits.read_gb_s(1) == 100 and limits.read_gb_s(2**40) == 20
    assert limits.read_gb_s(2**22) == pytest.approx(60)


def test_a_device_is_described_or_refused(capsys):
    main(["machine", "--device", "H100", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["limits"]["read"] == [[2**30, 3350]]
    with pytest.raises(ConfigError, match=r"k6.*known: .*h100"):
        describe_device("k6")


def test_the_command_shows_them(quick, capsys):
    main(["machine", "--num-threads", "1"])
    out = capsys.readouterr().out
    assert "GFLOP/s" in out and "GB/s" in out and "1 threads" in out
