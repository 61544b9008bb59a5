"""Damaged and inconsistent checkpoints: every tensor of every kind, changed in every way that matters."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.checkpoint.safetensors import DTYPES, read_hf, write_safetensors
from ridgeline.errors import CheckpointError, RidgelineError
from ridgeline.models.load import describe_model, load_model
from ridgeline.models.save import save_model
from ridgeline.models.synth import synthesize
from ridgeline.quant.weight import ActivationQuant
from tests.checkpoint.linears import quantized_model

MODULE = "model.layers.0.mlp.down_proj"
KINDS = {
    "gptq": ("gptq", {"symmetric": False}),
    "gptq symmetric": ("gptq", {}),
    "gptq act-order": ("gptq", {"with_order": True}),
    "awq": ("awq", {"symmetric": False}),
    "packed": ("compressed-tensors", {"symmetric": False, "bits": 3}),
    "int8": (
        "compressed-tensors",
        {"symmetric": False, "bits": 8, "activation": ActivationQuant(static_scale=0.5)},
    ),
    "bitsandbytes": (
        "bitsandbytes",
        {"bits": 8, "group_size": None, "activation": ActivationQuant(outlier_threshold=6.0)},
    ),
}
NEEDED = {
    "gptq": ("qweight", "qzeros", "scales"),
    "gptq symmetric": ("qweight", "qzeros", "scales"),
    "gptq act-order": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
    "packed": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    "int8": ("weight", "weight_scale", "weight_zero_point", "input_scale"),
    "bitsandbytes": ("weight", "SCB"),
}
OPTIONAL = {"gptq": ("g_idx",), "gptq act-order": ("g_idx",), "bitsandbytes": ("weight_format",)}
EACH = [(kind, suffix) for kind, suffixes in NEEDED.items() for suffix in suffixes]
EVERY = EACH + [(kind, suffix) for kind, suffixes in OPTIONAL.items() for suffix in suffixes]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    plain = load_model(synthesize("tiny-llama", "F16", path=folder / "source"))
    return {
        name: save_model(quantized_model(plain, **grid), folder / name, kind=kind)
        for name, (kind, grid) in KINDS.items()
    }


def rewrite(source, target, change):
    """The directory again with `change(name, array)` for each tensor; None leaves it out."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text((source / "config.json").read_text())
    checkpoint = read_hf(source)
    kinds = {"f": "F", "i": "I", "u": "U"}
    arrays = {name: change(name, np.array(checkpoint.array(name))) for name in checkpoint.tensors}
    arrays = {name: a for name, a in arrays.items() if a is not None}
    declared = [
        (name, DTYPES[f"{kinds[a.dtype.kind]}{8 * a.dtype.itemsize}"], a.shape) for name, a in arrays.items()
    ]
    write_safetensors(target / "model.safetensors", declared, [a.tobytes() for a in arrays.values()])
    return target


def refused(source, tmp_path, suffix, change):
    """The message, which names the directory and the tensor; describing the model says the same."""

    def changed(name, array):
        return change(array) if name == f"{MODULE}.{suffix}" else array

    target = rewrite(source, tmp_path / "damaged", changed)
    with pytest.raises(CheckpointError) as caught:
        load_model(target)
    with pytest.raises(CheckpointError) as described:
        describe_model(target)
    message = str(caught.value)
    assert str(target) in message and MODULE in message
    assert str(described.value) == message
    return message


def test_the_undamaged_ones_load(directories, tmp_path):
    for name, source in directories.items():
        again = load_model(rewrite(source, tmp_path / name, lambda _, array: array))
        assert again.weights["layers.0.down_proj"].format.codes is not None


@pytest.mark.parametrize(("kind", "suffix"), EACH)
def test_a_missing_part(directories, tmp_path, kind, suffix):
    message = refused(directories[kind], tmp_path, suffix, lambda array: None)
    assert "is missing" in message or "expected a tensor" in message


@pytest.mark.parametrize(("kind", "suffix"), EVERY)
def test_a_wrong_dtype(directories, tmp_path, kind, suffix):
    message = refused(directories[kind], tmp_path, suffix, lambda array: array.astype(np.float64))
    assert "is of dtype F64; expected" in message


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("kind", "suffix"), EVERY)
def test_a_wrong_shape(directories, tmp_path, kind, suffix, axis):
    def longer(array):
        if axis >= array.ndim:
            return array[None]
        return np.concatenate([array, np.take(array, [0], axis)], axis)

    message = refused(directories[kind], tmp_path, suffix, longer)
    assert "has shape" in message or "holds" in message


