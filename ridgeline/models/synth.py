"""Model files of any shape with random weights: for tests, and for measuring shapes we have no weights of.

Every tensor is a function of the seed and of its canonical name, so that the GGUF file and the Hugging Face
directory of one seed hold the same model. Matrices have std 1/sqrt(K) and norms are about 1: activations
and logits stay of order 1. The file is streamed, a few MiB at a time. The text side is a small byte-level BPE
vocabulary, padded to any size: text in, text out, no sense.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ridgeline.checkpoint.gguf_write import GGUFValue, TensorSource, write_gguf
from ridgeline.checkpoint.safetensors import write_safetensors
from ridgeline.config import ModelConfig, RopeConfig
from ridgeline.errors import ConfigError
from ridgeline.models.gemma3 import LOCAL_THETA, window_layers
from ridgeline.models.load import LoadedModel
from ridgeline.models.registry import SPECS, expected_shapes
from ridgeline.models.save_gguf import rope_divisors
from ridgeline.quant.formats import FORMATS, Array, QuantFormat
from ridgeline.quant.gguf_blocks import quantize, random_blocks
from ridgeline.quant.weight import Weight

_LLAMA3 = {"rope_type": "llama3", "theta": 500000.0, "original_max_position": 8192}
_SIZES = ("vocab_size", "max_position", "num_layers", "hidden_size", "intermediate_size")
_HEADS = ("num_heads", "num_kv_heads", "head_dim")

PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip((*_SIZES, *_HEADS), (*sizes, *heads), strict=True)) | others
    for name, sizes, heads, others in (
        ("llama-1b", (128256, 131072, 16, 2048, 8192), (32, 8, 64), {"rope": _LLAMA3 | {"factor": 32.0}}),
        (
            "llama-8b",
            (128256, 131072, 32, 4096, 14336),
            (32, 8, 128),
            {"rope": _LLAMA3 | {"factor": 8.0}, "tie_embeddings": False},
        ),
        ("llama-7b", (32000, 4096, 32, 4096, 11008), (32, 32, 128), {"tie_embeddings": False}),
        ("smollm2-135m", (49152, 8192, 30, 576, 1536), (9, 3, 64), {"rope": {"theta": 100000.0}}),
        ("gemma3-270m", (262144, 32768, 18, 640, 2048), (4, 1, 256), {"arch": "gemma3"}),
        ("tiny-llama", (512, 2048, 2, 64, 96), (4, 2, 16), {"tie_embeddings": False}),
        ("tiny-gemma3", (512, 2048, 7, 64, 96), (4, 1, 32), {"arch": "gemma3", "sliding_window": 24}),
    )
}
"""Llama 3.2 1B, 3.1 8B and 2 7B, SmolLM2, Gemma 3, and two small ones; llama where no arch is given."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rope": {"theta": 10000.0}, "norm_eps": 1e-5, "qkv_bias": False, "o_bias": False},
    "gemma3": {"rope": {"theta": 1000000.0}, "norm_eps": 1e-6, "sliding_window": 512, "window_layers": None},
}
"""What a preset may say, besides the sizes, and what it means to say nothing."""
_FIXED: dict[str, dict[str, Any]] = {
    "llama": {"activation": "silu"},
    "gemma3": {"activation": "gelu_tanh", "qk_norm": True, "post_norms": True, "norm_offset": 1.0},
}
FALLBACKS = {"Q2_K": "Q5_0", "Q3_K": "Q5_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are no whole super-blocks of 256, as files in circulation do; F16 where 32 is too much."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_END_OF_TURN = 2
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256 + 1
"""Special tokens, bytes, and one merge, without which tokenizers take a vocabulary for damaged."""
_WORDS = """
the of and to in is it you that he was for on are with as his they be at one have this from or had
by hot but some what there we can out other were all your when up use word how said an each she
which their time if will way about many then them would write like so these her long make thing see
him two has look more day could go
"""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CHUNK_ELEMENTS = 1 << 20


def synthesize(like: str, format: str, *, seed: int = 0, path: str | Path, **overrides: Any) -> Path:
    """Write a random model: a GGUF file, or a Hugging Face directory where `path` does not end in .gguf.

    like: a name of PRESETS; overrides: its fields, such as num_layers=2. Matrices get `format`
    (FALLBACKS where it does not fit), vectors of GGUF files are F32. Raises ConfigError for a name, format
    or size that cannot be.
    """
    path = Path(path)
    config = preset_config(like, **overrides)
    is_gguf = path.suffix == ".gguf"
    possible = [f.name for f in FORMATS.values() if f.name != "F64"] if is_gguf else ["F32", "F16", "BF16"]
    if format not in possible:
        kind = "a GGUF file" if is_gguf else "a Hugging Face directory (a path that does not end in .gguf)"
        raise ConfigError(f"format={format!r}: expected one of {', '.join(possible)} for {kind}")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed={seed!r}: expected a whole number from 0 to 2**64 - 1")
    write = _write_gguf if is_gguf else _write_hf
    write(path, config, FORMATS[format], name=like, seed=seed)
    return path


def preset_config(like: str, **overrides: Any) -> ModelConfig:
    """The config of a preset with some fields replaced; what depends on them follows."""
    if like not in PRESETS:
        raise ConfigError(f"no preset {like!r} to be like; presets: {', '.join(PRESETS)}")
    preset: dict[str, Any] = {
        "arch": "llama",
        "tie_embeddings": True,
        "eos_token_ids": (_END_OF_TURN,),
    } | PRESETS[like]
    arch = preset.pop("arch")
    stated = _DEFAULTS[arch] | preset
    if unknown := sorted(set(overrides) - set(stated)):
        raise ConfigError(f"{like} has no field {', '.join(unknown)}; fields: {', '.join(sorted(stated))}")
    stated |= overrides
    for name in (*_SIZES, *_HEADS, "sliding_window"):
        value = stated.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1")
    num_heads, num_kv_heads, head_dim = (stated[name] for name in _HEADS)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_heads={num_heads}: expected a multiple of num_kv_heads, which is {num_kv_heads}"
        )
    if head_dim < 4 or head_dim % 2:
        raise ConfigError(f"head_dim={head_dim}: expected an even number of at least 4")
    if stated["vocab_size"] < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size={stated['vocab_size']}: expected at least {MIN_VOCAB_SIZE}")

    if not isinstance(stated["rope"], RopeConfig):
        stated["rope"] = RopeConfig(rotary_dim=head_dim, **stated["rope"])
    if arch == "gemma3":
        stated["rope_local"] = RopeConfig(theta=LOCAL_THETA, rotary_dim=head_dim)
        stated["embed_scale"] = stated["hidden_size"] ** 0.5
        stated["attn_scale"] = head_dim**-0.5
        if stated["window_layers"] is None:
            stated["window_layers"] = window_layers(stated["num_layers"])
    return ModelConfig(arch=arch, **_FIXED[arch], **stated)


