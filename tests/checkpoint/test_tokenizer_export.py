"""Tokenizer files of a saved directory: the ids, texts and prompts of the source, for us and for transformers."""

from __future__ import annotations

import json

import pytest

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.checkpoint.safetensors import HFCheckpoint
from ridgeline.models.load import load_model
from ridgeline.models.locate import locate_model
from ridgeline.models.save import save_model
from ridgeline.models.synth import synthesize
from ridgeline.tokenizer import load_tokenizer
from ridgeline.tokenizer.export import export_tokenizer

TEXTS = [
    "",
    " leading, trailing  ",
    "The year 1234567 isn't over.\n\n\tdef f(x): return x**2  # \u00fc",
    "\u65e5\u672c\u8a9e \U0001f600 \u0661\u0662",
    "<|im_start|>user\nhi<|im_end|> <bos>",
]
MESSAGES = [{"role": "user", "content": "What is 17 + 4?"}, {"role": "assistant", "content": "21"}]


@pytest.fixture(params=["synthetic", "smollm2", "gemma3-270m"])
def source(request, tmp_path):
    if request.param == "synthetic":
        return read_gguf(synthesize("tiny-llama", "F32", path=tmp_path / "m.gguf"))
    return read_gguf(locate_model(request.param))


def test_from_gguf(source, tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    assert export_tokenizer(source, directory)
    ours, theirs = load_tokenizer(source), load_tokenizer(HFCheckpoint(directory, {}, {}, {}))
    assert ours is not None and theirs is not None
    assert theirs.special_tokens == ours.special_tokens and theirs.vocab_size == ours.vocab_size
    assert (theirs.prefix_ids, theirs.suffix_ids) == (ours.prefix_ids, ours.suffix_ids)
    assert theirs.chat_template == ours.chat_template

    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(directory)
    if ours.chat_template is not None:
        prompt = oracle.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert prompt == ours.apply_chat_template(MESSAGES)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert oracle.encode(text) == ids, text
        assert theirs.decode(ids) == ours.decode(ids)
        assert oracle.decode(ids, skip_special_tokens=True) == ours.decode(ids), text


def test_a_directory_is_copied(tmp_path):
    model = load_model(synthesize("tiny-llama", "F32", path=tmp_path / "hf"))
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    saved = save_model(model, tmp_path / "out", kind="hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (saved / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_what_ends_a_text_is_stated(tmp_path):
    saved = save_model(
        load_model(synthesize("tiny-llama", "F32", path=tmp_path / "m.gguf")), tmp_path / "out", kind="hf"
    )
    stated = json.loads((saved / "generation_config.json").read_text())
    assert stated == {"bos_token_id": 1, "eos_token_id": [2]}
    assert load_model(saved).config.eos_token_ids == (2,)
