"""A Tokenizer from a checkpoint: the tokenizer.json of a Hugging Face directory, or a GGUF vocabulary.

GGUF names its vocabularies by kind ("gpt2": byte-level BPE, "llama": SentencePiece) and the former by the
pre-tokenizer that splits text before merging; both are data here. A SentencePiece file lists no merges: they are
derived from its pieces once and kept in the cache directory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ridgeline.checkpoint.checkpoint import Checkpoint, cache_directory
from ridgeline.checkpoint.safetensors import read_json
from ridgeline.errors import TokenizerError
from ridgeline.logs import logger
from ridgeline.tokenizer.tokenizer import Tokenizer

CONTROL, USER_DEFINED = 3, 4
"""Values of tokenizer.ggml.token_type that stay whole inside text."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS: Mapping[str, Any] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "default": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}
"""By tokenizer.ggml.pre."""


def load_tokenizer(checkpoint: Checkpoint | None) -> Tokenizer | None:
    """The tokenizer of a checkpoint, or None where it has none. Raises TokenizerError if it cannot be used."""
    if checkpoint is None:
        return None
    if checkpoint.kind == "hf":
        return _from_directory(checkpoint.path)
    if "tokenizer.ggml.model" not in checkpoint.metadata:
        return None
    return _from_gguf(checkpoint.metadata, file=str(checkpoint.path))


def _from_directory(directory: Path) -> Tokenizer | None:
    file = directory / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for every kind of damage
        raise TokenizerError(f"{file}: not a tokenizer.json that can be read: {error}") from None
    config_file = directory / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    template_file = directory / "chat_template.jinja"
    template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several named templates: the default one
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            special[name] = text
    bos = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return Tokenizer(
        backend,
        bos_token_id=bos,
        eos_token_ids=() if eos is None else (eos,),
        chat_template=template,
        special_tokens=special,
    )


def _from_gguf(metadata: Mapping[str, Any], *, file: str) -> Tokenizer:
    kind = metadata["tokenizer.ggml.model"]
    tokens: Sequence[str] = list(metadata.get("tokenizer.ggml.tokens", ()))
    if not tokens:
        raise TokenizerError(f"{file}: tokenizer.ggml.tokens is missing or empty")
    types = metadata.get("tokenizer.ggml.token_type", ())
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens, file)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens, types)
    else:
        raise TokenizerError(f"{file}: tokenizer.ggml.model is {kind!r}; supported: 'gpt2', 'llama'")
    typed = [(t, k) for t, k in zip(tokens, types, strict=False) if k in (CONTROL, USER_DEFINED)]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in typed if k == CONTROL])
    # A token that the model spells otherwise (a run of spaces) would become a new one: left to the merges.
    defined = [t for t, k in typed if k == USER_DEFINED and backend.token_to_id(t) is not None]
    backend.add_tokens([AddedToken(t, normalized=False) for t in defined])

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(tokens) else None

    bos = token_id("bos")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        text = tokens[bos]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{text} $A", pair=f"{text} $A {text} $B", special_tokens=[(text, bos)]
        )
    names = {"bos_token": bos, "eos_token": token_id("eos"), "unk_token": token_id("unknown"), "pad_token": token_id("padding")}
    return Tokenizer(
        backend,
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(i for i in (token_id("eos"), token_id("eot")) if i is not None)),
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={name: tokens[i] for name, i in names.items() if i is not None},
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], file: str) -> Backend:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(f"{file}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}")
    merges = [tuple(m.split(" ", 1)) for m in metadata.get("tokenizer.ggml.merges", ())]
    try:
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe"
        )
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"{file}: tokens and merges do not fit together: {error}") from None
    backend = Backend(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Backend:
    # Runs of spaces are stored as spaces; inside the model a space is U+2581.
    spelled = ["\u2581" * len(t) if t and not t.strip(" ") else t for t in tokens]
    vocab = {token: i for i, token in enumerate(spelled)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    scores = metadata.get("tokenizer.ggml.scores")
    by_id = str(metadata.get("general.architecture", "")).startswith("gemma")
    rank = range(len(tokens)) if by_id or scores is None else [-float(s) for s in scores]
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=_cached_merges(spelled, vocab, rank),
            unk_token=None if unknown is None else spelled[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Prepend("\u2581")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    if by_id:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def derive_merges(pieces: Sequence[str], vocab: Mapping[str, int], rank: Sequence[float]) -> list[tuple[int, int]]:
    """Every way to cut a piece into two others, best rank first: what a SentencePiece BPE model implies.

    Gemma's scores do not follow its merge order; there the rank is the id.
    """
    merges = []
    for i, piece in enumerate(pieces):
        cuts = [
            (vocab[piece[:at]], vocab[piece[at:]])
            for at in range(1, len(piece))
            if piece[:at] in vocab and piece[at:] in vocab
        ]
        merges += [(rank[i], len(pieces[a]), len(pieces[b]), n, a, b) for n, (a, b) in enumerate(sorted(cuts))]
    # Equal keys keep the order of the ids of their halves.
    merges.sort(key=lambda m: (m[0], -m[1], -m[2]))
    return [(a, b) for *_, a, b in merges]


def _cached_merges(pieces: Sequence[str], vocab: Mapping[str, int], rank: Sequence[float]) -> list[tuple[str, str]]:
    """Merges as text, from the cache file of this vocabulary or derived and written to it."""
    content = "\0".join(pieces).encode("utf-8", "surrogateescape") + array("d", rank).tobytes()
    file = cache_directory() / "merges" / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.i32"
    try:
        ids = array("i", file.read_bytes())
        if len(ids) % 2 or not ids or min(ids) < 0 or max(ids) >= len(pieces):
            raise ValueError("not a list of pairs of token ids")
    except (OSError, ValueError) as reason:
        logger.info("deriving merges of %d pieces (%s)", len(pieces), reason)
        ids = array("i", (i for pair in derive_merges(pieces, vocab, rank) for i in pair))
        _write(file, ids.tobytes())
    return [(pieces[a], pieces[b]) for a, b in zip(ids[::2], ids[1::2], strict=True)]


def _write(file: Path, content: bytes) -> None:
    """Atomically; a cache that cannot be written costs time, not the run."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as temporary:
            temporary.write(content)
        os.replace(temporary.name, file)
    except OSError as error:
        logger.info("%s cannot be written: %s", file, error)
