"""Importance matrices in the GGUF form of llama-imatrix: how much each input column of a tensor matters.

A file holds for every tensor the sum over tokens of x² of each column (`NAME.in_sum2`) and the number of
tokens (`NAME.counts`); the importance is their quotient, the mean of x². Source: llama.cpp tools/imatrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.checkpoint.gguf_write import GGUFValue, TensorSource, write_gguf
from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import FORMATS

_SUMS, _COUNTS = ".in_sum2", ".counts"
CHUNK_TOKENS = 512
"""llama-imatrix's default context; the file says how many such chunks there were."""

Columns = npt.NDArray[np.float32]


def write_imatrix(
    path: str | Path, importance: Mapping[str, Columns], *, num_tokens: int, datasets: Sequence[str] = ()
) -> None:
    """importance: mean x² over `num_tokens` tokens, float32 [K], by the tensor's name in GGUF files."""
    if num_tokens < 1 or not importance:
        raise CheckpointError(
            f"{path}: an importance matrix of {num_tokens} tokens; calibrate on a text first"
        )
    sources: list[TensorSource] = []
    for name in sorted(importance):
        mean = np.asarray(importance[name], np.float32)
        counts = np.array([[num_tokens]], np.float32)
        sums = (mean.astype(np.float64) * num_tokens).astype(np.float32)[None, :]
        sources.append(TensorSource(name + _SUMS, FORMATS["F32"], sums.shape, [sums]))
        sources.append(TensorSource(name + _COUNTS, FORMATS["F32"], counts.shape, [counts]))
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": GGUFValue(list(datasets), "string"),
        "imatrix.chunk_count": max(1, num_tokens // CHUNK_TOKENS),
        "imatrix.chunk_size": CHUNK_TOKENS,
    }
    write_gguf(path, metadata, sources)


def read_imatrix(path: str | Path) -> dict[str, Columns]:
    """Mean x² float32 [K] by the tensor's name in GGUF files. Raises CheckpointError."""
    checkpoint = read_gguf(path)
    if checkpoint.metadata.get("general.type") != "imatrix":
        raise CheckpointError(
            f"{path}: expected an importance matrix, whose general.type is 'imatrix', found "
            f"{checkpoint.metadata.get('general.type')!r}; make one with llama-imatrix or ridgeline quantize"
        )
    found: dict[str, Columns] = {}
    for stored in checkpoint.tensors:
        if not stored.endswith(_SUMS):
            continue
        name = stored.removesuffix(_SUMS)
        sums = checkpoint.weight(stored).dequantize()
        counts = checkpoint.weight(name + _COUNTS).dequantize().reshape(-1)
        if sums.reshape(-1, sums.shape[-1]).shape[0] != 1 or counts.size != 1:
            raise CheckpointError(
                f"{path}: {name!r} has {counts.size} experts; only dense models are supported"
            )
        # A tensor that no token reached says nothing.
        mean = sums.reshape(-1) / counts if counts[0] > 0 else np.ones(sums.size, np.float32)
        if not (np.isfinite(mean).all() and (mean >= 0).all()):
            raise CheckpointError(
                f"{path}: {name!r} has sums that are no finite squares; make the file again"
            )
        found[name] = mean.astype(np.float32)
    if not found:
        raise CheckpointError(
            f"{path}: expected tensors that end in {_SUMS}, found none; make the file again"
        )
    return found
