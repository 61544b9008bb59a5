"""The tokenizer of a checkpoint as the files of a Hugging Face directory.

From a directory its files are copied. From a GGUF vocabulary, tokenizer.json is what `gguf_vocab` built, with
a post-processor for the tokens around a prompt; tokenizer_config.json has special tokens and chat template.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ridgeline.checkpoint.checkpoint import Checkpoint
from ridgeline.tokenizer.load import load_tokenizer
from ridgeline.tokenizer.tokenizer import Tokenizer

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.model", "vocab.json", "merges.txt"),
)


def export_tokenizer(checkpoint: Checkpoint, directory: Path) -> bool:
    """Write the files; False if the checkpoint has no tokenizer. Raises TokenizerError."""
    if checkpoint.kind == "hf":
        present = [checkpoint.path / name for name in FILES if (checkpoint.path / name).is_file()]
        for file in present:
            shutil.copyfile(file, directory / file.name)
        return bool(present)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        return False
    documents = {"tokenizer.json": tokenizer_json(tokenizer), "tokenizer_config.json": _config(tokenizer)}
    for name, document in documents.items():
        text = json.dumps(document, indent=1, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")
    return True


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """For the tokenizers library: its own form, and what is put around a prompt."""
    document: dict[str, Any] = json.loads(tokenizer.to_json())
    before, after = tokenizer.prefix_ids, tokenizer.suffix_ids
    if before or after:
        names = {i: tokenizer.token_text(i) for i in (*before, *after)}
        piece = [{"Sequence": {"id": "A", "type_id": 0}}]
        whole = [
            *({"SpecialToken": {"id": names[i], "type_id": 0}} for i in before),
            *piece,
            *({"SpecialToken": {"id": names[i], "type_id": 0}} for i in after),
        ]
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": whole,
            "pair": [*whole, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()},
        }
    return document


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    special = {
        f"{name}_token": tokenizer.token_text(token_id) for name, token_id in tokenizer.special_tokens.items()
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if tokenizer.bos_token_id is not None:
        config["add_bos_token"] = tokenizer.bos_token_id in tokenizer.prefix_ids
    return config | ({} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template})
