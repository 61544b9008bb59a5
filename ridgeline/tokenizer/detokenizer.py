"""Tokens to text as they come: never half a character, never a re-decoding of what is already out.

Two kinds of vocabulary: byte-level BPE, where a token is a run of bytes, and SentencePiece, where it is text
except for <0xNN> byte tokens. The concatenation of all that is emitted equals decoding all tokens at once.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from ridgeline.tokenizer.tokenizer import Tokenizer, byte_alphabet

_ALPHABET = byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class IncrementalDetokenizer:
    """Text of one sequence of tokens. Owns the bytes that do not make a whole character yet."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._byte_fallback = tokenizer.byte_fallback
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._byte_run = bytearray()

    def push(self, token_id: int) -> str:
        """The text that this token completes, often none."""
        if token_id in self._skipped:
            return ""
        token = self._tokenizer.backend.id_to_token(token_id)
        if token is None:
            return ""
        return self._push_sentencepiece(token) if self._byte_fallback else self._decoder.decode(_token_bytes(token))

    def _push_sentencepiece(self, token: str) -> str:
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            self._byte_run.append(int(byte[1], 16))
            return ""
        return self._end_byte_run() + token.replace("\u2581", " ")

    def _end_byte_run(self) -> str:
        """A run of byte tokens is text if it is valid as a whole, else one U+FFFD a byte (as `tokenizers` does)."""
        run, self._byte_run = bytes(self._byte_run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def flush(self) -> str:
        """What is left at the end; incomplete characters become U+FFFD."""
        return self._end_byte_run() + self._decoder.decode(b"", final=True)


def _token_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; one that uses other characters (an added token) is its own text."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


class StopStringFinder:
    """Finds the earliest stop string in a stream of text and holds back what may still become one."""

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self._longest = max(map(len, self._stop), default=0)

    def push(self, text: str) -> tuple[str, str | None]:
        """More text -> (text that can be shown, the stop string that was completed). Nothing follows a stop."""
        if not self._stop:
            return text, None
        self._held += text
        found = [(self._held.index(s), -len(s), s) for s in self._stop if s in self._held]
        if found:
            start, _, stop = min(found)
            shown = self._held[: start + len(stop) if self._include_stop else start]
            self._held = ""
            return shown, stop
        keep = self._held_back()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, None

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0

    def flush(self) -> str:
        """The text still held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held
