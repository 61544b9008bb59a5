"""A model as a GGUF file that llama.cpp reads: the inverse of loading one.

Metadata of a GGUF source is copied value for value; of a Hugging Face directory it is made from the config
and tokenizer.json. Rows of q and k go back into the order of interleaved RoPE where the architecture has it
so, norms get their offset, llama3 scaling becomes a tensor of divisors. Tensors follow in the order of
llama-quantize: the same weights in the same formats from the same source are the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.checkpoint.checkpoint import Checkpoint
from ridgeline.checkpoint.gguf import GGUFCheckpoint, StoredValue
from ridgeline.checkpoint.gguf_write import GGUFValue, TensorSource, write_gguf
from ridgeline.config import ModelConfig
from ridgeline.errors import CheckpointError
from ridgeline.logs import logger
from ridgeline.models.gguf_mix import file_type_of
from ridgeline.models.load import LoadedModel
from ridgeline.models.registry import SPECS, expected_shapes
from ridgeline.models.rope import rope_frequencies
from ridgeline.models.surgery import permute
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight
from ridgeline.tokenizer.to_gguf import gguf_vocabulary

QUANTIZATION_VERSION = 2


def save_gguf(
    model: LoadedModel,
    path: str | Path,
    *,
    file_type: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `path`, which appears when it is complete.

    file_type: llama.cpp's number of the mix; None: of the mix that has these formats. metadata: more keys,
    or others. Raises CheckpointError for what GGUF cannot state: formats of ours, rounded activations,
    a config that its keys do not cover.
    """
    spec = SPECS[model.config.arch]
    stated = _metadata(model, Path(path))
    if file_type is None:
        file_type = file_type_of(model)
    for key, value in {
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": file_type,
        **(metadata or {}),
    }.items():
        stated.pop(key, None)
        stated[key] = value

    sources = [
        _source(model.weights[name], spec.names.to_gguf(name), model.config, permuted=spec.gguf_permuted)
        for name in expected_shapes(model.config)
    ]
    if (divisors := rope_divisors(model.config)) is not None:
        sources.append(TensorSource("rope_freqs.weight", FORMATS["F32"], divisors.shape, [divisors]))
    write_gguf(path, stated, sorted(sources, key=lambda source: _order(source.name)))


def rope_divisors(config: ModelConfig) -> npt.NDArray[np.float32] | None:
    """What llama3 scaling divides each frequency by [rotary_dim / 2], which GGUF files hold as a tensor."""
    rope = config.rope
    if rope.freq_divisors:
        return np.array(rope.freq_divisors, np.float32)
    if rope.rope_type != "llama3":
        return None
    options = {"max_position": config.max_position, "max_model_len": config.max_position}
    plain, _ = rope_frequencies(replace(rope, rope_type="default"), **options)
    scaled, _ = rope_frequencies(rope, **options)
    return (plain / scaled).astype(np.float32)


def _metadata(model: LoadedModel, path: Path) -> dict[str, Any]:
    """Everything but the file type. What is returned states `model.config`, or CheckpointError."""
    config, checkpoint = model.config, model.checkpoint
    spec = SPECS[config.arch]
    if isinstance(checkpoint, GGUFCheckpoint):
        stored: dict[str, Any] = dict(checkpoint.stored_metadata())
        stated = {key: value for key, value in stored.items() if not key.startswith("split.")}
        plain = {key: checkpoint.metadata[key] for key in stated}
        if _differences(model, plain, path):  # changed while it was loaded
            stated |= spec.config_to_gguf(config)
    else:
        stated = {"general.architecture": config.arch, "general.name": _name_of(checkpoint, path)}
        stated |= spec.config_to_gguf(config)
        if checkpoint is not None:
            stated |= gguf_vocabulary(checkpoint.path, vocab_size=config.vocab_size)
        stated |= _stop_tokens(config, stated.get("tokenizer.ggml.eos_token_id"))
        plain = stated
    plain = plain | {key: value for key, value in stated.items() if not isinstance(value, StoredValue)}
    if different := _differences(model, plain, path):
        raise CheckpointError(
            f"{path}: a GGUF file of {config.arch} cannot state this model's {', '.join(different)}; save it "
            "as a Hugging Face directory, or load it without the options that change it"
        )
    return stated


def _stop_tokens(config: ModelConfig, eos: int | None) -> dict[str, int]:
    """End of text is the tokenizer's, or the first that the config names; another one is end of turn."""
    ends = [i for i in config.eos_token_ids if i != eos]
    stated = {"tokenizer.ggml.eos_token_id": ends.pop(0)} if eos is None and ends else {}
    if ends:
        stated["tokenizer.ggml.eot_token_id"] = ends[0]
    if ends[1:]:
        logger.warning("a GGUF file has room for two stop tokens; left out: %s", ends[1:])
    return stated


def _differences(model: LoadedModel, metadata: Mapping[str, Any], path: Path) -> list[str]:
    """Fields of the config that a reader of `metadata` would get wrong."""
    plain = {key: value.value if isinstance(value, GGUFValue) else value for key, value in metadata.items()}
    names = frozenset() if model.config.tie_embeddings else frozenset({"output.weight"})
    read = SPECS[model.config.arch].config_from_gguf(plain, file=str(path), tensors=names)
    wanted = model.config
    # Divisors are a tensor, norms are written with their offset, stop tokens are those of the vocabulary.
    rope = replace(read.rope, freq_divisors=wanted.rope.freq_divisors)
    if wanted.rope.rope_type == "llama3":
        rope = wanted.rope
    read = replace(read, rope=rope, norm_offset=wanted.norm_offset, eos_token_ids=wanted.eos_token_ids)
    return [f.name for f in fields(wanted) if not _same(getattr(read, f.name), getattr(wanted, f.name))]


def _same(read: object, wanted: object) -> bool:
    """Equal, floats as the file's float32."""
    if isinstance(read, float) and isinstance(wanted, float):
        return bool(np.float32(read) == np.float32(wanted))
    return read == wanted


def _source(weight: Weight, name: str, config: ModelConfig, *, permuted: bool) -> TensorSource:
    if weight.format.ggml_type is None or weight.activation is not None or "order" in weight.buffers:
        what = weight.format.name + (" with rounded activations" if weight.activation else "")
        raise CheckpointError(
            f"{weight.name} is {what}, which a GGUF file cannot hold; choose a recipe such as Q4_K_M, or "
            "another kind of checkpoint"
        )
    if len(weight.shape) == 1 and weight.format.name != "F32":
        weight = weight.converted(FORMATS["F32"])
    if "norm" in weight.name and config.norm_offset:
        values = weight.dequantize() + np.float32(config.norm_offset)
        weight = replace(weight, buffers={"data": values})
    if permuted and (".q_proj" in weight.name or ".k_proj" in weight.name):
        num_heads = config.num_heads if ".q_proj" in weight.name else config.num_kv_heads
        weight = permute(weight, num_heads=num_heads)
    return TensorSource(name, weight.format, weight.shape, [weight.data])


def _order(name: str) -> tuple[int, bytes]:
    layer = name.split(".")[1] if name.startswith("blk.") else "-1"
    return int(layer), name.encode()


def _name_of(checkpoint: Checkpoint | None, path: Path) -> str:
    return (path.stem if checkpoint is None else checkpoint.path.name) or path.stem
