"""How dataclasses become flags: one field, one flag, the field's docstring its help.

`config.py` and `sampling_params.py` stay free of any command-line library; here their fields are made flat
(--max-num-seqs, not --scheduler.max-num-seqs) and a few get a short name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from cyclopts import App, Parameter, Token

from ridgeline.config import (  # the names in inherited annotations are looked up in this module
    AttentionImpl,  # noqa: F401
    CacheConfig,
    DType,  # noqa: F401
    EngineConfig,
    Executor,  # noqa: F401
    LoadConfig,
    ParallelConfig,
    SchedulerConfig,
)
from ridgeline.sampling_params import SamplingParams

SHORT_NAMES = {"model": "-m"}


def _read_logit_bias(type_: Any, tokens: Sequence[Token]) -> dict[int, float]:
    """The flag's JSON object, {"token id": bias}."""
    return {int(token_id): float(bias) for token_id, bias in json.loads(tokens[0].value).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandParams(SamplingParams):
    """SamplingParams with the one field that needs help to become a flag."""

    logit_bias: Annotated[
        Mapping[int, float] | None, Parameter(converter=_read_logit_bias, n_tokens=1, accepts_keys=False)
    ] = None
    """JSON, such as '{"42": -100}': added to the logits of these token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GreedyParams(CommandParams):
    """SamplingParams as a command line wants them: greedy, and longer than 16 tokens."""

    temperature: float = 0.0
    max_tokens: int | None = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatParams(CommandParams):
    """SamplingParams of a conversation."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int | None = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class DescribedConfig(EngineConfig):
    """EngineConfig where nothing is run, so that the device may be one that is not here."""

    device: str | None = None  # type: ignore[assignment]
    """An accelerator by its data sheet, such as h100; cuda: the GPU here, measured; None: this machine."""

    @property
    def runnable(self) -> EngineConfig:
        """The same settings without a device that is not here."""
        device = {"device": "cuda" if self.device == "cuda" else None}
        return EngineConfig(**{f.name: getattr(self, f.name) for f in fields(EngineConfig)} | device)


# A field of a nested group gets a second name only by its annotation, and config.py knows no flags.
for _field, _alias in (("tp_size", "--tp"), ("pp_size", "--pp")):
    ParallelConfig.__annotations__[_field] = Annotated[int, Parameter(alias=_alias)]

for _group in (
    EngineConfig,
    DescribedConfig,
    LoadConfig,
    CacheConfig,
    SchedulerConfig,
    ParallelConfig,
    GreedyParams,
    ChatParams,
):
    Parameter(name="*")(_group)


def make_app(**settings: Any) -> App:
    """The root App with the conventions above."""
    return App(
        default_parameter=Parameter(
            short_alias=lambda field, taken: SHORT_NAMES.get(field.name), json_dict=True, negative_iterable=()
        ),
        help_format="markdown",
        **settings,
    )


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on one line, the last that a command prints."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
