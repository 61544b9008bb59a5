"""Hugging Face directories: what is read and written, and that every damage is one clear error."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.checkpoint.safetensors import INDEX, read_hf, read_safetensors, write_safetensors
from ridgeline.errors import CheckpointError, ModelNotFoundError
from ridgeline.quant.formats import FORMATS

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": RNG.standard_normal((3, 4)).astype(np.float32),
    "half": RNG.standard_normal((2, 3)).astype(np.float16),
    "double": RNG.standard_normal((2,)),
    "brain": np.arange(6, dtype=np.uint16).reshape(3, 2),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}
KINDS = {"a": "F32", "half": "F16", "double": "F64", "brain": "BF16", "scalar": "F32", "empty": "F32"}


def write(path, names=tuple(ARRAYS)):
    declared = [(name, FORMATS[KINDS[name]], ARRAYS[name].shape) for name in names]
    write_safetensors(path, declared, [ARRAYS[name].tobytes() for name in names])
    return path


def raw(header, data=b"", length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8), **others):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | others


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 1}')
    write(tmp_path / "model.safetensors")
    return tmp_path


def test_what_is_written_is_read(directory):
    checkpoint = read_hf(directory)
    assert checkpoint.kind == "hf" and set(checkpoint.tensors) == set(ARRAYS)
    for name, array in ARRAYS.items():
        weight = checkpoint.weight(name)
        assert weight.format.name == KINDS[name] and weight.shape == array.shape
        assert weight.data.dtype == array.dtype and not weight.data.flags.writeable
        np.testing.assert_array_equal(weight.data, array)


def test_the_library_agrees_both_ways(directory):
    library = pytest.importorskip("safetensors.numpy")
    plain = [name for name in ARRAYS if name != "brain"]
    theirs = library.load_file(write(directory / "model.safetensors", plain))
    for name in plain:
        np.testing.assert_array_equal(theirs[name], ARRAYS[name])
    library.save_file(
        {name: ARRAYS[name] for name in plain}, directory / "model.safetensors", metadata={"x": "y"}
    )
    checkpoint = read_hf(directory)
    for name in plain:
        np.testing.assert_array_equal(checkpoint.weight(name).data, ARRAYS[name])


def test_generation_config_knows_more_ends(directory):
    assert read_hf(directory).metadata["eos_token_id"] == 1
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    assert read_hf(directory).metadata["eos_token_id"] == [1, 106]


def test_shards(directory):
    (directory / "model.safetensors").unlink()
    write(directory / "one.safetensors", ["a", "half"])
    write(directory / "two.safetensors", ["brain"])
    where = {"a": "one.safetensors", "half": "one.safetensors", "brain": "two.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": where}))
    write(directory / "adapter.safetensors", ["a"])  # not in the index: not part of the model
    checkpoint = read_hf(directory)
    assert {name: entry.file.name for name, entry in checkpoint.tensors.items()} == where
    np.testing.assert_array_equal(checkpoint.weight("brain").data, ARRAYS["brain"])

    write(directory / "two.safetensors", ["brain", "a"])
    with pytest.raises(
        CheckpointError, match=r"two.safetensors: .* found 'a', which is in one.safetensors too"
    ):
        read_hf(directory)
    for missing in ("three.safetensors", "../model.safetensors", "", "\0", "x" * 5000):
        (directory / INDEX).write_text(json.dumps({"weight_map": where | {"a": missing}}))
        with pytest.raises(CheckpointError, match="fetch the model again"):
            read_hf(directory)


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("config.json", "{", "config.json: expected a JSON object"),
        ("config.json", "[]", "config.json: expected a JSON object, found none: it is of type list"),
        ("config.json", '{"a": 1, "a": 2}', "a key appears twice"),
        ("config.json", "[" * 100_000, "config.json: expected a JSON object"),
        ("generation_config.json", "\udcff", "generation_config.json: expected a JSON object"),
        (INDEX, '{"weight_map": [1]}', "expected weight_map"),
        (INDEX, '{"weight_map": {"a": 1}}', "expected weight_map"),
        (INDEX, '{"weight_map": {}}', "expected a \\*.safetensors file"),
    ],
)
def test_damaged_json(directory, file, text, expected):
    (directory / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=expected):
        read_hf(directory)


def test_no_model_here(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no config.json"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found none"):
        read_hf(tmp_path)


def test_a_missing_tensor_names_the_nearest(directory):
    with pytest.raises(CheckpointError, match=r"expected a tensor 'haf'.*nearest: half"):
        read_hf(directory).weight("haf")


EIGHT = b"\0" * 8
DAMAGED = {
    "empty": (b"", "header length: expected 8 bytes, found 0"),
    "short": (b"\1\0\0", "header length"),
    "header longer than the file": (raw({}, length=1 << 40), "expected at most 2, found 1099511627776"),
    "not JSON": (raw(b"}{"), "expected a JSON object"),
    "not UTF-8": (raw(b"\xff\xfe"), "expected a JSON object"),
    "a list": (raw([]), "expected a JSON object"),
    "deep": (raw(b"[" * 200_000), "expected a JSON object"),
    "endless number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "expected a JSON object"),
    "name twice": (raw(b'{"a": 1, "a": 1}'), "a key appears twice"),
    "no object": (raw({"a": 3}), "tensor 'a'"),
    "unknown dtype": (raw({"a": tensor("F8_E4M3")}, EIGHT), "a dtype of F64, F32, F16, BF16, I64, I32"),
    "dtype of no kind": (raw({"a": tensor(["F32"])}, EIGHT), "a dtype of"),
    "negative size": (raw({"a": tensor(shape=(-2,))}, EIGHT), "shape and two data_offsets"),
    "fraction": (raw({"a": tensor(shape=(2.0,))}, EIGHT), "shape and two data_offsets"),
    "true": (raw({"a": tensor(shape=(2, True))}, EIGHT), "shape and two data_offsets"),
    "one offset": (raw({"a": tensor(offsets=(0,))}, EIGHT), "shape and two data_offsets"),
    "offsets turned": (raw({"a": tensor(offsets=(8, 0))}, EIGHT), "its data inside the 8 bytes"),
    "past the end": (raw({"a": tensor(shape=(4,), offsets=(0, 16))}, EIGHT), "its data inside the 8 bytes"),
    "wrong bytes": (raw({"a": tensor(shape=(3,))}, EIGHT), "12 bytes for F32 of shape \\[3\\], found 8"),
    "absurd shape": (raw({"a": tensor(shape=[2**62] * 9)}, EIGHT), "bytes for F32"),
    "overlap": (
        raw({"a": tensor(), "b": tensor(shape=(1,), offsets=(4, 8))}, EIGHT),
        "tensor 'b': expected its data at byte",
    ),
    "hole": (raw({"a": tensor(shape=(1,), offsets=(4, 8))}, EIGHT), "tensor 'a': expected its data at byte"),
    "rest": (raw({"a": tensor()}, EIGHT + b"\0"), "data: expected 8 bytes, found 9"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(tmp_path, name):
    content, expected = DAMAGED[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 700


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fuzz") / "model.safetensors")


@settings(max_examples=500)
@given(st.data())
def test_mutated_files_end_in_an_error_or_in_the_same_kind_of_result(valid, data):
    """Flip, cut and insert bytes, mostly in the header: an error, or tensors that lie inside the file."""
    content = bytearray(valid.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(header_end, len(content))))
        change = data.draw(st.sampled_from(["flip", "digit", "cut", "insert"]))
        if change == "flip" and at < len(content):
            content[at] = data.draw(st.integers(0, 255))
        elif change == "digit" and at < len(content):
            content[at] = data.draw(st.sampled_from(b'0123456789,[]{}"eF-'))
        elif change == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        else:
            content[at:at] = data.draw(st.binary(max_size=9))
    path = valid.with_name("mutated.safetensors")
    path.write_bytes(content)
    try:
        entries, _ = read_safetensors(path)
    except CheckpointError:
        return
    for entry in entries.values():
        assert entry.format.num_bytes(entry.shape) == entry.num_bytes
        assert 0 <= entry.offset <= entry.offset + entry.num_bytes <= len(content)


def test_every_truncation_is_an_error(valid):
    content = valid.read_bytes()
    path = valid.with_name("truncated.safetensors")
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            read_safetensors(path)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    declared = [("a", FORMATS["F32"], (2,))]
    for chunks in ([b"\0" * 4], [b"\0" * 9]):
        with pytest.raises(CheckpointError, match="8 bytes were declared"):
            write_safetensors(path, declared, chunks)
    with pytest.raises(CheckpointError, match="expected F64, F32, F16, BF16, I64, .*, got Q4_0"):
        write_safetensors(path, [("a", FORMATS["Q4_0"], (32,))], [])
    assert list(tmp_path.iterdir()) == []
    write_safetensors(path, declared, [b"\0" * 3, b"\0" * 5])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    shutil.rmtree(tmp_path)
