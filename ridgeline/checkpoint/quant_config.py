"""Which scheme a Hugging Face directory is quantized with: quantization_config of config.json, or the older
quantize_config.json (AutoGPTQ) and quant_config.json (AutoAWQ) beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ridgeline.checkpoint.awq import awq_scheme
from ridgeline.checkpoint.bitsandbytes import int8_scheme
from ridgeline.checkpoint.compressed_tensors import ct_scheme
from ridgeline.checkpoint.gptq import gptq_scheme
from ridgeline.checkpoint.safetensors import read_json
from ridgeline.checkpoint.stored import QuantScheme, Settings

METHODS: dict[str, Callable[[Settings], QuantScheme]] = {
    "gptq": gptq_scheme,
    "awq": awq_scheme,
    "compressed-tensors": ct_scheme,
    "bitsandbytes": int8_scheme,
}
OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
CODES = ("weight", "qweight", "weight_packed")
SUFFIXES = (
    *(*CODES, "qzeros", "scales", "g_idx", "SCB", "weight_format", "weight_shape"),
    *("weight_scale", "weight_zero_point", "weight_g_idx"),
    *("input_scale", "input_zero_point"),
)
"""Of all tensors that a quantized linear may have, besides its bias."""


def quant_scheme(path: Path, config: Mapping[str, Any]) -> QuantScheme | None:
    """The scheme of a directory and its config.json, or None. Raises CheckpointError for an unknown one."""
    where, values, method = _find(path, config)
    if values is None:
        return None
    settings = Settings(values, where)
    known = settings.one_of("quant_method", tuple(METHODS), method if method else None)
    return METHODS[known](settings)


def _find(path: Path, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None, str | None]:
    """Where the settings are, they themselves, and the method if their file's name says it."""
    holder = Settings(config, str(path / "config.json"))
    for settings, key in (
        (holder, "quantization_config"),
        (holder, "compression_config"),
        (holder.inner("text_config"), "quantization_config"),
    ):
        if settings is not None and (found := settings.inner(key)) is not None:
            method = "compressed-tensors" if key == "compression_config" else None
            return found.where, found.values, method
    for name, method in OLDER_FILES.items():
        if (path / name).is_file():
            return str(path / name), read_json(path / name), method
    return "", None, None