def describe_preset(like: str, format: str = "BF16", **overrides: Any) -> LoadedModel:
    """What `describe_model` would say of such a model, without writing it: for plans and predictions.

    Matrices have `format` (FALLBACKS where it does not fit), vectors are F32. Raises ConfigError.
    """
    config = preset_config(like, **overrides)
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    weights = {
        name: Weight(name, _fitting(FORMATS[format], shape), shape, {})
        for name, shape in expected_shapes(config).items()
    }
    if config.tie_embeddings:
        weights["lm_head"] = weights["embed_tokens"]
    return LoadedModel(config, weights, None)


def _write_gguf(path: Path, config: ModelConfig, fmt: QuantFormat, *, name: str, seed: int) -> None:
    spec = SPECS[config.arch]
    tokens, merges = _vocabulary(config.vocab_size)
    metadata: dict[str, Any] = {
        "general.architecture": config.arch,
        "general.name": f"synthetic {name}",
        **spec.config_to_gguf(config),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": GGUFValue(merges, "string"),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": _END_OF_TURN,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        "general.quantization_version": 2,
    }
    sources = []
    # GGUF norms are stored with their offset added.
    config = replace(config, norm_offset=0.0)
    for canonical, shape in expected_shapes(config).items():
        stored = _fitting(fmt, shape)
        chunks = _chunks(canonical, stored, shape, config, seed=seed, permuted=spec.gguf_permuted)
        sources.append(TensorSource(spec.names.to_gguf(canonical), stored, shape, chunks))
    if (divisors := rope_divisors(config)) is not None:
        sources.append(TensorSource("rope_freqs.weight", FORMATS["F32"], divisors.shape, [divisors]))
    write_gguf(path, metadata, sources)


