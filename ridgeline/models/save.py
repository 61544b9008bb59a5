"""From a model in memory to files: GGUF, or a plain, GPTQ, AWQ, compressed-tensors or bitsandbytes directory.

Integers go into the file as they are: `load_model` reads back the same codes, scales and zero points.
A matrix that the kind cannot hold is written as floats, with one line that says so; where that would change
what the model computes (rounded inputs), nothing is written. A directory appears when it is complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ridgeline.checkpoint.gptq import Version
from ridgeline.checkpoint.safetensors import DTYPES, INDEX, write_safetensors
from ridgeline.checkpoint.writers import AWQWriter, CTWriter, GPTQWriter, Int8Writer, Writer, exact_groups
from ridgeline.config import ModelConfig
from ridgeline.errors import CheckpointError, ConfigError
from ridgeline.logs import logger
from ridgeline.models.load import LoadedModel
from ridgeline.models.registry import SPECS, ModelSpec
from ridgeline.models.rope import rope_frequencies
from ridgeline.models.save_gguf import save_gguf
from ridgeline.quant.formats import FORMATS, Array, QuantFormat
from ridgeline.quant.gguf_blocks import quantize
from ridgeline.quant.weight import Weight
from ridgeline.tokenizer.export import export_tokenizer

Kind = Literal["gguf", "hf", "gptq", "awq", "compressed-tensors", "bitsandbytes"]
FloatFormat = Literal["F32", "F16", "BF16"]
_HF_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SHARD_BYTES = 1 << 30
"""A file is written when it has so many bytes, which is what is held in memory."""
_LLAMA3_RANGES = ((1.0, 4.0, 8192),)
"""low_freq_factor, high_freq_factor and original length of the Llama 3 models there are."""


def save_model(
    model: LoadedModel,
    path: str | Path,
    *,
    kind: Kind,
    dtype: FloatFormat | None = None,
    gptq_version: Version | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what `load_model` and the kind's own programs read: a file for "gguf", else a directory.

    dtype: of the matrices that are written as floats; None: as they are, others F16 (F32 for kind "hf").
    gptq_version: 1 or 2; None: 1, but 2 for a model with zero points of 0. overwrite: replace the directory
    if it is there. Raises CheckpointError for what the kind cannot state, ConfigError for a path in use.
    """
    path = Path(path)
    if kind == "gguf" and path.is_dir():
        raise ConfigError(f"{path} is a directory; a GGUF model is one file, such as {path.name}.gguf")
    in_use = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if in_use and not overwrite:
        raise ConfigError(f"{path} is there already; give another path, or overwrite it")
    if kind == "gguf":
        save_gguf(model, path)
        return path
    spec = SPECS[model.config.arch]
    config, hf_config = _hf_config(model, spec)
    linears = {
        _module(spec, name): weight for name, weight in _stored(model).items() if len(weight.shape) == 2
    }
    tied = model.weights["lm_head"] is model.weights["embed_tokens"]
    writer = _writer(kind, linears, version=gptq_version, tied=tied)
    plan = _Plan(spec, writer, kind, dtype, _norm_shift(model.config, config))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir(parents=True)
    try:
        _write_shards(temporary, plan.tensors(model))
        hf_config |= {"dtype": _stated_dtype(linears)} | plan.quantization_config()
        _write_json(temporary / "config.json", hf_config)
        _write_generation_config(model, hf_config, temporary)
        if model.checkpoint is None or not export_tokenizer(model.checkpoint, temporary):
            logger.info("%s: written without a tokenizer, since the model came without", path)
        if in_use:
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.replace(aside)
            temporary.replace(path)
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _writer(
    kind: Kind, linears: Mapping[str, Weight], *, version: Version | None, tied: bool
) -> Writer | None:
    match kind:
        case "gptq":
            return GPTQWriter(linears, version=version)
        case "awq":
            return AWQWriter(linears)
        case "compressed-tensors":
            return CTWriter(tied=tied)
        case "bitsandbytes":
            return Int8Writer(linears)
        case "hf":
            return None
    raise ConfigError(f"kind={kind!r}: expected gguf, hf, gptq, awq, compressed-tensors or bitsandbytes")


