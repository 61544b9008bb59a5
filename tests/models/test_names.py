"""Names of every weight, both ways, and against what transformers and the gguf package call them."""

from __future__ import annotations

import gguf
import pytest
import torch
import transformers

from ridgeline.models.registry import SPECS, expected_shapes
from ridgeline.models.synth import preset_config

CONFIGS = {
    "llama": preset_config("tiny-llama", num_layers=12, qkv_bias=True, o_bias=True),
    "gemma3": preset_config("tiny-gemma3", num_layers=12, tie_embeddings=False),
}


@pytest.mark.parametrize("arch", CONFIGS)
def test_round_trip(arch):
    names = SPECS[arch].names
    canonical = list(expected_shapes(CONFIGS[arch]))
    for to_file, from_file in ((names.to_hf, names.from_hf), (names.to_gguf, names.from_gguf)):
        stored = [to_file(name) for name in canonical]
        assert len(set(stored)) == len(canonical)
        assert [from_file(name) for name in stored] == canonical


@pytest.mark.parametrize("arch", CONFIGS)
def test_transformers_has_exactly_these_with_these_shapes(arch):
    config = CONFIGS[arch]
    stated = SPECS[arch].config_to_hf(config)
    with torch.device("meta"):
        if arch == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**stated))
        else:
            model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**stated))
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert {SPECS[arch].names.to_hf(n): shape for n, shape in expected_shapes(config).items()} == theirs


@pytest.mark.parametrize("arch", CONFIGS)
def test_the_gguf_package_maps_them_alike(arch):
    kind = gguf.MODEL_ARCH.LLAMA if arch == "llama" else gguf.MODEL_ARCH.GEMMA3
    theirs = gguf.get_tensor_name_map(kind, 12)
    names = SPECS[arch].names
    for canonical in expected_shapes(CONFIGS[arch]):
        hf = names.to_hf(canonical)
        assert theirs.get_name(hf, try_suffixes=(".weight", ".bias")) == names.to_gguf(canonical)


@pytest.mark.parametrize(
    "name", ["", "weight", "model.layers.x.mlp.up_proj.weight", "model.norm.scale", "lm_head"]
)
def test_unknown_names(name):
    for spec in SPECS.values():
        assert spec.names.from_hf(name) is None and spec.names.from_gguf(name) is None
