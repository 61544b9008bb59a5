"""The layouts of GPTQ, AWQ, compressed-tensors and bitsandbytes: against files that those programs packed, and
against readings of each format that go bit by bit and share nothing with ours."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.checkpoint.awq import awq_tensors
from ridgeline.checkpoint.bitsandbytes import int8_tensors
from ridgeline.checkpoint.compressed_tensors import ct_tensors, group_for, targets_of
from ridgeline.checkpoint.gptq import gptq_tensors
from ridgeline.checkpoint.quant_config import METHODS, quant_scheme
from ridgeline.checkpoint.stored import Settings
from ridgeline.checkpoint.words import num_words, pack_words, unpack_words
from ridgeline.errors import CheckpointError
from ridgeline.quant.groups import Groups
from ridgeline.quant.weight import ActivationQuant
from tests.checkpoint.linears import grouped_order, parts_of, random_groups, weight_of

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.npz"))
SIZES = st.integers(1, 70)


def scheme_of(settings):
    return METHODS[settings["quant_method"]](Settings(settings, "config.json"))


def gptq_settings(bits, size, *, symmetric, version=1, **others):
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    } | others


def read(settings, arrays):
    stored = scheme_of(settings).read(parts_of(arrays))
    assert stored is not None
    weight = stored.weight("w")
    assert stored.format is weight.format and stored.shape == weight.shape
    return weight


@pytest.mark.parametrize("file", FIXTURES, ids=lambda file: file.stem)
def test_linears_packed_by_other_programs(file):
    """GPTQModel's, compressed-tensors' and their own dequantized values (scripts/compare_checkpoints.py)."""
    content = dict(np.load(file))
    settings, expected = json.loads(str(content.pop("settings"))), content.pop("expected")
    weight = read(settings, content)
    np.testing.assert_allclose(weight.dequantize(), expected, rtol=3e-7, atol=0)
    assert ("order" in weight.buffers) == ("order" in file.stem)
    assert weight.format.codes is not None
    assert weight.format.codes.symmetric == ("-sym" in file.stem)
    assert (weight.activation is not None) == file.stem.endswith("-int")


def test_there_are_fixtures_of_every_kind():
    kinds = {file.stem.partition("-")[0] for file in FIXTURES}
    assert kinds == {"awq4"} | {f"{kind}{bits}" for kind in ("gptq", "ct") for bits in (2, 3, 4, 8)}


@given(SIZES, st.integers(1, 4), st.sampled_from([2, 3, 4, 8]), st.integers(0, 2**32))
def test_words_are_one_stream_of_bits(count, rows, bits, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == np.int32 and words.shape == (rows, num_words(count, bits))
    for row, packed in zip(codes.tolist(), words.view(np.uint32).tolist(), strict=True):
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        assert packed == [stream >> (32 * i) & 0xFFFFFFFF for i in range(len(packed))]
    np.testing.assert_array_equal(unpack_words(words, bits, count), codes)


def field(words, index, bits):
    """Code `index` of a stream of words, one bit after the other."""
    value = 0
    for bit in range(bits):
        word, place = divmod(index * bits + bit, 32)
        value |= (int(words[word]) >> place & 1) << bit
    return value


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_by_the_formula(bits, ordered, symmetric, version):
    """w[n, k] = scales[g, n] * (q - z), g = g_idx[k]; z is one more than stored in version 1."""
    n, k, size = 32, 64, 32
    groups = random_groups(n, k, bits=bits, group_size=size, symmetric=symmetric, least_zero=1)
    order = grouped_order(k, size) if ordered else None
    weight = weight_of("w", groups, order=order)
    parts = gptq_tensors(groups, order, version=version)
    assert parts["qweight"].shape == (k * bits // 32, n) and parts["qzeros"].shape == (2, n * bits // 32)
    expected = np.empty((n, k), np.float32)
    for j in range(k):
        g = int(parts["g_idx"][j])
        for i in range(0, n, 5):
            z = field(parts["qzeros"][g], i, bits) + (version == 1)
            scale = parts["scales"][g, i].astype(np.float32)
            expected[i, j] = scale * np.float32(field(parts["qweight"][:, i], j, bits) - z)
    np.testing.assert_array_equal(weight.dequantize()[::5], expected[::5])
    settings = gptq_settings(bits, size, symmetric=symmetric, version=version, desc_act=ordered)
    again = read(settings, parts)
    assert again.format is weight.format
    for key, buffer in weight.buffers.items():
        np.testing.assert_array_equal(again.buffers[key], buffer)


@pytest.mark.parametrize("stated", [1, 2])
@pytest.mark.parametrize("held", [1, 2])
def test_symmetric_files_that_say_one_version_and_hold_the_other(stated, held):
    groups = random_groups(32, 64, bits=4, group_size=32)
    word = gptq_tensors(groups, None, version=held)["qzeros"].view(np.uint32)
    assert (word == (0x77777777 if held == 1 else 0x88888888)).all()
    settings = gptq_settings(4, 32, symmetric=True, version=stated)
    again = read(settings, gptq_tensors(groups, None, version=held))
    np.testing.assert_array_equal(again.dequantize(), groups.dequantize())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_0_as_version_1_writers_leave_them(bits):
    """They subtract from the whole word: a borrow goes into the next code, and comes back when reading."""
    groups = random_groups(32, 64, bits=bits, group_size=32, symmetric=False)
    assert groups.zeros is not None
    groups.zeros[:, 0] = 0
    parts = gptq_tensors(groups, None, version=2)
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    parts["qzeros"] = (parts["qzeros"].view(np.uint32) - ones).view(np.int32)
    again = read(gptq_settings(bits, 32, symmetric=False), parts)
    np.testing.assert_array_equal(again.dequantize(), groups.dequantize())


def test_a_shorter_last_group():
    """80 columns in groups of 32: 32, 32 and 16, which are five groups of 16."""
    n, k = 32, 80
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    scales = (rng.uniform(1, 2, (3, n)) / 64).astype(np.float16)
    parts = {
        "qweight": np.ascontiguousarray(pack_words(codes, 4).T),
        "qzeros": np.full((3, n // 8), 0x77777777, np.int32),
        "scales": scales,
    }
    weight = read(gptq_settings(4, 32, symmetric=True), parts)
    assert weight.format.name == "INT4_G16_SYM"
    expected = np.repeat(scales.T.astype(np.float32), [32, 32, 16], axis=1) * (codes.astype(np.float32) - 8)
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_gptq_for_some_modules_only():
    groups = random_groups(32, 64, bits=8, group_size=64)
    parts = gptq_tensors(groups, None, version=2)
    dynamic = {"-:^plain$": {}, r"+:^lay.*$": {"bits": 8, "group_size": 64}}
    settings = gptq_settings(4, 32, symmetric=True, version=2, dynamic=dynamic)
    np.testing.assert_array_equal(read(settings, parts).dequantize(), groups.dequantize())
    assert scheme_of(settings).read(parts_of({"weight": np.zeros((2, 2), np.float32)}, "plain")) is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_by_the_formula(symmetric):
    """Nibble i of a word is column 8 c + [0, 2, 4, 6, 1, 3, 5, 7][i]; zero points are stored as they are."""
    n, k, size = 16, 64, 32
    groups = random_groups(n, k, bits=4, group_size=size, symmetric=symmetric)
    parts = awq_tensors(groups)
    expected = np.empty((n, k), np.float32)
    for j in range(k):
        for c in range(n // 8):
            for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                q = int(parts["qweight"][j, c]) >> 4 * i & 15
                z = int(parts["qzeros"][j // size, c]) >> 4 * i & 15
                scale = parts["scales"][j // size, 8 * c + place].astype(np.float32)
                expected[8 * c + place, j] = scale * np.float32(q - z)
    np.testing.assert_array_equal(groups.dequantize(), expected)
    weight = read({"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True}, parts)
    np.testing.assert_array_equal(weight.data, weight_of("w", groups).data)


@pytest.mark.parametrize("activation", [None, ActivationQuant(), ActivationQuant(static_scale=0.25)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_by_the_formula(bits, size, symmetric, activation):
    """w[n, k] = scale[n, g] * (q - z), both signed; packed ones are stored with 2^(bits - 1) added."""
    n, k, middle = 24, 64, 1 << (bits - 1)
    groups = random_groups(n, k, bits=bits, group_size=size, symmetric=symmetric)
    group = group_for(groups, activation, is_embedding=False)
    parts = ct_tensors(groups, activation, group)
    scales = parts["weight_scale"].astype(np.float32)
    expected = np.empty((n, k), np.float32)
    for i in range(n):
        for j in range(k):
            g = j // (size or k)
            if group.packed:
                q = field(parts["weight_packed"][i], j, bits)
                z = middle if symmetric else field(parts["weight_zero_point"][:, g], i, bits)
            else:
                q = int(parts["weight"][i, j])
                z = 0 if symmetric else int(parts["weight_zero_point"][i, g])
            expected[i, j] = scales[i, g] * np.float32(q - z)
    np.testing.assert_array_equal(groups.dequantize(), expected)
    weights = {"num_bits": bits, "symmetric": symmetric, "strategy": "group" if size else "channel"}
    weights |= {"group_size": size}
    inputs = None
    if activation is not None:
        kind = {"strategy": "token", "dynamic": True}
        kind = kind if activation.static_scale is None else {"strategy": "tensor", "dynamic": False}
        inputs = {"num_bits": 8, "symmetric": True} | kind
    entry = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if group.packed else "int-quantized",
        "config_groups": {"group_0": entry},
    }
    weight = read(settings, parts)
    np.testing.assert_array_equal(weight.data, weight_of("w", groups).data)
    assert weight.activation == activation


def test_compressed_tensors_columns_in_act_order():
    groups = random_groups(24, 64, bits=4, group_size=32)
    order = grouped_order(64, 32)
    back = np.argsort(order)
    g_idx = (np.arange(64, dtype=np.int32) // 32)[back]
    natural = Groups(4, groups.q[:, back], groups.scales, None)
    parts = ct_tensors(natural, None, group_for(natural, None, is_embedding=False))
    entry = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": entry},
    }
    weight = read(settings, parts | {"weight_g_idx": g_idx})
    expected = weight_of("w", groups, order=order)
    np.testing.assert_array_equal(weight.dequantize(), expected.dequantize())
    np.testing.assert_array_equal(weight.buffers["order"], order)
    unused = read(settings, parts | {"weight_g_idx": np.full(64, -1, np.int32)})
    np.testing.assert_array_equal(unused.dequantize(), natural.dequantize())


def test_compressed_tensors_with_ten_codes_of_3_bits_in_a_word():
    """The layout of older versions: bits 30 and 31 of each word are unused."""
    groups = random_groups(24, 64, bits=3, group_size=32, symmetric=False)
    assert groups.zeros is not None

    def pack(codes):
        rows = [[row[i : i + 10] for i in range(0, len(row), 10)] for row in codes.tolist()]
        return np.array(
            [[sum(q << 3 * i for i, q in enumerate(word)) for word in row] for row in rows], np.int32
        )

    parts = {
        "weight_packed": pack(groups.q),
        "weight_zero_point": np.ascontiguousarray(pack(groups.zeros.T).T),
        "weight_scale": groups.scales,
        "weight_shape": np.array([24, 64], np.int64),
    }
    assert parts["weight_packed"].shape == (24, 7) and parts["weight_zero_point"].shape == (3, 2)
    weights = {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": {"targets": ["Linear"], "weights": weights}},
    }
    np.testing.assert_array_equal(read(settings, parts).dequantize(), groups.dequantize())


def test_compressed_tensors_one_scale_for_the_tensor_in_bfloat16():
    q = np.arange(-4, 4, dtype=np.int8).reshape(2, 4)
    entry = {"targets": ["re:lay.*"], "weights": {"num_bits": 8, "strategy": "tensor"}}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "naive-quantized",
        "config_groups": {"a": entry},
    }
    scale = np.array([0x3F40], np.uint16)  # 0.75
    weight = read(settings, {"weight": q, "weight_scale": scale})
    np.testing.assert_array_equal(weight.dequantize(), q * np.float32(0.75))


def test_compressed_tensors_targets():
    """A name before an expression before a class; `ignore` before all."""

    def entry(bits, *targets):
        return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "channel"}}

    settings = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "ignore": ["lm_head", r"re:.*\.7\..*"],
        "config_groups": {
            "a": entry(4, "Linear"),
            "b": entry(8, r"re:.*down_proj$"),
            "c": entry(2, "model.layers.3.mlp.down_proj"),
            "d": entry(3, "Embedding"),
        },
    }
    scheme = scheme_of(settings)
    for module, bits in {
        "model.layers.3.mlp.up_proj": 4,
        "model.layers.2.mlp.down_proj": 8,
        "model.layers.3.mlp.down_proj": 2,
        "model.embed_tokens": 3,
        "model.layers.7.mlp.down_proj": None,
        "lm_head": None,
    }.items():
        group = scheme._group_of(module)
        assert (group and group.bits) == bits, module


def test_expressions_match_the_modules_and_no_others():
    import re

    names = [f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1, 11) for p in ("up", "down")] + ["lm_head"]
    found = targets_of([n for n in names if n != "model.layers.1.mlp.up_proj"])
    assert len(found) == 3

    def matches(name):
        return any(
            re.match(t.removeprefix("re:"), name) is not None if t.startswith("re:") else t == name
            for t in found
        )

    assert [n for n in names if not matches(n)] == ["model.layers.1.mlp.up_proj"]
    assert not matches("model.layers.111.mlp.up_proj") and not matches("model.layers.0.mlp.up_proj.x")


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_bitsandbytes_by_the_formula(threshold):
    groups = random_groups(16, 48, bits=8)
    parts = int8_tensors(groups)
    expected = parts["weight"].astype(np.float64) * parts["SCB"].astype(np.float64)[:, None] / 127
    np.testing.assert_allclose(groups.dequantize(), expected, rtol=1e-6)
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": threshold}
    weight = read(settings, parts)
    np.testing.assert_array_equal(weight.data, weight_of("w", groups).data)
    assert weight.activation == ActivationQuant(outlier_threshold=threshold or None)


def test_where_settings_are_found(tmp_path):
    gptq = {"bits": 4, "group_size": 32, "sym": True}
    inside = quant_scheme(tmp_path, {"quantization_config": gptq | {"quant_method": "gptq"}})
    deeper = {"text_config": {"quantization_config": gptq | {"quant_method": "gptq"}}}
    (tmp_path / "quantize_config.json").write_text(json.dumps(gptq))
    assert inside == quant_scheme(tmp_path, {}) == quant_scheme(tmp_path, deeper)
    (tmp_path / "quantize_config.json").unlink()
    (tmp_path / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 128, "zero_point": true}')
    assert quant_scheme(tmp_path, {}) == scheme_of({"quant_method": "awq", "bits": 4, "group_size": 128})
    (tmp_path / "quant_config.json").unlink()
    assert quant_scheme(tmp_path, {}) is None


CT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        }
    },
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def changed(base, path, value):
    document = json.loads(json.dumps(base))
    *keys, last = path.split("/")
    inner = document
    for key in keys:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return document


@pytest.mark.parametrize(
    ("base", "path", "value", "expected"),
    [
        (
            AWQ,
            "quant_method",
            "squeeze",
            "expected one of 'gptq', 'awq', 'compressed-tensors', 'bitsandbytes'",
        ),
        (AWQ, "quant_method", None, "quant_method is None; expected"),
        (AWQ, "group_size", 0, "group_size is 0; expected a whole number of at least 1"),
        (AWQ, "group_size", -2, "group_size is -2"),
        (AWQ, "bits", 3, "bits is 3; expected one of 4"),
        (AWQ, "version", "gemv", "version is 'gemv'; expected one of 'gemm'"),
        (gptq_settings(4, 0, symmetric=True), "x", 0, "group_size is 0"),
        (gptq_settings(4, True, symmetric=True), "x", 0, "group_size is True"),
        (gptq_settings(5, 32, symmetric=True), "x", 0, "bits is 5; expected one of 2, 3, 4, 8"),
        (gptq_settings("4", 32, symmetric=True), "x", 0, "bits is '4'"),
        (gptq_settings(4, 32, symmetric="yes"), "x", 0, "sym is 'yes'; expected true or false"),
        (
            gptq_settings(4, 32, symmetric=True),
            "checkpoint_format",
            "marlin",
            "expected one of 'gptq', 'gptq_v2'",
        ),
        (gptq_settings(4, 32, symmetric=True), "is_marlin_format", True, "is_marlin_format is True"),
        (gptq_settings(4, 32, symmetric=True), "dynamic", {"+:(": {}}, "no regular expression"),
        (gptq_settings(4, 32, symmetric=True), "dynamic", ["a"], "dynamic is ['a']; expected an object"),
        (INT8, "load_in_8bit", False, "load_in_8bit is False"),
        (INT8, "llm_int8_threshold", "6", "llm_int8_threshold is '6'"),
        (CT, "format", "float-quantized", "format is 'float-quantized'; expected one of 'pack-quantized'"),
        (CT, "config_groups", {}, "config_groups is {}"),
        (CT, "config_groups/group_0/weights/num_bits", 5, "num_bits is 5"),
        (CT, "config_groups/group_0/weights/group_size", 0, "group_size is 0"),
        (CT, "config_groups/group_0/weights/group_size", -1, "group_size is -1"),
        (CT, "config_groups/group_0/weights/type", "float", "type is 'float'; expected one of 'int'"),
        (CT, "config_groups/group_0/weights/strategy", "block", "strategy is 'block'"),
        (CT, "config_groups/group_0/weights", None, "weights is None"),
        (CT, "config_groups/group_0/targets", "Linear", "targets is 'Linear'; expected a list of strings"),
        (CT, "config_groups/group_0/targets", ["re:("], "no regular expression"),
        (CT, "config_groups/group_0/input_activations", {"num_bits": 4}, "num_bits is 4"),
        (
            CT,
            "config_groups/group_0/input_activations",
            {"num_bits": 8, "symmetric": False},
            "inputs with a zero point",
        ),
        (
            CT,
            "config_groups/group_0/input_activations",
            {"num_bits": 8, "dynamic": True, "strategy": "tensor"},
            "strategy is 'tensor'; expected one of 'token'",
        ),
        (CT, "config_groups/group_0/output_activations", {"num_bits": 8}, "output_activations is"),
        (CT, "transform_config", {"config_groups": {}}, "rotations at run time"),
        (CT, "sparsity_config", {"format": "sparse-24"}, "sparse weights"),
        (CT, "quantization_status", "frozen", "quantization_status is 'frozen'"),
    ],
)
def test_settings_that_are_refused(tmp_path, base, path, value, expected):
    with pytest.raises(CheckpointError) as caught:
        quant_scheme(tmp_path, {"quantization_config": changed(base, path, value)})
    assert expected in str(caught.value) and "config.json: quantization_config" in str(caught.value)


def test_a_kv_cache_scheme_is_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="ridgeline"):
        quant_scheme(tmp_path, {"quantization_config": CT | {"kv_cache_scheme": {"num_bits": 8}}})
    assert len(caplog.records) == 1 and "kv_cache_scheme is not used" in caplog.text