@dataclass(slots=True)
class _Plan:
    """Owner of what became of each weight while the tensors are made one by one."""

    spec: ModelSpec
    writer: Writer | None
    kind: Kind
    dtype: FloatFormat | None
    norm_shift: float
    num_held: int = 0
    plain: list[str] = field(default_factory=list)
    """Modules that are linears and hold floats."""
    reasons: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def tensors(self, model: LoadedModel) -> Iterator[tuple[str, QuantFormat, Array]]:
        for name, weight in _stored(model).items():
            module = _module(self.spec, name)
            parts = self._integers(module, name, weight) if len(weight.shape) == 2 else None
            if parts is not None:
                for stored, array in parts.items():
                    yield stored, _format_of(array), array
                continue
            fmt, values = self._floats(name, weight)
            if len(weight.shape) == 2 and name != "embed_tokens":
                self.plain.append(module)
            yield self.spec.names.to_hf(name), fmt, values
        for reason, names in self.reasons.items():
            logger.info(
                "%d of the matrices are written as floats, since %s: %s",
                len(names),
                reason,
                ", ".join(names[:3]),
            )
        if self.writer is not None and not self.num_held:
            what = "; ".join(self.reasons) or "none of them is in integers: quantize first"
            raise CheckpointError(f"no matrix of this model can be stored as {self.kind}: {what}")

    def quantization_config(self) -> dict[str, Any]:
        return {} if self.writer is None else {"quantization_config": self.writer.config(self.plain)}

    def _integers(self, module: str, name: str, weight: Weight) -> dict[str, Array] | None:
        """The parts of a quantized linear, or None if it becomes floats."""
        groups = None if self.writer is None else exact_groups(weight)
        if self.writer is None or groups is None:
            is_float = weight.format.name in _HF_DTYPES
            reason = None if is_float else f"{weight.format.name} has no form in {self.kind}"
        elif weight.activation is not None and (name == "embed_tokens" or self.kind in ("gptq", "awq")):
            reason = ""
        elif name == "embed_tokens" and self.kind != "compressed-tensors":
            reason = f"{self.kind} has no quantized embedding"
        else:
            reason = self.writer.refusal(module, weight, groups)
            if reason is None:
                self.num_held += 1
                return self.writer.tensors(module, weight, groups)
        if weight.activation is not None:
            where = f" where {reason}" if reason else ""
            raise CheckpointError(
                f"{name}: its inputs are rounded, which {self.kind} cannot state{where}; write "
                "compressed-tensors, or bitsandbytes for LLM.int8()"
            )
        if reason is not None:
            self.reasons[reason].append(name)
        return None

    def _floats(self, name: str, weight: Weight) -> tuple[QuantFormat, Array]:
        is_float = weight.format.name in _HF_DTYPES
        if len(weight.shape) == 1:
            if "norm" in name and self.norm_shift:
                return FORMATS["F32"], weight.dequantize().astype(np.float32) + np.float32(self.norm_shift)
            fmt = weight.format if is_float else FORMATS["F32"]
        elif self.dtype is not None:
            fmt = FORMATS[self.dtype]
        else:
            fmt = weight.format if is_float else FORMATS["F32" if self.kind == "hf" else "F16"]
        if fmt is weight.format:
            return fmt, weight.data
        values = weight.dequantize().astype(np.float32, copy=False)
        if fmt.name == "F16" and values.size and float(np.abs(values).max()) > 65504:
            fmt = FORMATS["F32"]
        return fmt, quantize(values, fmt)


def _stored(model: LoadedModel) -> dict[str, Weight]:
    """Weights by canonical name, a tied head once."""
    tied = model.weights.get("lm_head") is model.weights["embed_tokens"]
    return {name: weight for name, weight in model.weights.items() if not (tied and name == "lm_head")}


def _module(spec: ModelSpec, name: str) -> str:
    return spec.names.to_hf(name).rpartition(".")[0]


def _format_of(array: Array) -> QuantFormat:
    kinds = {"f": "F", "i": "I", "u": "U"}
    return DTYPES[f"{kinds[array.dtype.kind]}{8 * array.dtype.itemsize}"]


def _stated_dtype(linears: Mapping[str, Weight]) -> str:
    """What readers compute in: the dtype that most plain matrices had, float32 where none was plain."""
    sizes: defaultdict[str, int] = defaultdict(int)
    for weight in linears.values():
        sizes[weight.format.name] += weight.num_elements if weight.format.name in _HF_DTYPES else 0
    return _HF_DTYPES.get(max(sizes, key=lambda name: sizes[name]), "float32")


