"""From a checkpoint to its `Tokenizer`: a GGUF vocabulary, or tokenizer.json beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ridgeline.checkpoint.checkpoint import Checkpoint
from ridgeline.errors import RidgelineError, TokenizerError
from ridgeline.tokenizer.gguf_vocab import gguf_tokenizer
from ridgeline.tokenizer.tokenizer import Tokenizer


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer of a model, or None if its checkpoint has none.

    Raises TokenizerError, naming the file, for one that cannot be read or is of a kind we do not know.
    """
    try:
        if checkpoint.kind == "gguf":
            return gguf_tokenizer(checkpoint.metadata)
        return hf_tokenizer(checkpoint.path)
    except RidgelineError as error:
        raise TokenizerError(f"{checkpoint.path}: tokenizer: {error}") from None


def hf_tokenizer(directory: Path) -> Tokenizer | None:
    file = directory / "tokenizer.json"
    if not file.is_file():
        if any((directory / name).is_file() for name in ("tokenizer.model", "vocab.json")):
            raise TokenizerError(
                "expected tokenizer.json, found an older kind of vocabulary; convert it: "
                "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        return None
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise TokenizerError(f"tokenizer.json is not readable: {error}; fetch it again") from None
    config = _json_object(directory / "tokenizer_config.json")
    special_tokens = {
        name: token_id
        for name in ("bos", "eos", "unk", "pad")
        if (text := _token_text(config.get(f"{name}_token"))) is not None
        and (token_id := backend.token_to_id(text)) is not None
    }
    prefix, suffix = _template_ids(backend)
    bos, eos = special_tokens.get("bos"), special_tokens.get("eos")
    match config.get("add_bos_token"):
        case True if bos is not None:
            prefix = [bos, *(i for i in prefix if i != bos)]
        case False:
            prefix = [i for i in prefix if i != bos]
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        eos_token_ids=() if eos is None else (eos,),
        prefix_ids=prefix,
        suffix_ids=suffix,
        chat_template=_chat_template(directory, config),
    )


def _template_ids(backend: Backend) -> tuple[list[int], list[int]]:
    """What the post-processor of tokenizer.json puts before and after a text."""
    inside = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(inside) + 1):
        if whole[start : start + len(inside)] == inside:
            return whole[:start], whole[start + len(inside) :]
    return [], []


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json, where it is a string or a list of named ones."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str | None:
    """A token in tokenizer_config.json: "<s>" or {"content": "<s>", ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{file.name} is not readable as JSON: {error}; fetch it again") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{file.name}: expected a JSON object, found {type(found).__name__}")
    return found
