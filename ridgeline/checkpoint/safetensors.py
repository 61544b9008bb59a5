"""Hugging Face directories: config.json and one or many safetensors files, memory-mapped.

A safetensors file is a little-endian u64 header length, that many bytes of JSON (name -> dtype, shape,
data_offsets), then the data. The header is read here rather than by the library because numpy has no bfloat16
and because every damage must end in one clear error.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ridgeline.checkpoint.checkpoint import TensorEntry, map_weight, missing_tensor
from ridgeline.errors import CheckpointError, ModelNotFoundError
from ridgeline.quant.formats import FORMATS, Weight

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
DTYPES = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True, slots=True)
class HFCheckpoint:
    """An opened directory. `metadata` is config.json, completed from generation_config.json."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    mappings: Mapping[Path, mmap.mmap]
    kind: Literal["gguf", "hf"] = "hf"

    def weight(self, name: str) -> Weight:
        if name not in self.tensors:
            raise missing_tensor(self.path, name, self.tensors)
        entry = self.tensors[name]
        return map_weight(entry, self.mappings[entry.file])


def read_hf(directory: str | Path) -> HFCheckpoint:
    """Open a directory with config.json and *.safetensors. Raises CheckpointError, ModelNotFoundError."""
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(f"{directory} has no config.json; expected a Hugging Face model directory")
    metadata = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        metadata = metadata | ({} if eos is None else {"eos_token_id": eos})
    tensors: dict[str, TensorEntry] = {}
    mappings: dict[Path, mmap.mmap] = {}
    for file in _files(directory):
        entries, mappings[file] = read_safetensors(file)
        for name, entry in entries.items():
            if name in tensors:
                raise CheckpointError(f"tensor {name!r} is in {tensors[name].file} and again in {file}")
            tensors[name] = entry
    return HFCheckpoint(directory, metadata, tensors, mappings)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a CheckpointError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise CheckpointError(f"{index}: expected weight_map, an object of tensor name -> file name")
        files = [directory / Path(name).name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [f for f in files if not f.is_file()]
    if missing or not files:
        raise CheckpointError(
            f"{directory}: {missing[0].name} is missing" if missing else f"{directory}: no *.safetensors file"
        )
    return files


def read_safetensors(path: Path) -> tuple[dict[str, TensorEntry], mmap.mmap]:
    """Entries of one file and its mapping. Raises CheckpointError naming what is wrong."""
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes; a safetensors file begins with a header length of 8 bytes")
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header_bytes = int.from_bytes(mapping[:8], "little")
    if header_bytes > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(f"{path}: the header is said to be {header_bytes} bytes long; the file has {size}")
    try:
        header = json.loads(mapping[8 : 8 + header_bytes].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    entries = {name: _entry(path, name, value, start, size) for name, value in header.items()}
    end = 0
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.num_bytes)):
        if entry.offset < end:
            raise CheckpointError(f"{path}: tensor {entry.name!r} overlaps the one before it")
        end = entry.offset + entry.num_bytes
    return entries, mapping


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> TensorEntry:
    def is_sizes(candidate: Any) -> bool:
        return isinstance(candidate, list) and all(type(n) is int and 0 <= n < 2**48 for n in candidate)

    if not isinstance(value, dict) or not is_sizes(value.get("shape")) or not is_sizes(value.get("data_offsets")):
        raise CheckpointError(f"{path}: tensor {name!r} has no valid shape and data_offsets")
    dtype, shape, offsets = value.get("dtype"), tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; supported: {', '.join(DTYPES)}")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
        raise CheckpointError(
            f"{path}: tensor {name!r} lies at bytes {offsets} of the data; the file has {size - start} of them"
        )
    num_bytes = FORMATS[DTYPES[dtype]].num_bytes(shape)
    if num_bytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {shape} in {dtype} needs {num_bytes} bytes; it has "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, FORMATS[DTYPES[dtype]], shape, start + offsets[0], num_bytes, path)


def write_safetensors(
    path: str | Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], chunks: Iterable[bytes | memoryview]
) -> None:
    """Write (name, dtype, shape) and their bytes, in order, through a temporary file.

    The data is streamed: `chunks` may cut it anywhere. Raises ValueError if it is not as long as declared.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape in tensors:
        num_bytes = FORMATS[dtype].num_bytes(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    encoded = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            written = sum(file.write(chunk) for chunk in chunks)
            if written != offset:
                raise ValueError(f"{path}: {offset} bytes were declared, {written} were given")
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