def _hf_config(model: LoadedModel, spec: ModelSpec) -> tuple[ModelConfig, dict[str, Any]]:
    """The config as config.json can state it, and config.json. Raises CheckpointError for what it cannot."""
    config = replace(model.config, rope=replace(model.config.rope, freq_divisors=None))
    if model.config.rope.freq_divisors is not None:
        config = _with_llama3(model.config)
    document = spec.config_to_hf(config)
    tokens = _special_ids(model)
    document |= {key: value for key, value in tokens.items() if value is not None}
    if not document.get("eos_token_id"):
        document.pop("eos_token_id", None)
    stated = spec.config_from_hf(document, file="config.json")
    wanted, found = asdict(replace(config, norm_offset=stated.norm_offset)), asdict(stated)
    lost = [name for name, value in wanted.items() if not _same(value, found[name])]
    if lost:
        raise CheckpointError(
            f"a config.json of {config.arch} cannot state this model's {', '.join(lost)}; write a GGUF file, "
            "or load the model without the options that changed it"
        )
    return stated, document


def _with_llama3(config: ModelConfig) -> ModelConfig:
    """Divisors of a GGUF file as the llama3 scaling that they come from. Raises CheckpointError."""
    assert config.rope.freq_divisors is not None
    plain = replace(config.rope, freq_divisors=None)
    frequencies, _ = rope_frequencies(config.rope, max_position=config.max_position, max_model_len=8192)
    for low, high, original in _LLAMA3_RANGES:
        rope = replace(
            plain,
            rope_type="llama3",
            factor=float(round(max(config.rope.freq_divisors))),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )
        found, _ = rope_frequencies(rope, max_position=config.max_position, max_model_len=8192)
        if np.allclose(found, frequencies, rtol=1e-5, atol=0):
            return replace(config, rope=rope)
    raise CheckpointError("the RoPE divisors of this model follow no scaling that a config.json can state")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b) or (isinstance(a, (list, tuple)) and list(a) == list(b or ()))


def _norm_shift(config: ModelConfig, stated: ModelConfig) -> float:
    """What is added to norm weights because the file means another offset (Gemma from GGUF: -1)."""
    return config.norm_offset - stated.norm_offset


def _special_ids(model: LoadedModel) -> dict[str, int | None]:
    """Begin and padding tokens, as the source states them."""
    if model.checkpoint is None:
        return {}
    metadata = model.checkpoint.metadata
    keys = (
        {"bos_token_id": "bos_token_id", "pad_token_id": "pad_token_id"}
        if model.checkpoint.kind == "hf"
        else {
            "bos_token_id": "tokenizer.ggml.bos_token_id",
            "pad_token_id": "tokenizer.ggml.padding_token_id",
        }
    )
    found = {name: metadata.get(key) for name, key in keys.items()}
    return {
        name: i if type(i) is int and 0 <= i < model.config.vocab_size else None for name, i in found.items()
    }


def _write_generation_config(model: LoadedModel, config: Mapping[str, Any], directory: Path) -> None:
    source = None if model.checkpoint is None else model.checkpoint.path / "generation_config.json"
    if (
        source is not None
        and model.checkpoint is not None
        and model.checkpoint.kind == "hf"
        and source.is_file()
    ):
        shutil.copyfile(source, directory / source.name)
        return
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(directory / "generation_config.json", {key: config[key] for key in keys if key in config})


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_shards(directory: Path, tensors: Iterator[tuple[str, QuantFormat, Array]]) -> None:
    """model.safetensors, or several files of SHARD_BYTES and their index."""
    shards: list[list[str]] = []
    pending: list[tuple[str, QuantFormat, Array]] = []
    total = size = 0

    def flush() -> None:
        nonlocal size
        # Widest elements first, so that each tensor starts at a multiple of its element size.
        pending.sort(key=lambda tensor: -tensor[1].block_bytes)
        write_safetensors(
            directory / f"{len(shards)}.safetensors",
            [(name, fmt, array.shape) for name, fmt, array in pending],
            (np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for _, _, array in pending),
        )
        shards.append([name for name, _, _ in pending])
        pending.clear()
        size = 0

    for name, fmt, array in tensors:
        pending.append((name, fmt, array))
        size += array.nbytes
        total += array.nbytes
        if size >= SHARD_BYTES:
            flush()
    if pending or not shards:
        flush()
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (directory / f"{i}.safetensors").rename(directory / name)
    weight_map = {tensor: names[i] for i, tensors_of in enumerate(shards) for tensor in tensors_of}
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
