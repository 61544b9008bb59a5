"""Hugging Face directories: config.json and one or many safetensors files, memory-mapped.

    u64 header length | header: JSON, name -> dtype, shape, data_offsets | data, without holes or overlaps

The header is read here rather than by the safetensors library because numpy has no bfloat16 (it is exposed
as uint16) and because every damage must end in one clear error.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ridgeline.checkpoint.checkpoint import INTEGERS, TensorEntry, map_weight, missing_tensor
from ridgeline.errors import CheckpointError, ModelNotFoundError
from ridgeline.quant.formats import FORMATS, Array, QuantFormat
from ridgeline.quant.weight import Weight

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
DTYPES = {name: FORMATS[name] for name in ("F64", "F32", "F16", "BF16")} | INTEGERS
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class HFCheckpoint:
    """An opened directory. `metadata` is config.json, its eos_token_id that of generation_config.json."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    mappings: Mapping[Path, mmap.mmap]
    kind: Literal["hf"] = "hf"

    def weight(self, name: str) -> Weight:
        """The tensor, memory-mapped. `CheckpointError` if there is none of that name, or integers."""
        weight = self._map(name)
        if weight.format.name in INTEGERS:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is of dtype {weight.format.name}; expected floats, or a "
                "quantization_config in config.json that says what they mean"
            )
        return weight

    def array(self, name: str) -> Array:
        """The values as they are stored, memory-mapped; bfloat16 as uint16."""
        return self._map(name).data

    def _map(self, name: str) -> Weight:
        if name not in self.tensors:
            raise missing_tensor(self.path, name, self.tensors)
        entry = self.tensors[name]
        return map_weight(entry, self.mappings[entry.file])


def read_hf(directory: str | os.PathLike[str]) -> HFCheckpoint:
    """Open a directory with config.json and *.safetensors.

    `CheckpointError` for any damage, `ModelNotFoundError` where there is no config.json.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(
            f"{directory}: expected a Hugging Face model directory, found no config.json; check the path"
        )
    metadata = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file():
        # Chat models end a turn with more tokens than config.json knows.
        eos = read_json(generation).get("eos_token_id")
        metadata |= {} if eos is None else {"eos_token_id": eos}

    tensors: dict[str, TensorEntry] = {}
    mappings: dict[Path, mmap.mmap] = {}
    for file in _files(directory):
        entries, mappings[file] = read_safetensors(file)
        for name, entry in entries.items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: expected every tensor once, found {name!r:.100}, which is in "
                    f"{tensors[name].file.name} too; remove the file that does not belong here"
                )
            tensors[name] = entry
    return HFCheckpoint(directory, metadata, tensors, mappings)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a CheckpointError."""
    try:
        return _json_object(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON object, found none: {error}") from None


def _json_object(text: bytes) -> dict[str, Any]:
    """Raises ValueError, also for a key that is there twice: readers differ in which one they believe."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    document = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(document, dict):
        raise ValueError(f"it is of type {type(document).__name__}")
    return document


def _files(directory: Path) -> list[Path]:
    """What the index names, else model.safetensors, else every safetensors file."""
    present = {path.name for path in directory.glob("*.safetensors")}
    if (directory / INDEX).is_file():
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{directory / INDEX}: expected weight_map: tensor name -> file name")
        names = set(weight_map.values())
    else:
        names = {"model.safetensors"} & present or present
    missing = sorted(names - present)
    if missing or not names:
        raise CheckpointError(
            f"{directory}: expected {(missing or ['a *.safetensors file'])[0]!s:.100}, found "
            f"{', '.join(sorted(present)) or 'none'}; fetch the model again"
        )
    return [directory / name for name in sorted(names)]


def read_safetensors(path: Path) -> tuple[dict[str, TensorEntry], mmap.mmap]:
    """Entries of one file, and its mapping. `CheckpointError` for any damage."""

    def damaged(where: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"{path}: {where}: expected {expected}, found {found!s:.200}; it is damaged, incomplete or "
            "not supported: fetch it again"
        )

    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise damaged("header length", "8 bytes", f"{size}")
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None
    header_bytes = int.from_bytes(mapping[:8], "little")
    room = min(size - 8, MAX_HEADER_BYTES)
    if header_bytes > room:
        raise damaged("header length", f"at most {room}", header_bytes)
    try:
        header = _json_object(mapping[8 : 8 + header_bytes])
    except (ValueError, RecursionError) as error:
        raise damaged("header", "a JSON object", error) from None
    header.pop("__metadata__", None)

    start = 8 + header_bytes
    entries: dict[str, TensorEntry] = {}
    for name, value in header.items():
        where = f"tensor {name!r:.100}"
        stated = value if isinstance(value, dict) else {}
        dtype: Any = stated.get("dtype")
        shape: Any = stated.get("shape")
        offsets: Any = stated.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise damaged(where, f"a dtype of {', '.join(DTYPES)}", repr(dtype))
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise damaged(where, "shape and two data_offsets", value)
        if not offsets[0] <= offsets[1] <= size - start:
            raise damaged(where, f"its data inside the {size - start} bytes that there are", offsets)
        num_bytes = DTYPES[dtype].num_bytes(tuple(shape))
        if num_bytes != offsets[1] - offsets[0]:
            raise damaged(where, f"{num_bytes} bytes for {dtype} of shape {shape}", offsets[1] - offsets[0])
        entries[name] = TensorEntry(name, DTYPES[dtype], tuple(shape), start + offsets[0], num_bytes, path)

    end = start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.num_bytes)):
        if entry.offset != end:
            raise damaged(f"tensor {entry.name!r:.100}", f"its data at byte {end}", f"byte {entry.offset}")
        end += entry.num_bytes
    if end != size:
        raise damaged("data", f"{end - start} bytes", size - start)
    return entries, mapping


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, QuantFormat, tuple[int, ...]]],
    chunks: Iterable[bytes | memoryview],
) -> None:
    """Write tensors (name, format, shape) and their bytes, one after the other in the same order.

    The data is streamed (`chunks` may cut it anywhere), and `path` appears only when it is complete.
    Raises CheckpointError for a format that safetensors does not have, and if the data is not as long as
    declared.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, fmt, shape in tensors:
        if fmt.name not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r}: expected {', '.join(DTYPES)}, got {fmt.name}")
        end = total + fmt.num_bytes(shape)
        header[name] = {"dtype": fmt.name, "shape": list(shape), "data_offsets": [total, end]}
        total = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            written = sum(file.write(chunk) for chunk in chunks)
        if written != total:
            raise CheckpointError(f"{path}: {total} bytes were declared, {written} were given")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
