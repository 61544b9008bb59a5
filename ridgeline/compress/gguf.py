"""GGUF recipes: formats by llama-quantize's rules, encoders that match its bytes, importance from a file.

Importance goes by canonical names here, by GGUF names in imatrix files. llama-imatrix sees a tied head under
the embedding's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ridgeline.checkpoint.imatrix import read_imatrix, write_imatrix
from ridgeline.errors import CheckpointError
from ridgeline.models.gguf_mix import MIXES, gguf_formats, mix_named
from ridgeline.models.load import LoadedModel
from ridgeline.models.registry import SPECS
from ridgeline.quant.weight import Weight

__all__ = ["MIXES", "gguf_formats", "mix_named", "quantize_to_mix", "read_importance", "write_importance"]

Columns = npt.NDArray[np.float32]


def quantize_to_mix(
    model: LoadedModel,
    mix: str,
    *,
    importance: Mapping[str, Columns] | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> LoadedModel:
    """The model in the formats of `mix`; tensors that have them already are left as they are.

    importance: mean x² of each input column, float32 [K], by canonical name; a tensor without has none.
    """
    formats = gguf_formats(model, mix, has_importance=bool(importance))
    converted: dict[int, Weight] = {}
    weights: dict[str, Weight] = {}
    for done, (name, weight) in enumerate(model.weights.items()):
        if on_progress is not None:
            on_progress(done, len(model.weights), name)
        if id(weight) not in converted:
            columns = (importance or {}).get(name)
            converted[id(weight)] = weight.converted(formats[name], importance=columns)
        weights[name] = converted[id(weight)]
    return replace(model, weights=weights)


def write_importance(
    model: LoadedModel,
    importance: Mapping[str, Columns],
    path: str | Path,
    *,
    num_tokens: int,
    datasets: Sequence[str] = (),
) -> None:
    """A file for `llama-quantize --imatrix`."""
    to_gguf = SPECS[model.config.arch].names.to_gguf
    named = {to_gguf(name): columns for name, columns in importance.items() if name in model.weights}
    if model.config.tie_embeddings:
        named.pop(to_gguf("lm_head"), None)
    write_imatrix(path, named, num_tokens=num_tokens, datasets=datasets)


def read_importance(model: LoadedModel, path: str | Path) -> dict[str, Columns]:
    """By canonical name. Raises CheckpointError for a file of another model."""
    from_gguf = SPECS[model.config.arch].names.from_gguf
    found: dict[str, Columns] = {}
    for stored, columns in read_imatrix(path).items():
        name = from_gguf(stored)
        weight = model.weights.get(name or "")
        if name is None or weight is None or weight.shape[-1:] != columns.shape:
            expected = "no such tensor" if weight is None else f"{weight.shape[-1]} columns"
            raise CheckpointError(
                f"{path}: importance of {columns.size} columns for {stored!r}, but the model has {expected}; "
                "give the file that was made from this model"
            )
        found[name] = columns
    if model.config.tie_embeddings and "embed_tokens" in found:
        found["lm_head"] = found["embed_tokens"]
    return found
