"""Logits against transformers: seeded tiny models of every kind, and the real weights from the packages.

Errors are measured in units of float32 rounding at the size of the largest logit:
max |ours - theirs| / (eps(float32) * max |theirs|).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ridgeline.config import EngineConfig, RopeConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ModelNotFoundError
from ridgeline.models.load import load_model
from ridgeline.models.locate import locate_model
from ridgeline.models.rope import rope_frequencies, rope_from_hf
from ridgeline.ops.batch import ForwardBatch
from tests.ops.test_attention import Row

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def tiny_llama(**changes):
    settings = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | changes)))


def tiny_gemma3(**changes):
    settings = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 20,
        "query_pre_attn_scalar": 24,
        "vocab_size": 131,
        "sliding_window": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**(settings | changes)))


MODELS = {f"llama {name}": lambda rope=rope: tiny_llama(rope_parameters=rope) for name, rope in ROPES.items()}
MODELS |= {
    "llama tied, bias, head_dim": lambda: tiny_llama(
        tie_word_embeddings=True, attention_bias=True, head_dim=20
    ),
    "llama MHA": lambda: tiny_llama(num_key_value_heads=6),
    "gemma3": tiny_gemma3,
    "gemma3 linear": lambda: tiny_gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    ),
}


def their_logits(model, token_ids) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].double().numpy()


def our_logits(path, token_ids, cuts, **options) -> np.ndarray:
    """Logits of every token, computed through the cache in the given pieces, over shuffled blocks."""
    options = {"max_model_len": 256, "max_num_seqs": 1} | options
    if options.get("executor") == "native":  # float32 throughout: no rounding of activations or pages
        options = {"dtype": "float32", "kv_cache_dtype": "float32"} | options
    config = EngineConfig.from_options("m", **options)
    engine = LLMEngine(config, load_model(path, config.load), None)
    blocks = tuple(int(i) for i in np.random.default_rng(0).permutation(-(-len(token_ids) // 32)))
    logits = []
    for start, end in zip((0, *cuts), (*cuts, len(token_ids)), strict=True):
        row = Row(tuple(token_ids[start:end]), start, blocks, num_logits=end - start)
        logits.append(
            np.array(engine.executor.forward(ForwardBatch.from_rows([row], block_size=32)), np.float64)
        )
    engine.close()
    return np.concatenate(logits)


def error_in_ulps(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / (np.finfo(np.float32).eps * np.abs(theirs).max()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Model and directory by name, made once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            model = MODELS[name]().eval()
            for parameter in model.parameters():  # norms and biases start at 0 or 1: make them count
                if parameter.dim() == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
            directory = tmp_path_factory.mktemp("hf")
            model.save_pretrained(directory)
            made[name] = model, directory
        return made[name]

    return get


@pytest.mark.parametrize("executor", ["eager", "native"])
@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_prefill_and_decode_through_the_cache(saved, name, executor):
    model, directory = saved(name)
    token_ids = [int(i) for i in np.random.default_rng(1).integers(0, 131, 100)]
    theirs = their_logits(model, token_ids)
    for cuts in ((), (33, 34, 35, 70, *range(90, 100))):
        assert error_in_ulps(our_logits(directory, token_ids, cuts, executor=executor), theirs) < 60


@pytest.mark.parametrize("name", ["llama dynamic", "gemma3"])
def test_float64_leaves_no_doubt(saved, name):
    """The float32 difference is rounding: in float64 it is a million times smaller."""
    model, directory = saved(name)
    token_ids = [int(i) for i in np.random.default_rng(2).integers(0, 131, 80)]
    theirs = their_logits(model.double(), token_ids)
    model.float()
    ours = our_logits(directory, token_ids, (40,), executor="eager", dtype="float64")
    # transformers computes RoPE angles, norms of Gemma and softmax in float32 even then.
    assert error_in_ulps(ours, theirs) < 60


@pytest.mark.parametrize("name", ROPES)
def test_rope_as_a_load_option_equals_the_file_that_says_so(saved, name):
    token_ids = [int(i) for i in np.random.default_rng(3).integers(0, 131, 90)]
    model, plain = saved("llama default")
    options = {"executor": "eager", "dtype": "float64", "max_model_len": 1024}
    found = our_logits(plain, token_ids, (), rope_scaling=ROPES[name], **options)
    rope = rope_from_hf(ROPES[name], load_model(plain).config.rope)
    in_file = json.loads((plain / "config.json").read_text()) | {"rope_parameters": ROPES[name]}
    with tempfile.TemporaryDirectory() as other:
        shutil.copytree(plain, other, dirs_exist_ok=True)
        (Path(other) / "config.json").write_text(json.dumps(in_file))
        assert load_model(other).config.rope == rope
        np.testing.assert_array_equal(found, our_logits(other, token_ids, (), **options))
    if name != "default":
        assert np.abs(found - our_logits(plain, token_ids, (), **options)).max() > 1e-3


@pytest.mark.parametrize("length", [100, 256, 700])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name, length):
    """To float32 rounding; dynamic NTK at every length, since ours is fixed from max_model_len."""
    config = transformers.LlamaConfig(
        hidden_size=96, num_attention_heads=4, max_position_embeddings=256, rope_parameters=ROPES[name]
    )
    if name == "default":
        theirs, factor = 1.0 / 10000.0 ** (torch.arange(0, 24, 2) / 24), 1.0
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]](config, "cpu", seq_len=length)
    rope = rope_from_hf(ROPES[name], RopeConfig(theta=10000.0, rotary_dim=24))
    ours, our_factor = rope_frequencies(rope, max_position=256, max_model_len=length)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert our_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("alias", ["smollm2", "gemma3-270m"])
def test_real_weights(alias):
    """Against transformers in float64, both executors err at most three times as much as transformers in float32."""
    try:
        path = locate_model(alias)
    except ModelNotFoundError:
        pytest.skip(f"{alias} is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    token_ids = [int(i) for i in np.random.default_rng(0).integers(0, 40000, 560)]
    rows = slice(None, None, 7)  # every seventh logit row: Gemma's 262144 columns are large in float64
    theirs = their_logits(model, token_ids)[rows]
    truth = their_logits(model.double(), token_ids)[rows]
    del model
    their_error = error_in_ulps(theirs, truth)
    for executor in ("eager", "native"):
        ours = our_logits(path, token_ids, (512, 513, 530), executor=executor, max_model_len=640)[rows]
        error = error_in_ulps(ours, truth)
        agree = (ours.argmax(-1) == truth.argmax(-1)).mean()
        print(
            f"{alias} {executor}: error {error:.0f} ulps, transformers {their_error:.0f}; top-1 {agree:.4f}"
        )
        assert error < 3 * their_error  # GGUF rounds 1 + w, transformers takes the 1 away again
        assert agree > 0.98