def _write_hf(path: Path, config: ModelConfig, fmt: QuantFormat, *, name: str, seed: int) -> None:
    spec = SPECS[config.arch]
    tokens, merges = _vocabulary(config.vocab_size)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; expected a directory to write to, or a path that ends in .gguf")
    path.mkdir(parents=True, exist_ok=True)

    def write(file: str, document: Mapping[str, Any]) -> None:
        (path / file).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[fmt.name]
    write("config.json", {**spec.config_to_hf(config), "bos_token_id": 1, "dtype": dtype})
    write("generation_config.json", {"bos_token_id": 1, "eos_token_id": list(config.eos_token_ids)})
    write("tokenizer.json", _tokenizer_json(tokens, merges))
    special = {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2], "pad_token": SPECIAL_TOKENS[2]}
    write(
        "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **special},
    )
    shapes = expected_shapes(config)
    write_safetensors(
        path / "model.safetensors",
        [(spec.names.to_hf(canonical), fmt, shape) for canonical, shape in shapes.items()],
        (
            chunk.reshape(-1).view(np.uint8).data
            for canonical, shape in shapes.items()
            for chunk in _chunks(canonical, fmt, shape, config, seed=seed, permuted=False)
        ),
    )


def _fitting(fmt: QuantFormat, shape: tuple[int, ...]) -> QuantFormat:
    """The format of one tensor of a GGUF file."""
    if len(shape) == 1:
        return FORMATS["F32"]
    for candidate in (fmt, FORMATS[FALLBACKS.get(fmt.name, "F16")]):
        if shape[-1] % candidate.block_size == 0:
            return candidate
    return FORMATS["F16"]


def _chunks(
    canonical: str,
    fmt: QuantFormat,
    shape: tuple[int, ...],
    config: ModelConfig,
    *,
    seed: int,
    permuted: bool,
) -> Iterator[Array]:
    """The tensor, some rows at a time: whole heads, so that each chunk can be permuted alone."""
    rng = np.random.default_rng([seed, zlib.crc32(canonical.encode())])
    num_rows, num_columns = shape if len(shape) == 2 else (*shape, 1)
    step = max(1, _CHUNK_ELEMENTS // (num_columns * config.head_dim)) * config.head_dim
    for start in range(0, num_rows, step):
        rows = min(step, num_rows - start)
        if len(shape) == 1:
            base = 1.0 - config.norm_offset if "norm" in canonical else 0.0
            values = quantize(0.1 * rng.standard_normal((rows, 1), np.float32) + np.float32(base), fmt)
        else:
            num_blocks = rows * num_columns // fmt.block_size
            values = random_blocks(fmt, num_blocks, rng, std=num_columns**-0.5).reshape(rows, -1)
        if permuted and (".q_proj" in canonical or ".k_proj" in canonical):
            yield values.reshape(-1, 2, config.head_dim // 2, values.shape[1]).swapaxes(1, 2)
        else:
            yield values


def _vocabulary(vocab_size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges: specials, the 256 bytes, the beginnings of common words, then filler."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    merges: list[str] = []
    seen = set(tokens)
    for word in _WORDS.split():
        left = "\u0120"  # how byte-level BPE spells a space
        for letter in word:
            if left + letter not in seen and len(tokens) < vocab_size:
                merges.append(f"{left} {letter}")
                tokens.append(left + letter)
                seen.add(left + letter)
            left += letter
    return tokens + [f"<filler {i}>" for i in range(len(tokens), vocab_size)], merges


def _tokenizer_json(tokens: list[str], merges: list[str]) -> dict[str, Any]:
    """The vocabulary for the tokenizers library, splitting text as SmolLM2 does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    left_right = [(merge.split(" ")[0], merge.split(" ")[1]) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=left_right))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document
