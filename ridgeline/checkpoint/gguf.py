"""GGUF files, versions 2 and 3, little-endian: a reader that trusts nothing. `gguf_write` is the writer.

    "GGUF" | u32 version | u64 tensors | u64 key-values | key-values | tensor entries | padding | tensor data
    key-value:    string key, u32 type, value              string: u64 length, bytes
    array value:  u32 element type, u64 count, elements
    tensor entry: string name, u32 dims, u64 dim[dims] (fastest first), u32 format, u64 offset into the data

The file is mapped, the header is walked once, and every length is checked against the bytes that are left
before anything is allocated. Large values stay where they are: an array of numbers is a numpy view, an array
of strings (a vocabulary) is a `StringArray` that decodes on demand.
Source: ggml's docs/gguf.md. Where that is silent, what llama.cpp and the gguf package accept.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from ridgeline.checkpoint.checkpoint import TensorEntry, map_weight, missing_tensor
from ridgeline.errors import CheckpointError, ModelNotFoundError
from ridgeline.quant.formats import GGML_TYPES, Array, QuantFormat
from ridgeline.quant.weight import Weight

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_DIMS = 4
_MAX_ARRAY_DEPTH = 8
"""Nested arrays are recursion: a few bytes a level would otherwise be enough to exhaust the stack."""

SCALARS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
"""Value type -> its number in the file and its code in `struct`, which numpy reads as well."""
_SCALAR_TYPES = {number: (name, struct.Struct("<" + code)) for name, (number, code) in SCALARS.items()}
_BOOL, STRING, ARRAY = 7, 8, 9
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

ValueType = Literal["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "u64", "i64", "f64", "string"]


class StringArray(Sequence[str]):
    """Strings inside the mapped file, decoded when asked for.

    Bytes that are not UTF-8 (tokens may hold any) decode to lone surrogates, `surrogateescape`: nothing is
    lost, and `s.encode("utf-8", "surrogateescape")` gives the bytes back.
    """

    __slots__ = ("_bounds", "_buffer")

    def __init__(self, buffer: mmap.mmap, bounds: array[int]) -> None:
        # String i is bounds[i] + 8 to bounds[i + 1]; the 8 bytes are its length.
        self._buffer = buffer
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self._buffer[self._bounds[i] + 8 : self._bounds[i + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        buffer, start = self._buffer, self._bounds[0]
        for end in self._bounds[1:]:
            yield buffer[start + 8 : end].decode("utf-8", "surrogateescape")
            start = end

    def __repr__(self) -> str:
        return f"<StringArray of {len(self)} strings>"


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A metadata value as it stands in a file: the number of its type, and its bytes."""

    type: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """An opened GGUF file. Owns the mapping, which lives as long as any array that was taken from it.

    `metadata` values are int, float, bool, str, numpy arrays (read-only), `StringArray`, or lists of these
    for nested arrays.
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    mapping: mmap.mmap
    value_spans: Mapping[str, tuple[int, int, int]]
    """Type, first byte and end of each metadata value."""
    kind: Literal["gguf"] = "gguf"

    def weight(self, name: str) -> Weight:
        """The tensor, memory-mapped. `CheckpointError` if there is none of that name."""
        if name not in self.tensors:
            raise missing_tensor(self.path, name, self.tensors)
        return map_weight(self.tensors[name], self.mapping)

    def stored_metadata(self) -> dict[str, StoredValue]:
        """The metadata with its exact types, for a file that is made from this one."""
        return {
            key: StoredValue(value_type, self.mapping[start:end])
            for key, (value_type, start, end) in self.value_spans.items()
        }


class _HeaderReader:
    """A position in the mapped file that only moves forward, over bytes that are known to be there."""

    __slots__ = ("at", "buffer", "path", "size")

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.at = 0

    def damaged(self, where: str, *, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {where}: expected {expected}, found {found}; "
            "the file is damaged, incomplete or not supported: fetch or convert it again"
        )

    def skip(self, num_bytes: int, where: str) -> int:
        """Move over `num_bytes` and return where they start."""
        start = self.at
        if num_bytes > self.size - start:
            left = f"{self.size - start} left at byte {start} (the file has {self.size})"
            raise self.damaged(where, expected=f"{num_bytes} more bytes", found=left)
        self.at = start + num_bytes
        return start

    def number(self, layout: struct.Struct, where: str) -> Any:
        return layout.unpack_from(self.buffer, self.skip(layout.size, where))[0]

    def count(self, where: str, *, min_bytes: int) -> int:
        """A u64 count of things of `min_bytes` or more, for which the rest of the file has room."""
        count: int = self.number(U64, where)
        room = (self.size - self.at) // min_bytes
        if count > room:
            raise self.damaged(where, expected=f"at most {room} (what the file has room for)", found=count)
        return count

    def string(self, where: str) -> str:
        num_bytes = self.count(f"{where} length", min_bytes=1)
        start = self.skip(num_bytes, where)
        return self.buffer[start : self.at].decode("utf-8", "surrogateescape")

    def value(self, value_type: int, where: str, *, depth: int = 0) -> Any:
        if value_type == STRING:
            return self.string(where)
        if value_type == ARRAY:
            return self.array_value(where, depth=depth + 1)
        if value_type not in _SCALAR_TYPES:
            raise self.damaged(where, expected="a value type from 0 to 12", found=value_type)
        if value_type == _BOOL:
            return bool(self.bools(1, where)[0])
        return self.number(_SCALAR_TYPES[value_type][1], where)

    def array_value(self, where: str, *, depth: int) -> Any:
        element_type = self.number(U32, where)
        if element_type == ARRAY:
            if depth == _MAX_ARRAY_DEPTH:
                raise self.damaged(where, expected=f"arrays nested at most {depth} deep", found="more")
            return [
                self.array_value(where, depth=depth + 1)
                for _ in range(self.count(f"{where} count", min_bytes=12))
            ]
        if element_type == STRING:
            return self.strings(self.count(f"{where} count", min_bytes=8), where)
        if element_type not in _SCALAR_TYPES:
            raise self.damaged(where, expected="an array element type from 0 to 12", found=element_type)
        layout = _SCALAR_TYPES[element_type][1]
        num_elements = self.count(f"{where} count", min_bytes=layout.size)
        if element_type == _BOOL:
            return self.bools(num_elements, where)
        return np.frombuffer(
            self.buffer, layout.format, num_elements, self.skip(num_elements * layout.size, where)
        )

    def bools(self, count: int, where: str) -> Array:
        stored = np.frombuffer(self.buffer, np.uint8, count, self.skip(count, where))
        if (stored > 1).any():
            raise self.damaged(where, expected="booleans stored as 0 or 1", found=stored.max())
        return stored.view(np.bool_)

    def strings(self, count: int, where: str) -> StringArray:
        """Walk over the lengths; the text itself is not touched."""
        bounds = array("Q", [self.at])
        note, length_at, buffer, at = bounds.append, U64.unpack_from, self.buffer, self.at
        try:
            for _ in range(count):
                at += 8 + length_at(buffer, at)[0]
                note(at)
        except (struct.error, OverflowError):
            at = self.size + 1
        if at > self.size:
            bad = bisect_right(bounds, self.size) - 1
            first_bad = f"string {bad} of {count} runs past the end of the file ({self.size} bytes)"
            raise self.damaged(where, expected=f"{count} strings", found=first_bad)
        self.at = at
        return StringArray(self.buffer, bounds)


def read_gguf(path: str | os.PathLike[str], *, header_only: bool = False) -> GGUFCheckpoint:
    """Map a GGUF file and read its header.

    header_only: the data need not be there, such as in the first megabytes of a download. `CheckpointError`
    for any damage, `ModelNotFoundError` where no file can be opened.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path}: expected a GGUF file, found an empty one; fetch it again")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelNotFoundError(
            f"{path}: expected a readable .gguf file, found: {error.strerror}; check the path"
        ) from error

    reader = _HeaderReader(path, mapping)
    magic = mapping[: len(MAGIC)]
    if magic != MAGIC:
        raise reader.damaged("magic", expected=f"a GGUF file, which starts with {MAGIC!r}", found=magic)
    reader.skip(len(MAGIC), "magic")
    version = reader.number(U32, "version")
    if version and not version & 0xFFFF:
        raise reader.damaged("version", expected="a little-endian file", found="a big-endian one")
    if version not in VERSIONS:
        raise reader.damaged("version", expected=f"one of {VERSIONS}", found=version)

    num_tensors = reader.count("number of tensors", min_bytes=32)
    num_keys = reader.count("number of keys", min_bytes=13)
    metadata, spans = _read_metadata(reader, num_keys)
    alignment = _checked_alignment(reader, metadata)
    tensors = _read_tensor_entries(reader, num_tensors, alignment)
    if not header_only:
        _check_ranges(reader, tensors.values())
    return GGUFCheckpoint(path, version, alignment, metadata, tensors, mapping, spans)


