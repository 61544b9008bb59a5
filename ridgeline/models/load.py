"""From a file to a model: its config, its weights by canonical name, memory-mapped and checked.

Every tensor that the config calls for must be there with the shape that follows from it. Only what a load
option or the file's row order forces is copied; all else stays a view of the mapped file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ridgeline.checkpoint.checkpoint import Checkpoint, missing_tensor
from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.checkpoint.safetensors import read_hf, read_json
from ridgeline.config import LoadConfig, ModelConfig
from ridgeline.errors import CheckpointError
from ridgeline.logs import logger
from ridgeline.models.registry import ModelSpec, expected_shapes, spec_for
from ridgeline.models.surgery import change_config, change_kv_heads, unpermute
from ridgeline.quant.formats import FORMATS, QuantFormat
from ridgeline.quant.weight import Weight

IGNORED_TENSORS = ("rope_freqs.weight", "rotary_emb.inv_freq", "output_norm_enc.weight")
"""Tensors that are read elsewhere or hold nothing that the config does not say."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model as data: nothing here belongs to a tensor library."""

    config: ModelConfig
    weights: Mapping[str, Weight]
    """By canonical name; lm_head is the same object as embed_tokens where they are tied."""
    checkpoint: Checkpoint | None
    """None for a model that was made in memory."""

    def without_data(self) -> LoadedModel:
        """Shapes and formats only, for who has taken the values."""
        bare = {id(weight): weight.without_data() for weight in self.weights.values()}
        return replace(self, weights={name: bare[id(weight)] for name, weight in self.weights.items()})


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face directory. Raises CheckpointError, ModelNotFoundError."""
    path = Path(path)
    return read_hf(path) if path.is_dir() else read_gguf(path)


def load_model(path: str | Path, load: LoadConfig | None = None) -> LoadedModel:
    """Map a model and apply the load options.

    Raises CheckpointError naming file and tensor when one is missing or has the wrong shape.
    """
    checkpoint = open_checkpoint(path)
    file = str(checkpoint.path)
    spec = spec_for(checkpoint.kind, checkpoint.metadata, file=file)
    original = _read_config(checkpoint, spec, file)
    weights = _read_weights(checkpoint, spec, original)
    if original.tie_embeddings:
        weights["lm_head"] = weights["embed_tokens"]
    config = change_config(original, load or LoadConfig())
    for name in list(weights):
        if ".k_proj" in name or ".v_proj" in name:
            weights[name] = change_kv_heads(
                weights[name], current=original.num_kv_heads, wanted=config.num_kv_heads
            )
    return LoadedModel(config, weights, checkpoint)


def describe_model(path: str | Path, load: LoadConfig | None = None) -> LoadedModel:
    """A model without its values: config, shapes and formats, from headers alone.

    A GGUF file may end after its header; of a Hugging Face model config.json is enough, whose `torch_dtype`
    (`dtype`) is then the format of all weights. Raises CheckpointError, ModelNotFoundError.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        path = path.parent
    formats: dict[str, QuantFormat] = {}
    checkpoint: Checkpoint | None = None
    if path.is_dir() and not any(path.glob("*.safetensors")):
        metadata = read_json(path / "config.json")
        spec = spec_for("hf", metadata, file=str(path))
        original = spec.config_from_hf(metadata, file=str(path / "config.json"))
        dtype = str(metadata.get("dtype", metadata.get("torch_dtype", "bfloat16")))
        default = FORMATS[{"float32": "F32", "float16": "F16"}.get(dtype, "BF16")]
    else:
        checkpoint = read_hf(path) if path.is_dir() else read_gguf(path, header_only=True)
        spec = spec_for(checkpoint.kind, checkpoint.metadata, file=str(path))
        original = _read_config(checkpoint, spec, str(path), with_data=False)
        prefix, is_gguf = _hf_prefix(checkpoint), checkpoint.kind == "gguf"
        for name in expected_shapes(original):
            stored = _stored_name(spec, name, is_gguf=is_gguf, prefix=prefix)
            if stored not in checkpoint.tensors:
                raise missing_tensor(checkpoint.path, stored, checkpoint.tensors)
            formats[name] = checkpoint.tensors[stored].format
        default = FORMATS["F32"]
    config = change_config(original, load or LoadConfig())
    weights = {
        name: Weight(name, formats.get(name, default), shape, {})
        for name, shape in expected_shapes(config).items()
    }
    if original.tie_embeddings:
        weights["lm_head"] = weights["embed_tokens"]
    return LoadedModel(config, weights, checkpoint)


