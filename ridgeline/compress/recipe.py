"""Recipes: which format each tensor of a model gets, and by which method its numbers are chosen.

A recipe is plain data with a name; `dataclasses.replace` makes variants. What it says about linears holds for
the linears of all layers; embedding and head have a choice of their own, `head_format`; norms and biases stay
floats. `parts` gives some linears another number of bits or group size.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ridgeline.compress.gptq import GptqConfig
from ridgeline.compress.grids import Grid, Observer
from ridgeline.errors import ConfigError
from ridgeline.models.gguf_mix import MIXES
from ridgeline.quant.weight import ActivationQuant

Method = Literal["rtn", "gptq"]
ScalingMethod = Literal["none", "smoothquant", "awq"]
ActivationScheme = Literal["none", "dynamic", "static", "llm-int8"]
OUTLIER_THRESHOLD = 6.0
ROUNDING_STEPS = 50
HEAD_FORMATS = ("keep", "f16", "int8", "int8-gN", "int4-gN")


@dataclass(frozen=True, slots=True)
class Part:
    """Linears whose name ends with `suffix` (".v_proj", "layers.0.down_proj"), and what they get instead."""

    suffix: str
    bits: int
    group_size: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    name: str
    summary: str
    method: Method = "rtn"
    bits: int = 4
    group_size: int | None = 64
    """None: one scale for each row"""
    symmetric: bool = False
    per_tensor: bool = False
    """one scale for a whole matrix (with group_size None)"""
    observer: Observer = "minmax"
    """how RTN and GPTQ find the range of a group"""
    scaling: ScalingMethod = "none"
    alpha: float | None = None
    """SmoothQuant's exponent; None: searched for each input"""
    clip: bool = False
    """AWQ's clip search on all but q and k: ranges shrink where that lowers the error of the outputs"""
    smooth_keys: bool = False
    """scales folded into q and k, after which an int8 KV cache holds every channel of the keys (`keys`)"""
    damp: float = 0.01
    act_order: Literal["none", "static", "full"] = "static"
    refine_sweeps: int = 0
    """coordinate descent on the codes after they are found"""
    rounding_steps: int = 0
    """gradient steps of learned rounding for each linear"""
    tune_steps: int = 0
    """steps of training scales and norms on the divergence from the original model"""
    activation: ActivationScheme = "none"
    parts: tuple[Part, ...] = ()
    target_bpw: float | None = None
    """mixed precision: bits per weight of all linears together"""
    max_kl: float | None = None
    """mixed precision: the fewest bits with at most this predicted divergence"""
    head_format: str = "int8-g96"
    gguf_mix: str | None = None
    """a name of llama-quantize: formats by its rules; all of the above is then unused"""

    @property
    def needs_calibration(self) -> bool:
        """False where the weights alone decide."""
        return self.gguf_mix is None and (
            self.method == "gptq"
            or self.scaling != "none"
            or self.smooth_keys
            or self.activation == "static"
            or bool(self.refine_sweeps or self.rounding_steps or self.tune_steps)
            or self.is_mixed
        )

    @property
    def is_mixed(self) -> bool:
        return self.target_bpw is not None or self.max_kl is not None

    def grid(self, name: str) -> Grid:
        """Of the linear of this canonical name."""
        bits, group_size = self.bits, self.group_size
        for part in self.parts:
            if name.endswith(part.suffix):
                bits, group_size = part.bits, part.group_size
        observer = self.observer
        if self.clip and not name.endswith((".q_proj", ".k_proj")):
            observer = "mse"
        symmetric = self.symmetric or bits == 8
        return Grid(bits, group_size, symmetric=symmetric, observer=observer, per_tensor=self.per_tensor)

    @property
    def gptq_config(self) -> GptqConfig:
        return GptqConfig(damp=self.damp, act_order=self.act_order)

    @property
    def dynamic_activation(self) -> ActivationQuant | None:
        """What is stored with each linear where that needs no calibration."""
        if self.activation == "llm-int8":
            return ActivationQuant(outlier_threshold=OUTLIER_THRESHOLD)
        return ActivationQuant() if self.activation == "dynamic" else None

    @property
    def head_grid(self) -> Grid | None:
        """Of the embedding and the head; None: they stay floats."""
        if self.head_format in ("keep", "f16"):
            return None
        bits, _, group = self.head_format.removeprefix("int").partition("-g")
        is_grouped = "-g" in self.head_format
        if bits not in ("4", "8") or (is_grouped and not (group.isdigit() and int(group))):
            raise ConfigError(
                f"head_format={self.head_format!r}: expected one of {', '.join(HEAD_FORMATS)} with N columns"
            )
        group_size = int(group) if group else None
        if bits == "8":
            return Grid(8, group_size, symmetric=True)  # a search of ranges would take longest and gain least
        return Grid(4, group_size, observer="mse")

    def with_options(self, **options: Any) -> Recipe:
        """A variant; None leaves a field as it is. Raises ConfigError for what does not exist."""
        given = {name: value for name, value in options.items() if value is not None}
        known = [f.name for f in fields(self)]
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"a recipe has no field {', '.join(unknown)}; fields: {', '.join(known)}")
        recipe = replace(self, **given)
        _ = recipe.head_grid
        if recipe.bits not in (2, 3, 4, 8):
            raise ConfigError(f"bits={recipe.bits}: expected 2, 3, 4 or 8")
        return recipe


