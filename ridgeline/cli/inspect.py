"""`ridgeline inspect`: what is in a checkpoint, without loading it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ridgeline.checkpoint.checkpoint import Checkpoint, TensorEntry
from ridgeline.cli.options import print_json
from ridgeline.compress.sizes import stored_bytes
from ridgeline.errors import RidgelineError
from ridgeline.models.decoder import record_decoder
from ridgeline.models.load import LoadedModel, load_model, open_checkpoint
from ridgeline.models.locate import locate_model
from ridgeline.ops.fuse import fuse, rules_named
from ridgeline.tokenizer import load_tokenizer

MAX_SHOWN = 100
"""Characters of a metadata value that are shown."""


def inspect(
    model: str, *, json: bool = False, tensors: bool = False, program: bool = False, fusion: str = "none"
) -> None:
    """What is in a GGUF file or Hugging Face directory: architecture, shapes, formats, bytes, tokenizer.

    Examples:

        ridgeline inspect smollm2

        ridgeline inspect model.gguf --tensors

        ridgeline inspect smollm2 --program

        ridgeline inspect smollm2 --program --fusion all

        ridgeline inspect smollm2 --program --fusion merged_linears,gated_linear

        ridgeline inspect ./my-model --json | tail -1 | jq .parameters

    Parameters
    ----------
    model
        A .gguf file, a Hugging Face directory, or the alias of an installed model package.
    json
        End with one JSON document that holds everything, all tensors included.
    tensors
        Also list every tensor.
    program
        Show the recorded Program instead: the model as a list of instructions.
    fusion
        Fusion rules applied to the Program before it is shown: all (what native runs), none, or names.
    """
    if program:
        loaded = load_model(locate_model(model))
        recorded = record_decoder(loaded.config, loaded.weights, max_model_len=loaded.config.max_position)
        fused = fuse(recorded, rules_named(None if fusion == "all" else fusion))
        sys.stdout.write(fused.text() + "\n")
        return
    checkpoint = open_checkpoint(locate_model(model))
    document = describe(checkpoint)
    if json:
        print_json(document)
        return
    for line in _lines(document, with_tensors=tensors):
        sys.stdout.write(line + "\n")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything `inspect` shows, as plain data. What cannot be understood is reported, not raised."""
    entries = list(checkpoint.tensors.values())
    parameters = sum(_num_elements(entry) for entry in entries)
    tensor_bytes = sum(entry.num_bytes for entry in entries)
    document: dict[str, Any] = {
        "path": str(checkpoint.path),
        "kind": checkpoint.kind,
        "file_bytes": sum(file.stat().st_size for file in {entry.file for entry in entries}),
        "parameters": parameters,
        "tensor_bytes": tensor_bytes,
        "bits_per_weight": 8 * tensor_bytes / parameters if parameters else None,
        "formats": _formats(entries),
        "config": None,
        "tokenizer": None,
        "problems": [],
        "metadata": {key: _shown(value) for key, value in checkpoint.metadata.items()},
        "tensors": [
            {
                "name": e.name,
                "format": e.format.name,
                "shape": list(e.shape),
                "bytes": e.num_bytes,
                "offset": e.offset,
            }
            for e in entries
        ],
    }
    try:
        model = load_model(checkpoint.path)
        document["config"] = asdict(model.config)
        if "quantization_config" in checkpoint.metadata:
            document |= _decoded(model)
    except RidgelineError as error:
        document["problems"].append(str(error))
    try:
        tokenizer = load_tokenizer(checkpoint)
        if tokenizer is not None:
            document["tokenizer"] = {
                "vocab_size": tokenizer.vocab_size,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_ids": list(tokenizer.eos_token_ids),
                "chat_template": tokenizer.chat_template,
            }
    except RidgelineError as error:
        document["problems"].append(str(error))
    return document


def _decoded(model: LoadedModel) -> dict[str, Any]:
    """The figures of the weights that several integer tensors of a quantized directory hold together."""
    distinct = list({id(weight): weight for weight in model.weights.values()}.values())
    parameters = sum(weight.num_elements for weight in distinct)
    num_bytes = sum(map(stored_bytes, distinct))
    formats: dict[str, dict[str, int]] = {}
    for weight in distinct:
        count = formats.setdefault(weight.format.name, {"tensors": 0, "parameters": 0, "bytes": 0})
        count["tensors"] += 1
        count["parameters"] += weight.num_elements
        count["bytes"] += stored_bytes(weight)
    return {
        "parameters": parameters,
        "tensor_bytes": num_bytes,
        "bits_per_weight": 8 * num_bytes / parameters,
        "formats": dict(sorted(formats.items(), key=lambda item: -item[1]["bytes"])),
    }


def _num_elements(entry: TensorEntry) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return count


def _formats(entries: Sequence[TensorEntry]) -> dict[str, dict[str, int]]:
    """Tensors, parameters and bytes by format, largest first."""
    tensors: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for entry in entries:
        tensors[entry.format.name] += 1
        parameters[entry.format.name] += _num_elements(entry)
        num_bytes[entry.format.name] += entry.num_bytes
    return {
        name: {"tensors": tensors[name], "parameters": parameters[name], "bytes": count}
        for name, count in num_bytes.most_common()
    }


def _shown(value: Any) -> Any:
    """A metadata value as JSON: long arrays by their length and beginning."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _shown(inner) for key, inner in value.items()}
    items = [_shown(item.item() if hasattr(item, "item") else item) for item in value[:5]]
    return items if len(value) <= 5 else {"length": len(value), "first": items}


def _lines(document: dict[str, Any], *, with_tensors: bool) -> list[str]:
    def row(name: str, value: object) -> str:
        text = str(value).replace("\n", "\\n")
        return f"{name:>24}  {text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + '...'}"

    lines = [row("file", document["path"]), row("kind", document["kind"])]
    lines.append(row("parameters", f"{document['parameters']:,}"))
    bits = document["bits_per_weight"]
    size = f"{document['tensor_bytes']:,} bytes in tensors"
    lines.append(row("size", size if bits is None else f"{size}, {bits:.2f} bits per weight"))
    for name, count in document["formats"].items():
        lines.append(
            row(
                name,
                f"{count['tensors']} tensors, {count['parameters']:,} parameters, {count['bytes']:,} bytes",
            )
        )
    for section in ("config", "tokenizer"):
        if document[section]:
            lines += ["", section]
            lines += [row(key, value) for key, value in document[section].items() if value is not None]
    lines += ["", "metadata"] + [row(key, value) for key, value in document["metadata"].items()]
    if with_tensors:
        lines += ["", "tensors"]
        lines += [
            f"{t['name']:>44}  {t['format']:<5} {t['bytes']:>12,} bytes  {' x '.join(map(str, t['shape']))}"
            for t in document["tensors"]
        ]
    lines += [row("problem", problem) for problem in document["problems"]]
    return lines
