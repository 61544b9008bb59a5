"""Writing GGUF files of version 3 (layout in `checkpoint.gguf`): streamed, and whole or not there at all."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ridgeline.checkpoint.gguf import (
    ALIGNMENT_KEY,
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    SCALARS,
    STRING,
    U32,
    U64,
    VERSIONS,
    StoredValue,
    ValueType,
    align,
    is_alignment,
)
from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import Array, QuantFormat

_NUMPY_TYPES = {np.dtype(code): name for name, (_, code) in SCALARS.items()}
_INTEGER_TYPES = ("u32", "u64", "i32", "i64")
_ARRAY_INTEGER_TYPES = ("i32", "i64", "u64")


@dataclass(frozen=True, slots=True)
class GGUFValue:
    """A metadata value with its type forced; for an array, the type of the (innermost) elements."""

    value: Any
    type: ValueType


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor to write: declared at once, its bytes taken chunk by chunk when its turn comes."""

    name: str
    format: QuantFormat
    shape: tuple[int, ...]
    """Row-major."""
    chunks: Iterable[bytes | memoryview | Array]
    """Together `format.num_bytes(shape)` bytes: one array, or a generator of pieces of any size."""


def write_gguf(
    path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Iterable[TensorSource]
) -> None:
    """Write a version 3 file; the data is streamed, and `path` appears only when it is complete.

    A Python int becomes u32, or the first of u64, i32, i64 that holds it; in arrays i32, i64 or u64 (token
    types and the like are i32 by convention). A float becomes f32. Numpy values keep their type. `GGUFValue`
    forces one, and a `StoredValue` is written as it was read.
    """
    path = Path(path)
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if not is_alignment(alignment):
        raise CheckpointError(
            f"{path}: {ALIGNMENT_KEY}: expected a power of two of at least 8, got {alignment!r}"
        )
    sources = list(tensors)
    _check_sources(path, sources)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(_header(path, metadata, sources, alignment))
            for source in sources:
                _pad(file, alignment)
                _write_chunks(file, path, source)
            _pad(file, alignment)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_sources(path: Path, sources: list[TensorSource]) -> None:
    names: set[str] = set()
    for source in sources:
        shape, block_size = source.shape, source.format.block_size
        if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1 or shape[-1] % block_size:
            raise CheckpointError(
                f"{path}: tensor {source.name!r}: expected 1 to {MAX_DIMS} dimensions, all positive, the "
                f"last one a multiple of {block_size} for {source.format.name}, got {shape}"
            )
        if source.format.ggml_type is None:
            raise CheckpointError(
                f"{path}: tensor {source.name!r}: {source.format.name} is no format of GGUF"
            )
        if source.name in names:
            raise CheckpointError(f"{path}: tensor {source.name!r} is given twice; names must differ")
        names.add(source.name)


def _header(path: Path, metadata: Mapping[str, Any], sources: list[TensorSource], alignment: int) -> bytes:
    parts = [MAGIC, U32.pack(VERSIONS[-1]), U64.pack(len(sources)), U64.pack(len(metadata))]
    for key, value in metadata.items():
        try:
            number, payload = _encode(value)
        except (struct.error, OverflowError, TypeError, UnicodeEncodeError) as error:
            raise CheckpointError(
                f"{path}: key {key!r}: cannot be written: {error}; give a number, string or list of one "
                "kind, with GGUFValue(value, type) where the type is not plain"
            ) from error
        parts += [_string_bytes(key), U32.pack(number), payload]

    offset = 0
    for source in sources:
        dims = source.shape[::-1]
        parts.append(_string_bytes(source.name))
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, source.format.ggml_type, offset))
        offset = align(offset + source.format.num_bytes(source.shape), alignment)
    return b"".join(parts)


def _string_bytes(text: object) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"{text!r:.80} is not a string")
    encoded = text.encode("utf-8", "surrogateescape")
    return U64.pack(len(encoded)) + encoded


def _encode(value: Any, forced: str | None = None) -> tuple[int, bytes]:
    """A metadata value -> its type's number, its bytes. `struct` refuses what the type cannot hold."""
    if isinstance(value, StoredValue):
        return value.type, value.payload
    if isinstance(value, GGUFValue):
        return _encode(value.value, value.type)
    if isinstance(value, np.ndarray | np.generic):
        return _encode(value.tolist(), forced or _NUMPY_TYPES.get(value.dtype))
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        kind = forced or _infer([value], _INTEGER_TYPES)
        if kind == "string":
            return STRING, _string_bytes(value)
        number, code = SCALARS[kind]
        return number, struct.pack("<" + code, value)

    elements = list(value)
    nested = bool(elements) and all(
        isinstance(e, Sequence | np.ndarray) and not isinstance(e, str | bytes) for e in elements
    )
    kind = "array" if nested else forced or _infer(elements, _ARRAY_INTEGER_TYPES)
    if kind == "array":
        number, payload = ARRAY, b"".join(_encode(e, forced)[1] for e in elements)
    elif kind == "string":
        number, payload = STRING, b"".join(_string_bytes(e) for e in elements)
    else:
        number, code = SCALARS[kind]
        payload = struct.pack(f"<{len(elements)}{code}", *elements)
    return ARRAY, U32.pack(number) + U64.pack(len(elements)) + payload


def _infer(elements: list[Any], integer_types: tuple[str, ...]) -> str:
    kinds = {type(e) for e in elements}
    if kinds == {bool}:
        return "bool"
    if kinds == {str}:
        return "string"
    if kinds == {int}:
        # The last one is tried in any case: struct says then what does not fit.
        return next((t for t in integer_types if _holds(t, elements)), integer_types[-1])
    if kinds and kinds <= {int, float}:
        return "f32"
    raise TypeError(f"no type for {', '.join(sorted(k.__name__ for k in kinds)) or 'an empty list'}")


def _holds(integer_type: str, elements: list[int]) -> bool:
    limits = np.iinfo(SCALARS[integer_type][1])
    return int(limits.min) <= min(elements) and max(elements) <= int(limits.max)


def _pad(file: IO[bytes], alignment: int) -> None:
    file.write(bytes(align(file.tell(), alignment) - file.tell()))


def _write_chunks(file: IO[bytes], path: Path, source: TensorSource) -> None:
    expected, written = source.format.num_bytes(source.shape), 0
    for chunk in source.chunks:
        piece = np.ascontiguousarray(chunk).data if isinstance(chunk, np.ndarray) else memoryview(chunk)
        written += piece.nbytes
        if written > expected:
            break
        file.write(piece)
    if written != expected:
        found = "more" if written > expected else written
        raise CheckpointError(
            f"{path}: tensor {source.name!r}: expected {expected} bytes for {source.format.name} of shape "
            f"{source.shape}, got {found}; nothing was written"
        )