@pytest.mark.parametrize(("kind", "suffix"), EVERY)
def test_no_elements(directories, tmp_path, kind, suffix):
    assert "shape" in refused(directories[kind], tmp_path, suffix, lambda array: array.reshape(-1)[:0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("kind", "suffix"), [e for e in EACH if e[1] in ("scales", "weight_scale", "SCB", "input_scale")]
)
def test_scales_that_are_no_numbers(directories, tmp_path, kind, suffix, value):
    def spoil(array):
        array.reshape(-1)[-1] = value
        return array

    assert "not finite" in refused(directories[kind], tmp_path, suffix, spoil)


@pytest.mark.parametrize(
    ("kind", "suffix", "value", "expected"),
    [
        ("gptq", "g_idx", -1, "names groups -1 to 2; there are 0 to 2"),
        ("gptq act-order", "g_idx", 3, "names groups 0 to 3; there are 0 to 2"),
        ("gptq symmetric", "qzeros", 0x77777778, "symmetric 4-bit codes have 7 (version 1) or 8"),
        ("packed", "weight_shape", 2**40, "weight_shape' says"),
        ("packed", "weight_shape", -64, "weight_shape' says"),
        ("int8", "input_scale", -1.0, "expected a number above 0"),
        ("bitsandbytes", "weight_format", 2, "is 2; expected 0"),
    ],
)
def test_values_that_cannot_be(directories, tmp_path, kind, suffix, value, expected):
    def spoil(array):
        array.reshape(-1)[0] = value
        return array

    assert expected in refused(directories[kind], tmp_path, suffix, spoil)


def test_a_group_without_columns(directories, tmp_path):
    message = refused(directories["gptq act-order"], tmp_path, "g_idx", np.zeros_like)
    assert "leaves group 1 without columns" in message


def test_uneven_groups(directories, tmp_path):
    def uneven(array):
        array[:] = [0] * 31 + [1] * 33 + [2] * 32
        return array

    assert "makes groups of [31, 32, 33] columns" in refused(directories["gptq"], tmp_path, "g_idx", uneven)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gptq", {"bits": 8}),
        ("gptq", {"bits": 2}),
        ("gptq", {"group_size": 16}),
        ("gptq", {"group_size": -1}),
        ("awq", {"group_size": 64}),
        ("packed", {"config_groups/group_0/weights/num_bits": 4}),
        ("packed", {"config_groups/group_0/weights/group_size": 16}),
        ("packed", {"config_groups/group_0/weights/strategy": "channel"}),
        ("int8", {"config_groups/group_0/weights/strategy": "tensor"}),
    ],
)
def test_a_config_that_does_not_fit_the_tensors(directories, tmp_path, kind, change):
    target = rewrite(directories[kind], tmp_path / "changed", lambda _, array: array)
    config = json.loads((target / "config.json").read_text())
    for path, value in change.items():
        inner = config["quantization_config"]
        *keys, last = path.split("/")
        for key in keys:
            inner = inner[key]
        inner[last] = value
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has shape .* the config and its other parts say"):
        load_model(target)


def test_codes_that_need_more_bits_than_stated(directories, tmp_path):
    target = rewrite(directories["int8"], tmp_path / "changed", lambda _, array: array)
    text = (target / "config.json").read_text()
    config = json.loads(text)
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 4
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds numbers outside of 4 bits"):
        load_model(target)


def test_integers_without_a_quantization_config(directories, tmp_path):
    target = rewrite(directories["bitsandbytes"], tmp_path / "changed", lambda _, array: array)
    config = json.loads((target / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is of dtype I8; expected floats, or a quantization_config"):
        load_model(target)


def test_describing_needs_more_than_the_config(directories, tmp_path):
    (tmp_path / "config.json").write_text((directories["gptq"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="expected the .* files of a quantized model"):
        describe_model(tmp_path)


def test_a_plain_weight_where_the_config_says_quantized(directories, tmp_path):
    def plain(name, array):
        return array.astype(np.float16) if name == f"{MODULE}.weight" else array

    target = rewrite(directories["int8"], tmp_path / "changed", plain)
    with pytest.raises(CheckpointError, match=rf"'{MODULE}.weight' is of dtype F16; expected I8"):
        load_model(target)


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_end_in_an_error_or_in_a_model(directories, tmp_path_factory, kind):
    """Nothing but RidgelineError and no warning of numpy, whatever the parts of a linear hold."""
    target = tmp_path_factory.mktemp("fuzz") / kind

    @given(st.sampled_from(NEEDED[kind] + OPTIONAL.get(kind, ())), st.integers(0, 2**32))
    @settings(max_examples=25)
    def check(suffix, seed):
        def noise(name, array):
            if name != f"{MODULE}.{suffix}":
                return array
            rng = np.random.default_rng(seed)
            return np.frombuffer(rng.bytes(array.nbytes), array.dtype).reshape(array.shape)

        try:
            weight = load_model(rewrite(directories[kind], target, noise)).weights["layers.0.down_proj"]
        except RidgelineError:
            return
        assert np.isfinite(weight.dequantize()).all()

    check()
