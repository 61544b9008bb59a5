"""`ridgeline synth`: a model file of any shape with seeded random weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ridgeline.models.synth import synthesize


def synth(
    *,
    like: str,
    output: Annotated[Path, Parameter(alias="-o")],
    format: str = "Q4_0",
    seed: int = 0,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int | None = None,
    max_position: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
) -> None:
    """Write a model of seeded random weights, for tests and for measuring shapes we have no weights of.

    Examples:

        ridgeline synth --like llama-1b --format Q4_0 --seed 0 -o llama-1b.gguf

        ridgeline synth --like llama-8b --num-layers 2 --format Q4_K -o two-layers.gguf

        ridgeline synth --like tiny-gemma3 --format BF16 -o ./tiny-gemma3

    Parameters
    ----------
    like
        The shape: llama-1b, llama-7b, llama-8b, smollm2-135m, gemma3-270m, tiny-llama or tiny-gemma3.
    output
        A GGUF file where the name ends in .gguf, else a Hugging Face directory.
    format
        Format of the matrices: F32, F16, BF16; in a GGUF file also Q4_0 to Q8_0 and Q2_K to Q6_K. Rows that
        are no whole blocks get the format that such files fall back to.
    seed
        The same seed gives the same bytes.
    num_layers
        Replaces the number that the shape has; so do the sizes below.
    """
    sizes = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "max_position": max_position,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
    }
    overrides = {name: size for name, size in sizes.items() if size is not None}
    synthesize(like, format, seed=seed, path=output, **overrides)
    sys.stdout.write(f"{output}\n")