def _weight_only(bits: int, group_size: int) -> list[Recipe]:
    """The classic methods on one grid."""
    grid: dict[str, Any] = {"bits": bits, "group_size": group_size}
    suffix = f"int{bits}-g{group_size}"
    return [
        Recipe(name=f"rtn-{suffix}", summary=f"{bits}-bit weights, rounded to nearest", **grid),
        Recipe(
            name=f"gptq-{suffix}",
            summary=f"{bits}-bit weights, errors compensated column by column",
            method="gptq",
            observer="mse",  # in the metric of the Hessian's blocks: better than the whole range at any size
            damp=0.05,
            **grid,
        ),
        Recipe(
            name=f"awq-{suffix}",
            summary=f"{bits}-bit weights, scaled by what the inputs look like, ranges clipped",
            scaling="awq",
            clip=True,
            **grid,
        ),
        Recipe(
            name=f"awq-gptq-{suffix}",
            summary=f"{bits}-bit weights, AWQ's scales before GPTQ",
            scaling="awq",
            method="gptq",
            **grid,
        ),
        Recipe(
            name=f"learned-{suffix}",
            summary=f"{bits}-bit weights, up or down learned on the layers' outputs (AdaRound)",
            observer="mse",
            rounding_steps=ROUNDING_STEPS,
            **grid,
        ),
    ]


BEST: dict[str, Any] = {"scaling": "awq", "method": "gptq", "observer": "mse", "refine_sweeps": 2}
INT8: dict[str, Any] = {"bits": 8, "group_size": None, "symmetric": True}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="int8", summary="8-bit weights, a scale for each row", **INT8),
        Recipe(
            name="int8-tensor",
            summary="8-bit weights, one scale for a whole matrix",
            per_tensor=True,
            **INT8,
        ),
        Recipe(
            name="int8-g96",
            summary="8-bit weights, a scale for 96 columns",
            **(INT8 | {"group_size": 96}),
        ),
        Recipe(name="w8a8", summary="8-bit weights and inputs", activation="dynamic", **INT8),
        Recipe(
            name="w8a8-static",
            summary="8-bit weights and inputs, input scales from calibration",
            activation="static",
            **INT8,
        ),
        Recipe(
            name="w8a8-smooth",
            summary="8-bit weights and inputs, outliers moved into the weights (SmoothQuant)",
            activation="dynamic",
            scaling="smoothquant",
            **INT8,
        ),
        Recipe(
            name="llm-int8",
            summary="8-bit weights and inputs, outlier features in floats (LLM.int8())",
            activation="llm-int8",
            **INT8,
        ),
        *_weight_only(4, 64),
        *_weight_only(3, 64),
        *_weight_only(2, 64),
        Recipe(
            name="best-int4",
            summary="4-bit weights by everything that helps, at most 4.6 bits a weight",
            target_bpw=4.6,
            **BEST,
        ),
        Recipe(
            name="best-int4-head4",
            summary="the same with 4 bits for embedding and head, at most 4.6 bits over the whole model",
            head_format="int4-g64",
            target_bpw=4.6,
            **BEST,
        ),
        *(
            Recipe(
                name=f"best-{bpw}bpw",
                summary=f"the same with at most {bpw} bits a weight",
                target_bpw=float(bpw),
                **BEST,
            )
            for bpw in ("5.0", "5.5", "6.0")
        ),
        *(
            Recipe(name=mix, summary=f"GGUF, by the rules of llama-quantize for {mix}", gguf_mix=mix)
            for mix in MIXES
        ),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe called `name`, in any case; an unknown name lists the near ones."""
    by_lower = {known.lower(): recipe for known, recipe in RECIPES.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_lower, n=3)
    hint = f"did you mean {', '.join(by_lower[n].name for n in near)}? " if near else ""
    raise ConfigError(f"no recipe {name!r}; {hint}recipes: {', '.join(RECIPES)}")