def _read_config(
    checkpoint: Checkpoint, spec: ModelSpec, file: str, *, with_data: bool = True
) -> ModelConfig:
    if checkpoint.kind == "hf":
        config = spec.config_from_hf(checkpoint.metadata, file=f"{file}/config.json")
    else:
        names = frozenset(checkpoint.tensors)
        config = spec.config_from_gguf(checkpoint.metadata, file=file, tensors=names)
        if with_data and "rope_freqs.weight" in names:
            divisors = checkpoint.weight("rope_freqs.weight").dequantize()
            expected = (config.rope.rotary_dim // 2,)
            if divisors.shape != expected or not np.all((divisors > 0) & np.isfinite(divisors)):
                raise CheckpointError(
                    f"{file}: tensor 'rope_freqs.weight' of shape {divisors.shape}: expected {expected} "
                    "numbers above 0"
                )
            rope = replace(config.rope, freq_divisors=tuple(float(d) for d in divisors))
            config = replace(config, rope=rope)
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{file}: {config.num_heads} query heads are not a multiple of {config.num_kv_heads} KV heads"
        )
    for rope in (config.rope, config.rope_local or config.rope):
        if not 4 <= rope.rotary_dim <= config.head_dim or rope.rotary_dim % 2:
            raise CheckpointError(
                f"{file}: RoPE rotates {rope.rotary_dim} of {config.head_dim} features; expected an even "
                "number from 4 to as many as there are"
            )
    return config


def _read_weights(checkpoint: Checkpoint, spec: ModelSpec, config: ModelConfig) -> dict[str, Weight]:
    file, is_gguf = str(checkpoint.path), checkpoint.kind == "gguf"
    shapes = expected_shapes(config)
    prefix = _hf_prefix(checkpoint)
    weights: dict[str, Weight] = {}
    used: set[str] = set()
    for name, shape in shapes.items():
        stored = _stored_name(spec, name, is_gguf=is_gguf, prefix=prefix)
        if stored not in checkpoint.tensors:
            raise missing_tensor(checkpoint.path, stored, checkpoint.tensors)
        found = checkpoint.tensors[stored].shape
        if found != shape:
            raise CheckpointError(f"{file}: tensor {stored!r} has shape {found}; the config says {shape}")
        used.add(stored)
        weight = checkpoint.weight(stored)
        if is_gguf and spec.gguf_permuted and (".q_proj" in name or ".k_proj" in name):
            num_heads = config.num_heads if ".q_proj" in name else config.num_kv_heads
            weight = unpermute(weight, num_heads=num_heads)
        weights[name] = replace(weight, name=name)
    _check_unused(checkpoint, [n for n in checkpoint.tensors if n not in used], config)
    return weights


def _check_unused(checkpoint: Checkpoint, names: list[str], config: ModelConfig) -> None:
    """A bias that the decoder would not add is an error, other tensors are worth a warning."""
    for name in names:
        if name.endswith(".bias") and np.any(checkpoint.weight(name).data):
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r} is a bias that is not supported here")
    tied_head = ("lm_head.weight",) if config.tie_embeddings else ()
    names = [n for n in names if not n.endswith((*IGNORED_TENSORS, *tied_head, ".bias"))]
    if names:
        logger.warning(
            "%s: %d tensors are not used, such as %s", checkpoint.path, len(names), ", ".join(names[:3])
        )


def _stored_name(spec: ModelSpec, name: str, *, is_gguf: bool, prefix: str) -> str:
    """What the file calls a weight."""
    if is_gguf:
        return spec.names.to_gguf(name)
    stored = spec.names.to_hf(name)
    return prefix + stored.removeprefix("model.") if stored.startswith("model.") else stored


def _hf_prefix(checkpoint: Checkpoint) -> str:
    """Multimodal checkpoints keep the text model one level down."""
    for prefix in ("language_model.model.", "model.language_model."):
        if any(name.startswith(prefix) for name in checkpoint.tensors):
            return prefix
    return "model."
