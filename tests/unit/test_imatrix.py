"""Importance matrices: what llama-imatrix writes is read, what is written is what it would be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ridgeline.checkpoint.gguf_write import TensorSource, write_gguf
from ridgeline.checkpoint.imatrix import read_imatrix, write_imatrix
from ridgeline.compress.gguf import read_importance, write_importance
from ridgeline.errors import CheckpointError
from ridgeline.models.load import load_model
from ridgeline.models.synth import synthesize
from ridgeline.quant.formats import FORMATS

gguf = pytest.importorskip("gguf")
F32 = FORMATS["F32"]


def tensors(**arrays: list[list[float]]) -> list[TensorSource]:
    found = {name.replace("__", "."): np.array(a, np.float32) for name, a in arrays.items()}
    return [TensorSource(name, F32, a.shape, [a]) for name, a in found.items()]


def test_round_trip_and_what_the_file_says(tmp_path: Path) -> None:
    mean = np.random.default_rng(0).gamma(0.3, 1, 96).astype(np.float32)
    given = {"blk.0.attn_q.weight": mean, "blk.0.ffn_down.weight": mean[:32] * 0}
    write_imatrix(tmp_path / "i.gguf", given, num_tokens=1500, datasets=["a.txt"])
    read = read_imatrix(tmp_path / "i.gguf")
    assert read.keys() == given.keys()
    np.testing.assert_allclose(read["blk.0.attn_q.weight"], mean, rtol=2e-7)

    file = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {key: field.contents() for key, field in file.fields.items()}
    assert fields["general.type"] == "imatrix" and fields["imatrix.datasets"] == ["a.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (2, 512)
    stored = {t.name: t for t in file.tensors}
    assert stored["blk.0.attn_q.weight.counts"].data.tolist() == [[1500]]
    np.testing.assert_allclose(
        stored["blk.0.attn_q.weight.in_sum2"].data[0], mean.astype(float) * 1500, rtol=1e-6
    )


def test_a_tensor_that_no_token_reached_has_ones(tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "i.gguf", {"general.type": "imatrix"}, tensors(a__in_sum2=[[0, 0]], a__counts=[[0]])
    )
    assert read_imatrix(tmp_path / "i.gguf")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("kind", "given", "match"),
    [
        ("model", {"a__in_sum2": [[1, 2]], "a__counts": [[1]]}, "general.type is 'imatrix', found 'model'"),
        ("imatrix", {"a__in_sum2": [[1, 2]]}, "a.counts"),
        ("imatrix", {"a__counts": [[1]]}, "end in .in_sum2, found none"),
        ("imatrix", {"a__in_sum2": [[1, -2]], "a__counts": [[1]]}, "no finite squares"),
        ("imatrix", {"a__in_sum2": [[1, np.inf]], "a__counts": [[1]]}, "no finite squares"),
        ("imatrix", {"a__in_sum2": [[1, 2], [3, 4]], "a__counts": [[1], [1]]}, "2 experts"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, kind: str, given: dict[str, list[list[float]]], match: str
) -> None:
    write_gguf(tmp_path / "i.gguf", {"general.type": kind}, tensors(**given))
    with pytest.raises(CheckpointError, match=match):
        read_imatrix(tmp_path / "i.gguf")


def test_importance_by_canonical_names(tmp_path: Path) -> None:
    model = load_model(synthesize("tiny-llama", "F32", path=tmp_path / "a.gguf", tie_embeddings=True))
    rng = np.random.default_rng(1)
    given = {n: rng.random(w.shape[1], np.float32) for n, w in model.weights.items() if len(w.shape) == 2}
    given["lm_head"] = given["embed_tokens"]
    write_importance(model, given, tmp_path / "i.gguf", num_tokens=7)
    assert "token_embd.weight" in read_imatrix(tmp_path / "i.gguf")
    assert "output.weight" not in read_imatrix(tmp_path / "i.gguf")
    read = read_importance(model, tmp_path / "i.gguf")
    assert read.keys() == given.keys()
    assert all(np.allclose(read[name], columns, rtol=1e-6) for name, columns in given.items())

    other = load_model(synthesize("tiny-llama", "F32", path=tmp_path / "b.gguf", hidden_size=128))
    with pytest.raises(CheckpointError, match="64 columns for .*but the model has 128"):
        read_importance(other, tmp_path / "i.gguf")
    fewer = load_model(synthesize("tiny-llama", "F32", path=tmp_path / "c.gguf", num_layers=1))
    with pytest.raises(CheckpointError, match="no such tensor"):
        read_importance(fewer, tmp_path / "i.gguf")