def _read_metadata(
    reader: _HeaderReader, num_keys: int
) -> tuple[dict[str, Any], dict[str, tuple[int, int, int]]]:
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int, int]] = {}
    for i in range(num_keys):
        key = reader.string(f"key {i} of {num_keys}")
        where = f"key {key!r:.100}"
        if key in metadata:
            raise reader.damaged(where, expected="every key once", found="a second one")
        value_type = reader.number(U32, f"{where} type")
        start = reader.at
        metadata[key] = reader.value(value_type, where)
        spans[key] = (value_type, start, reader.at)
    return metadata, spans


def _checked_alignment(reader: _HeaderReader, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if not is_alignment(alignment):
        raise reader.damaged(
            f"key {ALIGNMENT_KEY!r}", expected="a power of two of at least 8", found=f"{alignment!r:.80}"
        )
    return int(alignment)


def is_alignment(alignment: object) -> bool:
    # The specification asks for a multiple of 8, the readers in circulation for a power of two.
    return type(alignment) is int and alignment >= 8 and alignment & (alignment - 1) == 0


def _read_tensor_entries(reader: _HeaderReader, num_tensors: int, alignment: int) -> dict[str, TensorEntry]:
    relative: list[tuple[str, QuantFormat, tuple[int, ...], int]] = []
    names: set[str] = set()
    for i in range(num_tensors):
        name = reader.string(f"tensor {i} of {num_tensors}")
        where = f"tensor {name!r:.100}"
        if name in names:
            raise reader.damaged(where, expected="every tensor once", found="a second one")
        names.add(name)
        num_dims = reader.number(U32, where)
        if not 1 <= num_dims <= MAX_DIMS:
            raise reader.damaged(where, expected=f"1 to {MAX_DIMS} dimensions", found=num_dims)
        shape = tuple(reader.number(U64, where) for _ in range(num_dims))[::-1]
        ggml_type, offset = reader.number(U32, where), reader.number(U64, where)
        if ggml_type not in GGML_TYPES:
            known = ", ".join(f"{f.name} ({number})" for number, f in sorted(GGML_TYPES.items()))
            raise reader.damaged(
                where, expected=f"a format of {known}; no IQ types", found=f"type {ggml_type}"
            )
        block_format = GGML_TYPES[ggml_type]
        if 0 in shape:
            raise reader.damaged(where, expected="dimensions of at least 1", found=shape)
        if shape[-1] % block_format.block_size:
            whole = f"rows of whole {block_format.name} blocks of {block_format.block_size}"
            raise reader.damaged(where, expected=whole, found=f"shape {shape}")
        if offset % alignment:
            raise reader.damaged(where, expected=f"an offset aligned to {alignment}", found=offset)
        relative.append((name, block_format, shape, offset))

    data_start = align(reader.at, alignment)
    return {
        name: TensorEntry(name, fmt, shape, data_start + offset, fmt.num_bytes(shape), reader.path)
        for name, fmt, shape, offset in relative
    }


def _check_ranges(reader: _HeaderReader, entries: Iterable[TensorEntry]) -> None:
    """Every tensor lies inside the file, and no two share a byte."""
    taken, owner = 0, ""
    for entry in sorted(entries, key=lambda e: e.offset):
        end = entry.offset + entry.num_bytes
        span = f"bytes {entry.offset} to {end} ({entry.format.name} of shape {entry.shape})"
        if end > reader.size:
            inside = f"its data inside the file of {reader.size} bytes"
            raise reader.damaged(f"tensor {entry.name!r}", expected=inside, found=span)
        if entry.offset < taken:
            apart = f"data from byte {taken} on, where tensor {owner!r} ends"
            raise reader.damaged(f"tensor {entry.name!r}", expected=apart, found=span)
        taken, owner = end, entry.name


def align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
