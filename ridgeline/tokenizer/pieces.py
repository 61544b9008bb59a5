"""What bytes a token of the vocabulary stands for, so that text is a concatenation.

Both kinds of vocabulary spell bytes as characters: byte-level BPE by GPT-2's table (a space is "Ġ"),
SentencePiece by "▁" for a space and "<0x0A>" for a byte that has no piece. With this undone once per token,
decoding is joining bytes and reading them as UTF-8, and a stream may stop between any two bytes. The rules
are read from the decoder of the `tokenizers` library and give its text, except for one kind of damage:
where a run of "<0xNN>" tokens is not valid as a whole, the library turns every byte of it into U+FFFD, valid
characters too. Like SentencePiece we keep those; otherwise text would have to wait for the end of its run.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from ridgeline.errors import TokenizerError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes: printable ones stand for themselves, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


_BYTE_OF = {character: byte for byte, character in _byte_alphabet().items()}


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("ridgeline.each_byte", _replace_each_byte)


@dataclass(frozen=True, slots=True)
class PieceDecoder:
    """How one tokenizer spells bytes."""

    byte_level: bool
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_left: bool = False
    """One space at the start of the text is not part of it (a SentencePiece prefix)."""

    @property
    def errors(self) -> str:
        """Error handler for bytes that are not UTF-8: U+FFFD for each broken sequence, or for each byte."""
        return "ridgeline.each_byte" if self.byte_fallback else "replace"

    def decode(self, piece: str) -> bytes:
        if self.byte_level:
            try:
                return bytes([_BYTE_OF[character] for character in piece])
            except KeyError:
                # An added token, written as it is.
                return piece.encode()
        for old, new in self.replacements:
            piece = piece.replace(old, new)
        if self.byte_fallback and (match := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(match[1])
        return piece.encode()


def piece_decoder(backend: Backend) -> PieceDecoder:
    """The rules of the library's decoder. Raises TokenizerError for one that is not made of bytes."""
    decoder: Any = backend.decoder
    steps = [] if decoder is None else [json.loads(decoder.__getstate__())]
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["decoders"]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return PieceDecoder(byte_level=True)
    kinds = [step["type"] for step in steps if step["type"] != "Replace"]
    replacements = tuple(
        (step["pattern"]["String"], step["content"])
        for step in steps
        if step["type"] == "Replace" and "String" in step["pattern"]
    )
    strips = [(step["content"], step["start"], step["stop"]) for step in steps if step["type"] == "Strip"]
    if (
        kinds in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"], ["Fuse"], ["Fuse", "Strip"])
        and len(replacements) + len(kinds) == len(steps)
        and all(strip == (" ", 1, 0) for strip in strips)
    ):
        return PieceDecoder(
            byte_level=False,
            replacements=replacements,
            byte_fallback="ByteFallback" in kinds,
            strip_left=bool(strips),
        )
    found = " + ".join(step["type"] for step in steps) or "none"
    raise TokenizerError(
        f"decoder {found}; expected ByteLevel, or Replace + ByteFallback + Fuse (+ Strip of one space on the "
        "left); give token ids instead of text, or use a tokenizer of one of these kinds"
    )
