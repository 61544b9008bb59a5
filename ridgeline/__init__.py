"""Ridgeline: LLM inference whose every optimisation is a setting that can be measured alone.

    from ridgeline import LLM, SamplingParams
    print(LLM("smollm2").generate("The capital of France is")[0].outputs[0].text)

Importing the package is cheap: what is named here is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ridgeline.config import EngineConfig
    from ridgeline.llm import LLM
    from ridgeline.request import RequestOutput
    from ridgeline.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "RequestOutput", "SamplingParams"]

_HOMES = {
    "LLM": "ridgeline.llm",
    "EngineConfig": "ridgeline.config",
    "RequestOutput": "ridgeline.request",
    "SamplingParams": "ridgeline.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ridgeline' has no attribute {name!r}")
