"""Whatever the bytes: a GGUF file is read, or refused with a CheckpointError; no third way.

Small valid files are mutated: single bytes, 8-byte words at every position, and (hypothesis) several changes,
cuts and insertions together. A file that is still accepted must be whole: every string decodes, every weight
can be dequantized, no tensor leaves the file. Each attempt is bounded in time and memory.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.checkpoint.gguf import StringArray, read_gguf
from ridgeline.checkpoint.gguf_write import TensorSource, write_gguf
from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.gguf_blocks import random_blocks

MAX_SECONDS = 1.0
MAX_BYTES_PER_BYTE = 60
"""Memory for Python objects over the file's size: a key of 13 bytes becomes an entry of a dict."""
FIXED_BYTES = 1 << 16

NASTY_WORDS = [
    *(0, 1, 7, 8, 9, 12, 13, 255, 1 << 16),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 40) + 8),
    *((1 << 63) - 1, 1 << 63, (1 << 63) - 8, (1 << 64) - 1, (1 << 64) - 8, (1 << 64) - 32),
]

Outcome = Literal["read", "refused", "refused without a name"]


class Victim:
    """A valid file's bytes, and a place to write mutations of it."""

    def __init__(self, path: Path, metadata: dict[str, Any], tensors: Iterable[TensorSource]) -> None:
        self.path = path
        write_gguf(path, metadata, tensors)
        self.content = path.read_bytes()
        self.header_size = min(t.offset for t in read_gguf(path).tensors.values())

    def outcome_of(self, content: bytes) -> Outcome:
        self.path.write_bytes(content)
        start = time.perf_counter()
        tracemalloc.start()
        try:
            outcome = read_everything(self.path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert outcome != "refused without a name"
        assert time.perf_counter() - start < MAX_SECONDS
        assert peak < MAX_BYTES_PER_BYTE * len(content) + FIXED_BYTES
        return outcome


def read_everything(path: Path) -> Outcome:
    try:
        checkpoint = read_gguf(path)
    except CheckpointError as error:
        return "refused" if str(path) in str(error) else "refused without a name"
    size = path.stat().st_size
    for value in checkpoint.metadata.values():
        if isinstance(value, StringArray):
            assert len(list(value)) == len(value)
    for name, entry in checkpoint.tensors.items():
        assert 0 < entry.offset < entry.offset + entry.num_bytes <= size
        weight = checkpoint.weight(name)
        assert weight.data.nbytes == entry.num_bytes
        assert weight.dequantize().shape == entry.shape
    return "read"


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> list[Victim]:
    directory = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    every_kind = {
        "general.architecture": "llama",
        "general.alignment": 32,
        "layers": 2,
        "eps": 1e-5,
        "tie": True,
        "tokens": ["<s>", "a", "", "日本", "😀"],
        "scores": [0.0, -1.0, 0.5],
        "flags": [True, False],
        "nested": [[1, 2], [3]],
        "big": np.uint64(1 << 60),
    }
    every_format = [
        TensorSource(f"t{i}", fmt, (2, fmt.block_size), [random_blocks(fmt, 2, rng)])
        for i, fmt in enumerate(FORMATS.values())
    ]
    one = TensorSource("w", FORMATS["Q8_0"], (2, 32), [bytes(68)])
    return [
        Victim(directory / "small.gguf", {"n": 1, "tokens": ["x", "yz"]}, [one]),
        Victim(directory / "large.gguf", every_kind, every_format),
    ]


def test_the_files_are_valid(victims: list[Victim]) -> None:
    assert [v.outcome_of(v.content) for v in victims] == ["read", "read"]


def test_every_word_of_the_header(victims: list[Victim]) -> None:
    victim = victims[0]
    outcomes = set()
    for at in range(victim.header_size - 8):
        for word in NASTY_WORDS:
            content = victim.content[:at] + struct.pack("<Q", word) + victim.content[at + 8 :]
            outcomes.add(victim.outcome_of(content))
    assert outcomes == {"read", "refused"}


def test_every_byte_of_the_header(victims: list[Victim]) -> None:
    victim = victims[1]
    outcomes = set()
    for at in range(victim.header_size):
        for change in (0x01, 0x80, 0xFF):
            content = bytearray(victim.content)
            content[at] ^= change
            outcomes.add(victim.outcome_of(bytes(content)))
    assert outcomes == {"read", "refused"}


Mutation = tuple[str, int, int]
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["byte", "half", "word", "insert", "delete", "cut"]),
        st.integers(0, 1 << 16),
        st.sampled_from(NASTY_WORDS) | st.integers(0, (1 << 64) - 1),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, header_size: int, mutations: list[Mutation]) -> bytes:
    changed = bytearray(content)
    for kind, position, value in mutations:
        at = position % min(header_size, len(changed) + 1)
        if kind == "cut":
            del changed[at:]
        elif kind == "delete":
            del changed[at : at + value % 32]
        elif kind == "insert":
            changed[at:at] = struct.pack("<Q", value)
        else:
            width = {"byte": 1, "half": 4, "word": 8}[kind]
            changed[at : at + width] = struct.pack("<Q", value)[:width]
    return bytes(changed)


@given(index=st.integers(0, 1), mutations=MUTATIONS)
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_mutated_headers(victims: list[Victim], index: int, mutations: list[Mutation]) -> None:
    victim = victims[index]
    victim.outcome_of(mutated(victim.content, victim.header_size, mutations))


@given(content=st.binary(max_size=200))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_random_bytes_after_a_good_start(victims: list[Victim], content: bytes) -> None:
    victims[0].outcome_of(b"GGUF" + struct.pack("<IQQ", 3, len(content) % 3, len(content) % 4) + content)


def test_many_tiny_entries_stay_small(victims: list[Victim]) -> None:
    """The worst cases for memory: as many keys, strings and nested arrays as a file can hold."""
    count = 20_000
    keys = b"".join(
        struct.pack("<Q", 4) + struct.pack("<I", i) + struct.pack("<I", 0) + b"\1" for i in range(count)
    )
    header = b"GGUF" + struct.pack("<IQ", 3, 0)
    array = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
    strings = struct.pack("<IQ", 8, count) + bytes(8 * count)
    nested = struct.pack("<IQ", 9, count) + struct.pack("<IQ", 0, 0) * count
    assert victims[0].outcome_of(header + struct.pack("<Q", count) + keys) == "read"
    assert victims[0].outcome_of(header + struct.pack("<Q", 1) + array + strings) == "read"
    assert victims[0].outcome_of(header + struct.pack("<Q", 1) + array + nested) == "read"
