"""The tokenizer.json of a Hugging Face directory as GGUF metadata: the inverse of `gguf_vocab`.

GGUF names the way text is split instead of describing it, and states SentencePiece merges as scores. So each
candidate is tried: the one whose tokenizer gives the ids of tokenizer.json on a text of hard cases is
written, and if none does, nothing is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.checkpoint.gguf_write import GGUFValue
from ridgeline.errors import TokenizerError
from ridgeline.tokenizer.gguf_vocab import PRE_TOKENIZERS, gguf_tokenizer
from ridgeline.tokenizer.load import hf_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_PROBE = (
    "Hello  world, it's the 1st of 12345678 DON'T-stop cases;\tcafé = cafe\u0301 naïve\n\n  \n   (x_1)\r\n"
    "日本語テキスト 한국어 العربية Ελληνικά русский 👋🏽 e=mc² ½ ١٢٣ http://a.b/c?d=1&e=2 \u00a0x\u200by "
    "we'll I'VE    four spaces !?!? ``` <tag> $5.00 100% 3.14159\n"
)


def gguf_vocabulary(directory: Path, *, vocab_size: int) -> dict[str, Any]:
    """`tokenizer.*` metadata, empty if the directory has no tokenizer. Raises TokenizerError."""
    tokenizer = hf_tokenizer(directory)
    if tokenizer is None:
        return {}
    document = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    if document.get("model", {}).get("type") != "BPE":
        raise TokenizerError(f"{directory}: only BPE vocabularies can be written to a GGUF file")
    common = _tokens(document, vocab_size)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, token_id in tokenizer.special_tokens.items():
        common[f"tokenizer.ggml.{names[name]}_token_id"] = token_id
    common["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id in tokenizer.prefix_ids
    if tokenizer.suffix_ids:
        common["tokenizer.ggml.add_eos_token"] = True
    if tokenizer.chat_template is not None:
        common["tokenizer.chat_template"] = tokenizer.chat_template

    expected = tokenizer.encode(_PROBE)
    for kind in _candidates(document, common):
        metadata = kind | common
        plain = {key: v.value if isinstance(v, GGUFValue) else v for key, v in metadata.items()}
        restored = gguf_tokenizer(plain)
        if restored is not None and restored.encode(_PROBE) == expected:
            return metadata
    raise TokenizerError(
        f"{directory}: no GGUF vocabulary splits text as this tokenizer.json does; save the model as a "
        "Hugging Face directory"
    )


def _tokens(document: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Pieces and their types; ids that no piece has are unused."""
    pieces = [f"[PAD{i}]" for i in range(vocab_size)]
    types = np.full(vocab_size, _UNUSED, np.int32)
    added = {token["id"]: token for token in document.get("added_tokens", [])}
    unknown = document["model"].get("unk_token")
    for piece, i in document["model"]["vocab"].items() | {(t["content"], i) for i, t in added.items()}:
        if not 0 <= i < vocab_size:
            raise TokenizerError(f"token {piece!r} has id {i}; the model has {vocab_size} embeddings")
        pieces[i] = piece
        is_byte = len(piece) == 6 and piece.startswith("<0x") and document["model"].get("byte_fallback")
        types[i] = _BYTE if is_byte else _UNKNOWN if piece == unknown else _NORMAL
        if i in added and piece != unknown:
            types[i] = _CONTROL if added[i]["special"] else _USER_DEFINED
        if types[i] == _USER_DEFINED and document["model"].get("byte_fallback"):
            pieces[i] = piece.replace("\u2581", " ")
    return {
        "tokenizer.ggml.tokens": GGUFValue(pieces, "string"),
        "tokenizer.ggml.token_type": types,
    }


def _candidates(document: dict[str, Any], common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The ways in which a GGUF file may state this vocabulary."""
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    if not document["model"].get("byte_fallback"):
        for name in PRE_TOKENIZERS:
            yield {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": name,
                "tokenizer.ggml.merges": GGUFValue(merges, "string"),
            }
        return
    # A piece is worth the more the earlier a merge makes it.
    pieces: list[str] = common["tokenizer.ggml.tokens"].value
    made: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        made.setdefault(merge.replace(" ", ""), rank)
    scores = np.array([-made[p] if p in made else -len(merges) for p in pieces], np.float32)
    for add_space_prefix in (False, True):
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": add_space_prefix,
        }
