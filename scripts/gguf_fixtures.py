"""Make tests/golden/gguf.json: what llama.cpp answers to the inputs of tests/golden/gguf_inputs.py.

    PYTHONPATH=. .venv/bin/python scripts/gguf_fixtures.py --bin DIR

DIR holds libggml-base.so and llama-quantize (build llama.cpp, targets llama-quantize). Encoders are called
through ctypes, mixes and whole files come from llama-quantize.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.compress.gguf import write_importance
from ridgeline.models.registry import SPECS
from ridgeline.quant.formats import FORMATS
from tests.golden import gguf_inputs as inputs


def encode(library: ctypes.CDLL, name: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    fmt = FORMATS[name]
    out = np.empty((len(rows), rows.shape[1] // fmt.block_size * fmt.block_bytes), np.uint8)
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    weights = None if importance is None else importance.ctypes.data
    written = quantize(fmt.ggml_type, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
    assert written == out.size
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bin", type=Path, required=True)
    options = parser.parse_args()
    library = ctypes.CDLL(str(options.bin / "libggml-base.so"))
    rows, importances = inputs.encoder_rows(), inputs.importances()
    golden: dict[str, Any] = {
        "inputs": inputs.digest(rows, *[v for v in importances.values() if v is not None]),
        "encoders": {
            name: {kind: inputs.digest(encode(library, name, rows, v)) for kind, v in importances.items()}
            for name in inputs.ENCODERS
        },
        "mixes": {},
        "files": {},
    }

    with tempfile.TemporaryDirectory() as folder:
        source, target, matrix = (Path(folder) / name for name in ("f32.gguf", "q.gguf", "imatrix.gguf"))

        def quantized(mix: str, *more: str) -> Any:
            command = [options.bin / "llama-quantize", *more, source, target, mix, "2"]
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
            return read_gguf(target)

        for shape in inputs.SHAPES:
            inputs.write_float_model(shape, source)
            from_gguf = SPECS[inputs.model_of(shape).config.arch].names.from_gguf
            golden["mixes"][shape] = {
                mix: inputs.runs(
                    {from_gguf(n) or n: t.format.name for n, t in quantized(mix).tensors.items()}
                )
                for mix in inputs.MIXES
            }
        inputs.write_float_model(inputs.FILE_SHAPE, source)
        write_importance(
            inputs.model_of(inputs.FILE_SHAPE), inputs.file_importance(), matrix, num_tokens=1000
        )
        for mix in inputs.FILE_MIXES:
            for kind, more in {"": (), " imatrix": ("--imatrix", str(matrix))}.items():
                file = quantized(mix, *more)
                golden["files"][mix + kind] = inputs.digest(*[file.weight(n).data for n in file.tensors])
    inputs.GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
