"""Synthetic models: the same bytes for a seed, valid for other readers, sane logits, usable text."""

from __future__ import annotations

import hashlib
import math
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
import transformers

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.errors import ConfigError
from ridgeline.llm import LLM
from ridgeline.models.load import load_model
from ridgeline.models.registry import expected_shapes
from ridgeline.models.synth import FALLBACKS, PRESETS, preset_config, synthesize
from ridgeline.quant.formats import FORMATS
from ridgeline.sampling_params import SamplingParams
from ridgeline.tokenizer.load import load_tokenizer

TEXT = "The time of day: 2 naïve 🙂 words\n\tcould go — so?"


def digest(path):
    files = [path] if path.is_file() else sorted(path.iterdir())
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("kind", ["gguf", "hf"])
@pytest.mark.parametrize("like", ["tiny-llama", "tiny-gemma3"])
def test_bytes_follow_from_the_seed(tmp_path, like, kind):
    suffix = ".gguf" if kind == "gguf" else ""
    made = [
        digest(synthesize(like, "F16", seed=seed, path=tmp_path / f"{i}{suffix}"))
        for i, seed in enumerate((0, 0, 1))
    ]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f != "F64"])
def test_every_format_as_the_gguf_package_reads_it(tmp_path, fmt):
    path = synthesize("tiny-llama", fmt, path=tmp_path / "m.gguf", hidden_size=256, num_layers=1)
    reader = gguf.GGUFReader(path)
    config = preset_config("tiny-llama", hidden_size=256, num_layers=1)
    assert len(reader.tensors) == len(expected_shapes(config))
    by_name = {t.name: t for t in reader.tensors}
    assert by_name["blk.0.attn_q.weight"].tensor_type.name == fmt
    # Rows of 96 are no super-blocks.
    down, fallback = by_name["blk.0.ffn_down.weight"], FALLBACKS.get(fmt, fmt)
    assert down.tensor_type.name == fallback
    assert by_name["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
        if values.ndim == 2:
            assert np.std(values) * math.sqrt(values.shape[1]) == pytest.approx(1.0, abs=0.2)
            assert abs(values.mean()) < 0.2 * values.std()
        else:
            assert 0.5 < values.mean() < 1.5


def test_rows_of_odd_length(tmp_path):
    path = synthesize("tiny-llama", "Q4_K", path=tmp_path / "m.gguf", intermediate_size=50)
    formats = {entry.format.name for entry in read_gguf(path).tensors.values()}
    assert formats == {"F32", "Q5_0", "F16"}


def test_large_tensors_are_made_in_pieces(tmp_path):
    """A tensor of 64 MiB and a file of 83, with a peak of some MiB of numpy memory."""
    options = {"vocab_size": 65536, "hidden_size": 256, "num_layers": 1}
    tracemalloc.start()
    path = synthesize("tiny-llama", "F32", path=tmp_path / "m.gguf", tie_embeddings=True, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 64 * 2**20
    assert peak < 48 * 2**20


@pytest.mark.parametrize("like", ["tiny-llama", "tiny-gemma3"])
@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16"])
def test_transformers_loads_the_directory(tmp_path, like, fmt):
    directory = synthesize(like, fmt, path=tmp_path / "hf")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = load_model(directory)
    embedding = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(embedding, ours.weights["embed_tokens"].dequantize())
    with torch.inference_mode():
        logits = model(torch.arange(40)[None]).logits.numpy()
    assert np.isfinite(logits).all() and 0.3 < logits.std() < 3


def test_text_works_and_both_kinds_agree(tmp_path):
    directory = synthesize("tiny-llama", "F32", path=tmp_path / "hf", vocab_size=1000)
    file = synthesize("tiny-llama", "F32", path=tmp_path / "m.gguf", vocab_size=1000)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ids = theirs.encode(TEXT)
    assert theirs.decode(ids) == TEXT and len(theirs) == 1000
    assert len(ids) < len(TEXT.encode()) and max(ids) < 1000
    messages = [{"role": "user", "content": TEXT}]
    for path in (directory, file):
        tokenizer = load_tokenizer(load_model(path).checkpoint)
        assert tokenizer is not None
        assert tokenizer.encode(TEXT) == ids and tokenizer.decode(ids) == TEXT
        assert tokenizer.encode("<|im_end|>") == [2] == list(load_model(path).config.eos_token_ids)
        chat = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert chat == f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n"


def test_the_smallest_vocabulary(tmp_path):
    path = synthesize("tiny-llama", "F32", path=tmp_path / "m.gguf", vocab_size=260)
    tokenizer = load_tokenizer(read_gguf(path))
    assert tokenizer is not None and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_presets_have_the_sizes_of_the_models():
    """Parameters as their cards state them."""
    billions = {
        "llama-1b": 1.236,
        "llama-8b": 8.030,
        "llama-7b": 6.738,
        "smollm2-135m": 0.1345,
        "gemma3-270m": 0.268,
    }
    for like, expected in billions.items():
        found = sum(math.prod(shape) for shape in expected_shapes(preset_config(like)).values())
        assert found / 1e9 == pytest.approx(expected, rel=1e-3), like
    assert set(PRESETS) - set(billions) == {"tiny-llama", "tiny-gemma3"}


def test_what_depends_on_an_override_follows():
    config = preset_config("tiny-gemma3", num_layers=14, hidden_size=100, head_dim=48, sliding_window=9)
    assert config.window_layers == tuple(i for i in range(14) if i not in (5, 11))
    assert (config.embed_scale, config.attn_scale, config.sliding_window) == (10.0, 48**-0.5, 9)
    assert (
        config.rope.rotary_dim == 48 and config.rope_local is not None and config.rope_local.rotary_dim == 48
    )


@pytest.mark.parametrize(
    ("like", "fmt", "name", "options", "expected"),
    [
        ("llama-2b", "F32", "m.gguf", {}, "no preset 'llama-2b' to be like; presets: llama-1b, llama-8b"),
        ("tiny-llama", "Q4_2", "m.gguf", {}, "format='Q4_2': expected one of F32, F16, BF16, Q4_0"),
        ("tiny-llama", "Q4_0", "hf", {}, "expected one of F32, F16, BF16 for a Hugging Face directory"),
        ("tiny-llama", "F32", "hf", {"seed": -1}, "seed=-1: expected a whole number from 0"),
        ("tiny-llama", "F32", "hf", {"layers": 1}, "tiny-llama has no field layers; fields: eos_token_ids"),
        ("tiny-llama", "F32", "hf", {"num_layers": 0}, "num_layers=0: expected a whole number"),
        ("tiny-llama", "F32", "hf", {"num_kv_heads": 3}, "num_heads=4: expected a multiple of num_kv_heads"),
        ("tiny-llama", "F32", "hf", {"head_dim": 7}, "head_dim=7: expected an even number"),
        ("tiny-llama", "F32", "hf", {"vocab_size": 259}, "vocab_size=259: expected at least 260"),
    ],
)
def test_what_cannot_be(tmp_path, like, fmt, name, options, expected):
    with pytest.raises(ConfigError) as caught:
        synthesize(like, fmt, path=tmp_path / name, **options)
    assert expected in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / "hf").touch()
    with pytest.raises(ConfigError, match="is a file"):
        synthesize("tiny-llama", "F32", path=tmp_path / "hf")


@pytest.mark.parametrize("like", ["tiny-llama", "tiny-gemma3"])
@pytest.mark.parametrize(("fmt", "name"), [("Q4_0", "m.gguf"), ("Q6_K", "m.gguf"), ("BF16", "hf")])
def test_the_engine_runs_them(tmp_path, like, fmt, name):
    path = synthesize(like, fmt, path=tmp_path / name)
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=0)
    with LLM(str(path), executor="eager", kv_cache_tokens=256, max_model_len=128) as llm:
        text, ids = llm.generate([TEXT, {"prompt_token_ids": [5, 6, 7]}], params)
        assert llm.engine.tokenizer is not None
        assert text.prompt_token_ids == llm.engine.tokenizer.encode(TEXT)
        assert ids.prompt_token_ids == [5, 6, 7]
        for output in (text, ids):
            (choice,) = output.outputs
            assert choice.finish_reason == "length" and len(choice.token_ids) == 6
            assert choice.text == llm.engine.tokenizer.decode(choice.token_ids)
            assert all(
                math.isfinite(row[i].logprob)
                for i, row in zip(choice.token_ids, choice.logprobs, strict=True)
            )
        (again,) = llm.generate(TEXT, params)
        assert again.outputs[0].token_ids == text.outputs[0].token_ids
