"""A tokenizer from the vocabulary inside a GGUF file.

`tokenizer.ggml.model` says which kind. "gpt2" is byte-level BPE with its merges in the file; how text is cut
before merging is known by name only (`tokenizer.ggml.pre`), so `PRE_TOKENIZERS` has the expressions.
"llama" is SentencePiece BPE: no merges, but a score for each piece. Two neighbours whose concatenation is a
piece may merge, best score first; that is BPE with all such pairs as merges (`derive_merges`). Gemma's 262144
pieces have 514906, so they are derived once and kept in the cache directory, as pairs of ids: from a
tokenizer.json the same takes half as long again.

Sources: llama.cpp src/llama-vocab.cpp; the tokenizer.json files of the models named.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ridgeline.checkpoint.checkpoint import cache_directory
from ridgeline.errors import TokenizerError
from ridgeline.logs import logger
from ridgeline.tokenizer.tokenizer import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
"""Values of tokenizer.ggml.token_type that matter here."""
_SPACE = "\u2581"
MAX_PIECE_CHARS = 256
"""Deriving merges takes every cut of every piece. The longest of Gemma has 31 characters."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before merging: by each expression in turn, keeping the cuts already made."""

    patterns: tuple[str, ...]
    add_bos: bool = False
    """Where the file does not say."""
    ignore_merges: bool = False
    """A piece that is in the vocabulary is one token, whatever its merges say."""
    nfc: bool = False
    """Compose characters first (Unicode normalization form C)."""


PRE_TOKENIZERS = {
    "default": PreTokenizer((_GPT2,)),
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": PreTokenizer((_LLAMA3,), add_bos=True, ignore_merges=True),
    "qwen2": PreTokenizer((_LLAMA3.replace("{1,3}", ""),), nfc=True),
}

