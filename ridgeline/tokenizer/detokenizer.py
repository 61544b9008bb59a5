"""Text of sampled tokens as they come, in whole characters.

A token is some bytes, often part of a character. The bytes go through an incremental UTF-8 decoder: what is
complete comes out, the rest waits. Each token costs its own bytes, however long the text has become.
"""

from __future__ import annotations

import codecs

from ridgeline.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """One stream of tokens. What it has returned so far is a prefix of `tokenizer.decode(ids)`.

    Owns the bytes of a character that is not complete yet (at most three).
    """

    __slots__ = ("_at_start", "_decoder", "_skip_special_tokens", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.pieces.errors)
        self._at_start = tokenizer.pieces.strip_left

    def push(self, token_id: int) -> str:
        """One token more -> the text that is certain now and was not before; often empty."""
        piece = self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip_special_tokens)
        return self._emit(self._decoder.decode(piece))

    def flush(self) -> str:
        """The rest, where the last character stayed incomplete: U+FFFD. No more tokens come."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text
