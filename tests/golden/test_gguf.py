"""GGUF encoders, mixes and whole files against what llama.cpp answered (scripts/gguf_fixtures.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.compress.gguf import quantize_to_mix, read_importance, write_importance
from ridgeline.library import usable_isas
from ridgeline.models.load import load_model
from ridgeline.models.save_gguf import save_gguf
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.gguf_blocks import quantize
from ridgeline.quant.gguf_native import encode_rows
from tests.golden import gguf_inputs as inputs

GOLDEN = json.loads(inputs.GOLDEN.read_text())
ROWS, IMPORTANCES = inputs.encoder_rows(), inputs.importances()


def test_the_inputs_are_those_that_llama_cpp_got() -> None:
    # If only this fails, numpy draws other numbers from the same seed: run scripts/gguf_fixtures.py.
    given = [v for v in IMPORTANCES.values() if v is not None]
    assert inputs.digest(ROWS, *given) == GOLDEN["inputs"]


@pytest.mark.parametrize("kind", IMPORTANCES)
@pytest.mark.parametrize("name", inputs.ENCODERS)
def test_encoders_give_the_bytes_of_ggml(name: str, kind: str) -> None:
    encoded = quantize(ROWS, FORMATS[name], importance=IMPORTANCES[kind])
    assert inputs.digest(encoded) == GOLDEN["encoders"][name][kind]


@pytest.mark.parametrize("isa", usable_isas())
@pytest.mark.parametrize("name", ["Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_every_instruction_set_gives_the_same_bytes(name: str, isa: str) -> None:
    encoded = encode_rows(ROWS, FORMATS[name], importance=IMPORTANCES["uneven"], isa=isa)
    assert inputs.digest(encoded) == GOLDEN["encoders"][name]["uneven"]


@pytest.mark.parametrize("shape", inputs.SHAPES)
def test_formats_are_those_of_llama_quantize(shape: str) -> None:
    assert {mix: inputs.formats_of(shape, mix) for mix in inputs.MIXES} == GOLDEN["mixes"][shape]


def test_whole_files_hold_the_bytes_of_llama_quantize(tmp_path: Path) -> None:
    model = load_model(inputs.write_float_model(inputs.FILE_SHAPE, tmp_path / "f32.gguf"))
    # Through the file, as llama-quantize had it: sums and counts round.
    write_importance(model, inputs.file_importance(), tmp_path / "imatrix.gguf", num_tokens=1000)
    read = read_importance(model, tmp_path / "imatrix.gguf")
    found = {}
    for key in GOLDEN["files"]:
        mix, _, weighed = key.partition(" ")
        save_gguf(quantize_to_mix(model, mix, importance=read if weighed else None), tmp_path / "q.gguf")
        file = read_gguf(tmp_path / "q.gguf")
        found[key] = inputs.digest(*[np.asarray(file.weight(name).data) for name in file.tensors])
    assert found == GOLDEN["files"]