Pairs = NDArray[np.int32]
"""[M, 2] ids of the left and the right piece, first merge first."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What the file says, checked: one piece, type and score for each id."""

    pieces: list[str]
    types: NDArray[np.int32]
    scores: NDArray[np.float32] | None


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a GGUF file, or None if it has no vocabulary. Raises TokenizerError."""
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise TokenizerError(
            f"tokenizer.ggml.model is {kind!r}; supported: gpt2, llama; give token ids instead of text"
        )
    with _paused_gc():
        vocabulary = _read_vocabulary(metadata)
        try:
            build = _byte_level if kind == "gpt2" else _sentencepiece
            backend, add_bos = build(metadata, vocabulary)
            backend.add_tokens(
                [
                    AddedToken(piece, special=token_type == _CONTROL, normalized=False)
                    for piece, token_type in zip(vocabulary.pieces, vocabulary.types.tolist(), strict=True)
                    if token_type in (_CONTROL, _USER_DEFINED) and piece.strip(_SPACE)
                ]
            )
        except TokenizerError:
            raise
        except Exception as error:  # the library raises nothing more precise
            raise TokenizerError(f"the vocabulary is inconsistent: {error}; fetch the file again") from None
    special_tokens = {
        name: token_id
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if (token_id := _token_id(metadata, key, len(vocabulary.pieces))) is not None
    }
    ends = (_token_id(metadata, key, len(vocabulary.pieces)) for key in ("eos", "eot"))
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        eos_token_ids=dict.fromkeys(end for end in ends if end is not None),
        prefix_ids=[special_tokens["bos"]] if add_bos and "bos" in special_tokens else (),
        suffix_ids=[special_tokens["eos"]] if add_eos and "eos" in special_tokens else (),
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    """Byte-level BPE, and whether BOS is added by default."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r}; known: {', '.join(PRE_TOKENIZERS)}; give token ids instead of "
            "text, or use the model's Hugging Face directory, whose tokenizer.json says how to split"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    backend = Backend(
        models.BPE(
            vocab=_ids(vocabulary),
            merges=merges,  # type: ignore[arg-type]
            ignore_merges=pre.ignore_merges,
        )
    )
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    """SentencePiece BPE, and whether BOS is added by default."""
    unknown = _token_id(metadata, "unknown", len(vocabulary.pieces))
    pairs = _cached_merges(vocabulary)
    spell = vocabulary.pieces.__getitem__
    backend = Backend(
        models.BPE(
            vocab=_ids(vocabulary),
            merges=list(zip(map(spell, pairs[:, 0].tolist()), map(spell, pairs[:, 1].tolist()), strict=True)),
            unk_token=None if unknown is None else spell(unknown),
            fuse_unk=True,
            byte_fallback=bool((vocabulary.types == _BYTE).any()),
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def derive_merges(pieces: Sequence[str], types: NDArray[np.int32], scores: NDArray[np.float32]) -> Pairs:
    """All pairs of pieces whose concatenation is a piece: user-defined ones first, then by falling score."""
    mergeable = np.flatnonzero((types == _NORMAL) | (types == _USER_DEFINED))
    order = mergeable[np.lexsort((-scores[mergeable], types[mergeable] != _USER_DEFINED))].tolist()
    ids = {pieces[i]: i for i in order}
    pairs: list[tuple[int, int]] = []
    for i in order:
        piece = pieces[i]
        if len(piece) > MAX_PIECE_CHARS:
            raise TokenizerError(
                f"token {i} has {len(piece)} characters; expected at most {MAX_PIECE_CHARS}; "
                "the file is damaged: fetch it again"
            )
        for cut in range(len(piece) - 1, 0, -1):
            left = ids.get(piece[:cut])
            if left is not None and (right := ids.get(piece[cut:])) is not None:
                pairs.append((left, right))
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)


def _cached_merges(vocabulary: _Vocabulary) -> Pairs:
    """`derive_merges` of this vocabulary, from the cache directory if it is there and whole.

    The file holds a SHA-256 of the pairs, then the pairs. A cache that cannot be used costs time only.
    """
    assert vocabulary.scores is not None
    key = hashlib.sha256("\0".join(vocabulary.pieces).encode())
    key.update(vocabulary.types.tobytes() + vocabulary.scores.tobytes())
    cache = cache_directory() / "tokenizers"
    file = cache / f"{key.hexdigest()[:32]}.merges"
    with contextlib.suppress(OSError):
        content = file.read_bytes()
        if content[:32] == hashlib.sha256(content[32:]).digest():
            return np.frombuffer(content, "<i4", offset=32).reshape(-1, 2)
    pairs = derive_merges(vocabulary.pieces, vocabulary.types, vocabulary.scores)
    content = pairs.astype("<i4").tobytes()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            written = Path(folder) / file.name
            written.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(written, file)
    except OSError as error:
        logger.warning("the tokenizer's merges are not kept, so every start derives them again: %s", error)
    return pairs


def _read_vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    pieces = _strings(metadata, "tokenizer.ggml.tokens")
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(pieces))
    types = np.full(len(pieces), _NORMAL) if types is None else types
    scores = None
    if metadata["tokenizer.ggml.model"] == "llama":
        scores = _numbers(metadata, "tokenizer.ggml.scores", len(pieces))
        if scores is None:
            raise TokenizerError("tokenizer.ggml.scores is missing; a SentencePiece vocabulary needs it")
        # Files write the user-defined runs of spaces with real spaces. They are found by merging, as in the
        # tokenizer.json of these models, after the text's own spaces have become this character.
        for i in np.flatnonzero(types == _USER_DEFINED).tolist():
            if not pieces[i].strip(" "):
                pieces[i] = _SPACE * len(pieces[i])
        scores = scores.astype(np.float32)
    return _Vocabulary(pieces, types.astype(np.int32), scores)


def _ids(vocabulary: _Vocabulary) -> dict[str, int]:
    return dict(zip(vocabulary.pieces, range(len(vocabulary.pieces)), strict=True))


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    """An array of strings, all valid UTF-8."""
    value = metadata.get(key)
    strings = None if value is None or isinstance(value, (str, int, float)) else list(value)
    if strings is None or not all(isinstance(s, str) for s in strings[:1]):
        found = "nothing" if value is None else type(value).__name__
        raise TokenizerError(f"{key}: expected an array of strings, found {found}; convert the file again")
    try:
        "".join(strings).encode()
    except UnicodeEncodeError:
        broken = next(i for i, s in enumerate(strings) if any("\ud800" <= c <= "\udfff" for c in s))
        raise TokenizerError(
            f"{key}: entry {broken} is not UTF-8; the file is damaged: fetch it again"
        ) from None
    return strings


def _numbers(metadata: Mapping[str, Any], key: str, expected: int) -> NDArray[Any] | None:
    """An array of as many numbers as there are tokens, or None."""
    value = metadata.get(key)
    if value is None:
        return None
    numbers = np.asarray(value)
    if numbers.shape != (expected,) or numbers.dtype.kind not in "iuf":
        raise TokenizerError(
            f"{key}: expected {expected} numbers, one a token, found {numbers.dtype} "
            f"of shape {numbers.shape}; the file is damaged: fetch it again"
        )
    return numbers


def _token_id(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    # Converters write -1 or 2^32 - 1 for "none".
    return token_id if isinstance(token_id, int) and 0 <= token_id < num_tokens else None


@contextlib.contextmanager
def _paused_gc() -> Iterator[None]:
    """No cyclic garbage collection: half a million new tuples would start it again and again (0.2 of 1 s)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
