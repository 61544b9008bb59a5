"""The tokens that a quantizer looks at: random windows of a text, the same ones for the same seed.

Every window is full: padding would enter the statistics as if it were text. The default text is the
calibration split of `quality.text`, which shares no year with what quality is measured on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ridgeline.errors import RequestError
from ridgeline.quality.text import CHARACTERS_PER_TOKEN, load_text
from ridgeline.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Calibration:
    token_ids: list[list[int]]
    """windows, all of one length"""
    seed: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def length(self) -> int:
        return len(self.token_ids[0])

    def fingerprint(self) -> str:
        """Of the tokens and the seed: the same calibration has the same one on every machine."""
        return hashlib.sha256(np.array(self.token_ids, "<i8").tobytes() + str(self.seed).encode()).hexdigest()


def calibration_tokens(
    tokenizer: Tokenizer,
    *,
    num_samples: int = 128,
    length: int = 512,
    seed: int = 0,
    text: str | Path | None = None,
) -> Calibration:
    """`num_samples` windows of `length` tokens; `text` is the path of a UTF-8 file, None the default text.

    Where the tokenizer starts prompts with BOS, BOS is the first token of each window. Raises RequestError
    for a text with fewer tokens than one window and for numbers below 1.
    """
    if num_samples < 1 or length < 2 or seed < 0:
        raise RequestError(
            f"calibration of {num_samples} samples, length {length}, seed {seed}: expected at least one "
            "sample of at least 2 tokens, and a seed of at least 0"
        )
    content = load_text(text, split="calibration")
    prefix = list(tokenizer.prefix_ids)
    rng = np.random.default_rng(seed)
    span = CHARACTERS_PER_TOKEN * length

    def encoded(piece: str) -> list[int]:
        return tokenizer.encode(piece, add_special_tokens=False, parse_special=False)

    windows: list[list[int]] = []
    if len(content) > 2 * span:
        # Only what is used is tokenized; a window begins with a whole word.
        while len(windows) < num_samples:
            start = int(rng.integers(0, len(content) - 2 * span))
            start = content.find(" ", start, start + span)
            token_ids = encoded(content[start : start + span]) if start >= 0 else []
            window = (prefix + token_ids)[:length]
            if len(window) < length:
                raise RequestError(
                    f"calibration text: {span} characters hold fewer than {length} tokens; give another text"
                )
            windows.append(window)
    else:
        token_ids = encoded(content)
        room = len(token_ids) + len(prefix) - length
        if room < 0:
            raise RequestError(
                f"the calibration text has {len(token_ids)} tokens and a sample needs {length}; give a "
                "longer text or a shorter length"
            )
        for start in rng.integers(0, room + 1, num_samples):
            windows.append((prefix + token_ids[start:])[:length])
    return Calibration(windows, seed)
