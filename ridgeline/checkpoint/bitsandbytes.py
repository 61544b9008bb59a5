"""bitsandbytes checkpoints in 8 bits (LLM.int8()), read and written.

    weight int8 [N, K], SCB float32 [N]: w = q * SCB / 127; weight_format uint8: 0, rows as they are

Inputs are rounded per token, features of at least llm_int8_threshold are left in float (0: all are rounded).
Dettmers et al. 2022, arXiv:2208.07339; bitsandbytes nn/modules.py, Linear8bitLt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ridgeline.checkpoint.stored import Parts, Settings, StoredLinear
from ridgeline.quant.formats import Array
from ridgeline.quant.groups import Groups
from ridgeline.quant.weight import ActivationQuant

_MIDDLE = np.uint8(128)
_RANGE = np.float32(127)


@dataclass(frozen=True, slots=True)
class Int8Scheme:
    """What a quantization_config of bitsandbytes says."""

    threshold: float | None

    def read(self, parts: Parts) -> StoredLinear | None:
        if "SCB" not in parts and not parts.is_dtype("weight", "I8"):
            return None
        weight = parts.array("weight", ("I8",), (None, None))
        n, k = weight.shape
        if n == 0 or k == 0:
            raise parts.error("weight", f"has shape {weight.shape}: it holds no weights")
        scales = parts.scales("SCB", (n,)).reshape(n, 1) / _RANGE
        if "weight_format" in parts:
            layout = parts.array("weight_format", ("U8",), ())
            if int(layout) != 0:
                raise parts.error("weight_format", f"is {int(layout)}; expected 0, rows as they are")
        return StoredLinear(
            shape=(n, k),
            bits=8,
            scales=scales,
            zeros=None,
            packed=lambda: weight.view(np.uint8) + _MIDDLE,
            activation=ActivationQuant(outlier_threshold=self.threshold),
        )


def int8_scheme(settings: Settings) -> Int8Scheme:
    """From quantization_config. Raises CheckpointError for 4-bit files."""
    key = "load_in_8bit" if "load_in_8bit" in settings.values else "_load_in_8bit"
    if not settings.flag(key, False):
        raise settings.wrong(
            key, "true: of bitsandbytes only 8 bits are read; convert 4-bit files to another"
        )
    threshold = settings.get("llm_int8_threshold", 6.0)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1e30:
        raise settings.wrong("llm_int8_threshold", "a number of at least 0")
    return Int8Scheme(float(threshold) or None)


def fits_int8(groups: Groups, activation: ActivationQuant | None) -> bool:
    """Rows of 8 bits whose inputs are rounded per token."""
    per_row = groups.bits == 8 and groups.zeros is None and groups.scales.shape[1] == 1
    return per_row and activation is not None and activation.static_scale is None


def int8_tensors(groups: Groups) -> dict[str, Array]:
    """The parts of one linear by suffix. A scale of 16 bits comes back exactly."""
    return {
        "weight": (groups.q - _MIDDLE).view(np.int8),
        "SCB": groups.scales[:, 0] * _RANGE,
        "weight_format": np.array(0, np.uint8),
    }


def int8_config(*, threshold: float | None, untouched: Sequence[str]) -> dict[str, Any]:
    """quantization_config. `untouched`: modules that hold plain weights."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": threshold or 0.0,
        "llm_int8_skip_modules": list(untouched) or None,
    }
