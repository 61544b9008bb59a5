"""From a file to a model: its config, its weights by canonical name, memory-mapped and checked.

Every tensor that the config calls for must be there with the shape that follows from it. Only what a load
option or the file's row order forces is copied; all else stays a view of the mapped file. The quantized
linears of a Hugging Face directory become rows of group blocks, one tensor after the other, never floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ridgeline.checkpoint.checkpoint import INTEGERS, Checkpoint, missing_tensor
from ridgeline.checkpoint.gguf import read_gguf
from ridgeline.checkpoint.quant_config import CODES, SUFFIXES, quant_scheme
from ridgeline.checkpoint.safetensors import HFCheckpoint, read_hf, read_json
from ridgeline.checkpoint.stored import Parts, QuantScheme, StoredLinear
from ridgeline.config import LoadConfig, ModelConfig
from ridgeline.distributed.groups import Shard
from ridgeline.errors import CheckpointError
from ridgeline.logs import logger
from ridgeline.models.registry import ModelSpec, expected_shapes, spec_for
from ridgeline.models.surgery import change_config, change_kv_heads, unpermute
from ridgeline.ops.packing import give_back
from ridgeline.quant.formats import FORMATS
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
    shard: Shard | None = None
    """Which part of the model this is; None: all of it. `config` and `weights` are those of the part."""

    def without_data(self) -> LoadedModel:
        """Shapes and formats only, for who has taken the values."""
        bare = {id(weight): weight.without_data() for weight in self.weights.values()}
        return replace(self, weights={name: bare[id(weight)] for name, weight in self.weights.items()})


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face directory. Raises CheckpointError, ModelNotFoundError."""
    path = Path(path)
    return read_hf(path) if path.is_dir() else read_gguf(path)


class WeightPart(Protocol):
    """What is taken of a model's weights as they are read."""

    def wants(self, name: str) -> bool: ...

    def cut(self, weight: Weight) -> Weight: ...


def load_model(
    path: str | Path, load: LoadConfig | None = None, *, part: WeightPart | None = None
) -> LoadedModel:
    """Map a model and apply the load options; of its weights only `part`, if that is given.

    Raises CheckpointError naming file and tensor when one is missing or has the wrong shape.
    """
    checkpoint = open_checkpoint(path)
    file = str(checkpoint.path)
    spec = spec_for(checkpoint.kind, checkpoint.metadata, file=file)
    original = _read_config(checkpoint, spec, file)
    config = change_config(original, load or LoadConfig())
    weights = _read_weights(checkpoint, spec, original, config, part)
    if original.tie_embeddings and "embed_tokens" in weights:
        weights["lm_head"] = weights["embed_tokens"]
    return LoadedModel(config, weights, checkpoint)


