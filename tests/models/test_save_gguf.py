"""Writing GGUF files: copies are exact, made ones say the same model, what cannot be said is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.checkpoint.gguf_write import GGUFValue, TensorSource, write_gguf
from ridgeline.compress.gguf import quantize_to_mix
from ridgeline.config import LoadConfig
from ridgeline.errors import CheckpointError, TokenizerError
from ridgeline.models.load import LoadedModel, load_model
from ridgeline.models.save_gguf import save_gguf
from ridgeline.models.synth import synthesize
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.groups import Groups, pack_groups
from ridgeline.quant.weight import ActivationQuant, Weight
from ridgeline.tokenizer.load import load_tokenizer
from ridgeline.tokenizer.to_gguf import gguf_vocabulary

LLAMA3 = {"num_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "num_kv_heads": 2}
MODELS = {
    "tiny-llama": {},
    "tiny-gemma3": {},
    "llama-1b": LLAMA3 | {"head_dim": 16, "vocab_size": 512},  # RoPE scaling as a tensor
}


def same_weights(one: LoadedModel, other: LoadedModel) -> bool:
    return list(one.weights) == list(other.weights) and all(
        one.weights[name].format is weight.format and np.array_equal(one.weights[name].data, weight.data)
        for name, weight in other.weights.items()
    )


@pytest.mark.parametrize("like", MODELS)
def test_a_file_saved_again_is_the_same_file(tmp_path: Path, like: str) -> None:
    first = synthesize(like, "Q4_0", path=tmp_path / "a.gguf", **MODELS[like])
    save_gguf(load_model(first), tmp_path / "b.gguf")
    save_gguf(load_model(tmp_path / "b.gguf"), tmp_path / "c.gguf")
    a, b = read_gguf(first), read_gguf(tmp_path / "b.gguf")
    # synthesize states no file type, and writes tensors in the order of the model.
    assert b.metadata["general.file_type"] == 2
    stored = b.stored_metadata()
    assert {key: stored[key] for key in a.stored_metadata()} == a.stored_metadata()
    assert {n: t.shape for n, t in a.tensors.items()} == {n: t.shape for n, t in b.tensors.items()}
    assert all(np.array_equal(a.weight(name).data, b.weight(name).data) for name in a.tensors)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_types_of_values_survive(tmp_path: Path) -> None:
    source = read_gguf(synthesize("tiny-llama", "F32", path=tmp_path / "a.gguf"))
    odd = {
        "odd.u8": GGUFValue(7, "u8"),
        "odd.f64": GGUFValue(0.1, "f64"),
        "odd.u64": GGUFValue(1, "u64"),
        "odd.strings": GGUFValue([b"\xff\xfe".decode("utf-8", "surrogateescape")], "string"),
        "odd.nested": GGUFValue([[1], [2, 3]], "i16"),
        "split.count": GGUFValue(3, "u16"),
    }
    tensors = [TensorSource(w.name, w.format, w.shape, [w.data]) for w in map(source.weight, source.tensors)]
    write_gguf(tmp_path / "b.gguf", source.stored_metadata() | odd, tensors)
    save_gguf(load_model(tmp_path / "b.gguf"), tmp_path / "c.gguf")
    before, after = (read_gguf(tmp_path / f"{n}.gguf").stored_metadata() for n in "bc")
    assert all(after[key] == before[key] for key in odd if key != "split.count")
    assert "split.count" not in after


@pytest.mark.parametrize("like", MODELS)
def test_a_directory_becomes_the_file_of_the_same_model(tmp_path: Path, like: str) -> None:
    directory = synthesize(like, "F32", path=tmp_path / "hf", seed=3, **MODELS[like])
    expected = load_model(synthesize(like, "F32", path=tmp_path / "a.gguf", seed=3, **MODELS[like]))
    save_gguf(load_model(directory), tmp_path / "b.gguf")
    made = load_model(tmp_path / "b.gguf")
    assert made.config == expected.config
    for name, weight in expected.weights.items():
        # Norms with their offset are rounded once more.
        np.testing.assert_allclose(made.weights[name].dequantize(), weight.dequantize(), rtol=3e-7)
    text = "<|im_start|>user\nHello the world 1234 ünï<|im_end|>\n"
    ours, theirs = load_tokenizer(made.checkpoint), load_tokenizer(expected.checkpoint)
    assert ours is not None and theirs is not None
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.chat_template, ours.eos_token_ids) == (theirs.chat_template, theirs.eos_token_ids)


def test_quantized_models_read_back_to_the_same_bits(tmp_path: Path) -> None:
    model = load_model(synthesize("tiny-llama", "F32", path=tmp_path / "a.gguf", hidden_size=256))
    for mix, file_type in (("Q4_K_M", 15), ("Q2_K", 10), ("Q8_0", 7), ("F16", 1)):
        quantized = quantize_to_mix(model, mix)
        save_gguf(quantized, tmp_path / "q.gguf")
        read = load_model(tmp_path / "q.gguf")
        assert same_weights(quantized, read)
        assert read.checkpoint is not None and read.checkpoint.metadata["general.file_type"] == file_type


def test_a_model_made_in_memory(tmp_path: Path) -> None:
    model = load_model(synthesize("tiny-llama", "Q8_0", path=tmp_path / "a.gguf"))
    save_gguf(replace(model, checkpoint=None), tmp_path / "b.gguf")
    assert same_weights(load_model(tmp_path / "b.gguf"), model)


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = synthesize("tiny-llama", "Q8_0", path=tmp_path / "a.gguf")
    model = load_model(path)
    name = "layers.0.up_proj"
    n, k = model.weights[name].shape
    groups = Groups(4, np.zeros((n, k), np.uint8), np.ones((n, 1), np.float32), None)
    fmt, rows = pack_groups(groups)
    for weight, match in (
        (Weight(name, fmt, (n, k), {"data": rows}), "INT4.*cannot hold"),
        (replace(model.weights[name], activation=ActivationQuant()), "rounded activations"),
    ):
        with pytest.raises(CheckpointError, match=match):
            save_gguf(replace(model, weights={**model.weights, name: weight}), tmp_path / "b.gguf")
    windowed = load_model(path, LoadConfig(sliding_window=64))
    with pytest.raises(CheckpointError, match=r"cannot state this model's sliding_window, window_layers"):
        save_gguf(windowed, tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()


def test_what_loading_changed_is_stated(tmp_path: Path) -> None:
    path = synthesize("tiny-llama", "F32", path=tmp_path / "a.gguf")
    repeated = load_model(path, LoadConfig(num_kv_heads=4))
    save_gguf(repeated, tmp_path / "b.gguf")
    read = load_model(tmp_path / "b.gguf")
    assert read.config == repeated.config and read.config.num_kv_heads == 4
    assert same_weights(read, repeated)


def test_stop_tokens_of_a_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(synthesize("tiny-llama", "F32", path=tmp_path / "hf"))
    for given, expected in (((2,), (2,)), ((2, 0), (2, 0)), ((0,), (2, 0)), ((0, 2, 5), (2, 0))):
        changed = replace(model, config=replace(model.config, eos_token_ids=given))
        save_gguf(changed, tmp_path / "a.gguf")
        assert load_model(tmp_path / "a.gguf").config.eos_token_ids == expected
    assert "room for two stop tokens; left out: [5]" in caplog.text


def test_a_vocabulary_that_gguf_cannot_name_is_refused(tmp_path: Path) -> None:
    directory = synthesize("tiny-llama", "F32", path=tmp_path / "hf")
    file = directory / "tokenizer.json"
    text = file.read_text()
    assert '"individual_digits": true' in text
    # Cuts after every "o": no pre-tokenizer of llama.cpp does.
    split = '{"type": "Split", "pattern": {"String": "o"}, "behavior": "Isolated", "invert": false}'
    file.write_text(text.replace('"pretokenizers": [', f'"pretokenizers": [{split},'))
    with pytest.raises(TokenizerError, match="no GGUF vocabulary splits text"):
        gguf_vocabulary(directory, vocab_size=512)


def test_norms_of_other_formats_become_float32(tmp_path: Path) -> None:
    model = load_model(synthesize("tiny-llama", "BF16", path=tmp_path / "hf"))
    assert model.weights["norm"].format.name == "BF16"
    save_gguf(model, tmp_path / "a.gguf")
    file = read_gguf(tmp_path / "a.gguf")
    assert file.tensors["output_norm.weight"].format is FORMATS["F32"]
    assert file.tensors["blk.0.ffn_up.weight"].format is FORMATS["BF16"]
