"""Our GGUF files against llama-quantize's, byte for byte, mix by mix, from the same float32 model.

    .venv/bin/python scripts/compare_gguf.py smollm2 --bin DIR --work /tmp/gguf --out docs/results/gguf.json
    ... --imatrix FILE     an importance matrix for both

DIR holds llama-quantize of llama.cpp; the two run one after the other, two threads each.
Results are merged into the JSON file, by model, mix and importance.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.checkpoint.gguf import GGUFCheckpoint, read_gguf
from ridgeline.compress.gguf import MIXES, quantize_to_mix, read_importance
from ridgeline.models.load import load_model
from ridgeline.models.locate import locate_model
from ridgeline.models.save_gguf import save_gguf

THREADS = "2"
NOT_COMPARED = re.compile(r"quantize\.imatrix\.")
"""Keys that llama-quantize adds to say where its importance came from."""


def float_model(name: str, work: Path) -> Path:
    path = work / f"{name}-f32.gguf"
    if not path.exists():
        save_gguf(quantize_to_mix(load_model(locate_model(name)), "F32"), path)
    return path


def compare(ours: GGUFCheckpoint, theirs: GGUFCheckpoint) -> dict[str, Any]:
    """Formats, bytes of tensors and metadata; then whether the files as a whole are the same."""
    same_formats = sum(
        ours.tensors[n].format is t.format for n, t in theirs.tensors.items() if n in ours.tensors
    )
    num_bytes = num_equal = 0
    differing: list[str] = []
    for name, entry in theirs.tensors.items():
        mine = ours.weight(name).data.reshape(-1).view(np.uint8)
        other = theirs.weight(name).data.reshape(-1).view(np.uint8)
        num_bytes += entry.num_bytes
        equal = int((mine == other).sum()) if mine.size == other.size else 0
        num_equal += equal
        if equal != entry.num_bytes:
            differing.append(name)
    kept = {k: v for k, v in theirs.stored_metadata().items() if not NOT_COMPARED.match(k)}
    return {
        "num_tensors": len(theirs.tensors),
        "same_formats": same_formats,
        "equal_bytes": num_equal / num_bytes,
        "differing_tensors": differing,
        "same_metadata": ours.stored_metadata() == kept,
        "same_file": ours.path.read_bytes() == theirs.path.read_bytes(),
    }


def run_mix(name: str, mix: str, options: argparse.Namespace) -> dict[str, Any]:
    source = float_model(name, options.work)
    tag = f"{name}-{mix}{'-imatrix' if options.imatrix else ''}"
    ours, theirs = options.work / f"{tag}-ours.gguf", options.work / f"{tag}-theirs.gguf"

    command = [
        str(options.bin / "llama-quantize"),
        *(["--imatrix", str(options.imatrix)] if options.imatrix else []),
    ]
    began = time.perf_counter()
    subprocess.run([*command, str(source), str(theirs), mix, THREADS], check=True, capture_output=True)
    their_seconds = time.perf_counter() - began

    began = time.perf_counter()
    model = load_model(source)
    importance = read_importance(model, options.imatrix) if options.imatrix else None
    quantized = quantize_to_mix(model, mix, importance=importance)
    save_gguf(quantized, ours, file_type=MIXES[mix].file_type)
    seconds = time.perf_counter() - began

    found = compare(read_gguf(ours), read_gguf(theirs))
    return found | {"seconds": round(seconds, 2), "llama_quantize_seconds": round(their_seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mixes", default=",".join(m for m in MIXES if m not in ("F32", "F16", "BF16")))
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--keep", action="store_true", help="keep the files")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text())
    for mix in options.mixes.split(","):
        found = run_mix(options.model, mix, options)
        key = f"{options.model} {mix}{' imatrix' if options.imatrix else ''}"
        results[key] = found
        print(key, json.dumps(found), flush=True)
        if options.out:
            options.out.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        if not options.keep:
            for file in options.work.glob(f"{options.model}-{mix}*-ours.gguf"):
                file.unlink()
            for file in options.work.glob(f"{options.model}-{mix}*-theirs.gguf"):
                file.unlink()


if __name__ == "__main__":
    main()