def describe_model(path: str | Path, load: LoadConfig | None = None) -> LoadedModel:
    """A model without its values: config, shapes and formats, from headers alone.

    A GGUF file may end after its header; of a Hugging Face model config.json is enough, whose `torch_dtype`
    (`dtype`) is then the format of all weights. Of quantized linears scales and zero points are read too: the
    format depends on them. Raises CheckpointError, ModelNotFoundError.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        path = path.parent
    known: dict[str, Weight] = {}
    checkpoint: Checkpoint | None = None
    if path.is_dir() and not any(path.glob("*.safetensors")):
        metadata = read_json(path / "config.json")
        spec = spec_for("hf", metadata, file=str(path))
        if quant_scheme(path, metadata) is not None:
            raise CheckpointError(
                f"{path}: expected the *.safetensors files of a quantized model, found config.json only; the "
                "formats of its weights depend on what they hold"
            )
        original = spec.config_from_hf(metadata, file=str(path / "config.json"))
        dtype = str(metadata.get("dtype", metadata.get("torch_dtype", "bfloat16")))
        default = FORMATS[{"float32": "F32", "float16": "F16"}.get(dtype, "BF16")]
    else:
        checkpoint = read_hf(path) if path.is_dir() else read_gguf(path, header_only=True)
        spec = spec_for(checkpoint.kind, checkpoint.metadata, file=str(path))
        original = _read_config(checkpoint, spec, str(path), with_data=False)
        for name, found in _Tensors.of(checkpoint, spec).all(original):
            if isinstance(found, StoredLinear):
                known[name] = Weight(name, found.format, found.shape, {}, found.activation)
            else:
                known[name] = Weight(name, checkpoint.tensors[found].format, (), {})
        default = FORMATS["F32"]
    config = change_config(original, load or LoadConfig())
    weights = {
        name: replace(known.get(name) or Weight(name, default, (), {}), shape=shape)
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
        codes = [checkpoint.tensors.get(f"lm_head.{suffix}") for suffix in CODES]
        if any(entry is not None and entry.format.name in INTEGERS for entry in codes):
            config = replace(config, tie_embeddings=False)  # quantized apart from the embedding
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


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What a file calls each weight, and how its linears are quantized."""

    checkpoint: Checkpoint
    spec: ModelSpec
    prefix: str
    scheme: QuantScheme | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, spec: ModelSpec) -> _Tensors:
        scheme = None if checkpoint.kind == "gguf" else quant_scheme(checkpoint.path, checkpoint.metadata)
        return cls(checkpoint, spec, _hf_prefix(checkpoint), scheme)

    def all(self, config: ModelConfig) -> Iterator[tuple[str, StoredLinear | str]]:
        """Every weight that the config calls for: a quantized linear, or the name of its tensor."""
        path, tensors = self.checkpoint.path, self.checkpoint.tensors
        for name, shape in expected_shapes(config).items():
            stored = self._stored_name(name)
            linear = self._linear(stored) if len(shape) == 2 else None
            if linear is None and stored not in tensors:
                raise missing_tensor(path, stored, tensors)
            found = tensors[stored].shape if linear is None else linear.shape
            if found != shape:
                raise CheckpointError(f"{path}: tensor {stored!r} has shape {found}; the config says {shape}")
            yield name, stored if linear is None else linear

    def parts_of(self, name: str) -> list[str]:
        """Names of the tensors that make up a weight."""
        module = self._stored_name(name).removesuffix(".weight")
        return [n for n in (f"{module}.{suffix}" for suffix in SUFFIXES) if n in self.checkpoint.tensors]

    def _linear(self, stored: str) -> StoredLinear | None:
        if self.scheme is None or not isinstance(self.checkpoint, HFCheckpoint):
            return None
        return self.scheme.read(
            Parts(self.checkpoint, stored.removesuffix(".weight"), str(self.checkpoint.path))
        )

    def _stored_name(self, name: str) -> str:
        if self.checkpoint.kind == "gguf":
            return self.spec.names.to_gguf(name)
        stored = self.spec.names.to_hf(name)
        return self.prefix + stored.removeprefix("model.") if stored.startswith("model.") else stored


def _read_weights(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    config: ModelConfig,
    wanted: ModelConfig,
    part: WeightPart | None,
) -> dict[str, Weight]:
    """`config`: of the file; `wanted`: after the load options."""
    tensors = _Tensors.of(checkpoint, spec)
    permuted = checkpoint.kind == "gguf" and spec.gguf_permuted
    weights: dict[str, Weight] = {}
    used: set[str] = set()
    for name, found in tensors.all(config):
        used.update(tensors.parts_of(name) if isinstance(found, StoredLinear) else [found])
        if part is not None and not part.wants(name):
            continue
        if isinstance(found, StoredLinear):
            assert isinstance(checkpoint, HFCheckpoint)
            weight = found.weight(name)
            for stored in tensors.parts_of(name):
                give_back(checkpoint.array(stored))
        else:
            weight = replace(checkpoint.weight(found), name=name)
        if permuted and (".q_proj" in name or ".k_proj" in name):
            num_heads = config.num_heads if ".q_proj" in name else config.num_kv_heads
            weight = unpermute(weight, num_heads=num_heads)
        if ".k_proj" in name or ".v_proj" in name:
            weight = change_kv_heads(weight, current=config.num_kv_heads, wanted=wanted.num_kv_heads)
        weights[name] = weight if part is None else part.cut(weight)
    _check_unused(checkpoint, [n for n in checkpoint.tensors if n not in used], config)
    return weights


def _check_unused(checkpoint: Checkpoint, names: list[str], config: ModelConfig) -> None:
    """A bias that the decoder would not add is an error, other tensors are worth a warning."""
    for name in names:
        if name.endswith(".bias") and np.any(checkpoint.weight(name).data):
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r} is a bias that is not supported here")
    tied_head = tuple(f"lm_head.{suffix}" for suffix in SUFFIXES) if config.tie_embeddings else ()
    names = [n for n in names if not n.endswith((*IGNORED_TENSORS, *tied_head, ".bias"))]
    if names:
        logger.warning(
            "%s: %d tensors are not used, such as %s", checkpoint.path, len(names), ", ".join(names[:3])
        )


def _hf_prefix(checkpoint: Checkpoint) -> str:
    """Multimodal checkpoints keep the text model one level down."""
    for prefix in ("language_model.model.", "model.language_model."):
        if any(name.startswith(prefix) for name in checkpoint.tensors):
            return prefix
    return "model."
