"""`ridgeline quantize` and `ridgeline pareto` as a user meets them, on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ridgeline.bench.result import load_document
from ridgeline.cli import pareto as pareto_cli
from ridgeline.cli import quantize as quantize_cli
from ridgeline.cli.inspect import describe
from ridgeline.cli.main import main
from ridgeline.cli.quantize import RecipeChanges, alternatives
from ridgeline.compress.recipe import RECIPES, recipe_named
from ridgeline.compress.resume import WorkDirectory
from ridgeline.errors import ConfigError
from ridgeline.models.load import load_model, open_checkpoint
from ridgeline.models.synth import synthesize

TEXT = "The harbour is quiet at night, and the boats come back before the rain. " * 40


def words(text):
    """Without line breaks."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two layers with rows of 64 and 128 columns, and a text."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "text.txt").write_text(TEXT)
    return synthesize("tiny-llama", "F32", path=folder / "tiny.gguf", intermediate_size=128)


@pytest.fixture
def run(capsys, source):
    """A command -> its JSON document, or its output; a mistake is raised as its message."""

    def call(command, *arguments, fast=True, model=source):
        flags = ("--calibration-samples", 2, "--calibration-length", 64, "--text", source.parent / "text.txt")
        flags += ("--eval-text", source.parent / "text.txt", "--eval-tokens", 256, "--eval-context", 64)
        flags += ("--executor", "eager", "--no-speed") if fast else ()
        capsys.readouterr()
        try:
            main([command, "-m", str(model), *map(str, (*arguments, *(flags if fast is not None else ())))])
        except SystemExit as error:
            if error.code:
                raise ConfigError(str(error.code)) from None
        out = capsys.readouterr().out
        return (
            json.loads(out.splitlines()[-1]) if "--json" in arguments else out if fast is None else words(out)
        )

    return call


def test_a_directory_holds_weights_and_card(run, tmp_path, source):
    out = tmp_path / "small"
    document = run("quantize", "--recipe", "gptq-int4-g64", "-o", out, "--compare", "rtn,int8", "--json")
    assert document == load_document(out / "card.json")
    details = document["details"]
    assert [row["name"] for row in details["rows"]] == ["gptq-int4-g64", "rtn-int4-g64", "int8"]
    assert all(row["quality"]["kl_mean"] > 0 for row in details["rows"])
    gptq, rtn, int8 = (
        np.mean([t["output_error"] for t in row["tensors"] if t["output_error"] is not None])
        for row in details["rows"]
    )
    assert 0 < int8 < gptq < rtn
    assert details["output"]["file_bytes"] >= sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert details["calibration"] == {
        "num_samples": 2,
        "length": 64,
        "seed": 0,
        "text": str(source.parent / "text.txt"),
    }
    assert "# " + str(source) in (out / "README.md").read_text()
    loaded = load_model(out)
    assert loaded.weights["layers.1.up_proj"].format.name == "INT4_G64"
    assert not out.with_name("small.partial").exists()


def test_what_is_written_is_what_was_made_and_judged(run, tmp_path, monkeypatch):
    made, judged = [], {}
    make, judge = quantize_cli.make, quantize_cli.judge

    def watch_make(*arguments, **options):
        made.append(make(*arguments, **options))
        return made[-1]

    def watch_judge(base, models, *arguments, **options):
        judged.update(models)
        return judge(base, models, *arguments, **options)

    monkeypatch.setattr(quantize_cli, "make", watch_make)
    monkeypatch.setattr(quantize_cli, "judge", watch_judge)
    run("quantize", "--recipe", "rtn-int4-g64", "-o", tmp_path / "m")
    assert judged["rtn-int4-g64"].checkpoint.path == tmp_path / "m"
    for name, weight in made[0][0].weights.items():
        found = judged["rtn-int4-g64"].weights[name]
        np.testing.assert_array_equal(found.dequantize(), weight.dequantize(), err_msg=name)
    # GPTQ files have no integer embedding: it is judged, and counted, as it is written.
    document = run("quantize", "--recipe", "rtn-int4-g64", "-o", tmp_path / "g", "--format", "gptq", "--json")
    assert document["details"]["rows"][0]["sizes"]["table_bits"] == (16 + 8 + 16 / 64) / 2


def test_inspect_counts_weights_and_not_words(run, tmp_path, source):
    run("quantize", "--recipe", "rtn-int4-g64", "-o", tmp_path / "m", "--no-eval")
    found = describe(open_checkpoint(tmp_path / "m"))
    assert found["problems"] == []
    assert found["parameters"] == sum(w.num_elements for w in load_model(source).weights.values())
    assert found["formats"].keys() == {"INT4_G64", "INT8_G64_SYM", "F32"}
    assert found["bits_per_weight"] == 8 * found["tensor_bytes"] / found["parameters"] < 9


def test_gguf_recipes_write_a_file_and_the_card_beside(run, tmp_path):
    out = tmp_path / "new" / "small.gguf"
    document = run("quantize", "--recipe", "Q4_0", "-o", out, "--importance", "--json")
    assert document["details"]["output"] == {
        "path": str(out),
        "kind": "gguf",
        "file_bytes": out.stat().st_size,
    }
    assert {file.name for file in out.parent.iterdir()} == {"small.gguf", "small.card.json", "small.card.md"}
    assert load_model(out).weights["layers.0.q_proj"].format.name == "Q4_0"
    assert document["details"]["calibration"]["num_samples"] == 2


def test_without_an_output_there_is_only_the_card(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run("quantize", "--recipe", "int8")
    assert "base, float32" in out and "INT8" in out and "KL" in out
    assert list(tmp_path.iterdir()) == []


def test_a_format_again_is_shown_as_void(run, tmp_path):
    synthesize("tiny-llama", "Q4_1", path=tmp_path / "q4_1.gguf")
    out = run("quantize", "--recipe", "Q4_1", "--no-eval", model=tmp_path / "q4_1.gguf")
    assert "Q4_1 (void)" in out and "proves nothing" in out
    assert "its file holds Q4_1" in out


def test_list_names_all_recipes(run):
    lines = run("quantize", "--list", fast=None).splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--recipe", "gptq-int5"), "no recipe 'gptq-int5'"),
        ((), "--recipe"),
        (("--recipe", "int8", "--compare", "best"), "no recipe 'best'"),
        (("--recipe", "int8", "-o", "m.gguf"), "a directory, without .gguf"),
        (("--recipe", "Q4_0", "-o", "m"), "ends in .gguf"),
        (("--recipe", "Q4_0", "--group-size", "32"), "llama-quantize"),
        (("--recipe", "rtn-int4-g64", "--bits", "5"), "2, 3, 4 or 8"),
        (("--recipe", "rtn-int4-g64", "--head-format", "q8"), "head_format='q8'"),
        (("--recipe", "rtn-int4-g64", "--group-size", "48"), "48"),
        (("--recipe", "int8", "--eval-tokens", "10"), "--no-eval"),
        (("--recipe", "int8", "-o", "taken"), "already there"),
        (("--recipe", "int8", "-o", "taken", "--force"), "without a model"),
        (("--recipe", "int8", "-o", "stopped"), "--resume"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(run, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("the only copy")
    (tmp_path / "stopped.partial").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"^ridgeline: ") as raised:
        run("quantize", *flags, fast=None)
    assert expected in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_model_itself_is_never_overwritten(run, source):
    before = source.read_bytes()
    with pytest.raises(ConfigError, match="the model itself"):
        run("quantize", "--recipe", "Q4_0", "-o", source, "--force")
    assert source.read_bytes() == before


def test_force_overwrites_a_model(run, tmp_path):
    run("quantize", "--recipe", "int8", "-o", tmp_path / "m", "--no-eval")
    run("quantize", "--recipe", "rtn-int4-g64", "-o", tmp_path / "m", "--no-eval", "--force")
    assert load_model(tmp_path / "m").weights["layers.0.q_proj"].format.name == "INT4_G64"
    assert "rtn-int4-g64" in (tmp_path / "m" / "README.md").read_text()


def test_a_stopped_run_goes_on(run, tmp_path, monkeypatch):
    """Stopped when layer 0 is finished: it is not computed again, and the bits are the same."""
    flags = ("quantize", "--recipe", "gptq-int4-g64", "--no-eval", "-o")
    run(*flags, tmp_path / "whole")
    stored = []
    store = WorkDirectory.store

    def stopping(self, index, *arguments):
        store(self, index, *arguments)
        stored.append(index)
        if stored == [0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkDirectory, "store", stopping)
    with pytest.raises(ConfigError, match="130"):
        run(*flags, tmp_path / "m")
    assert (tmp_path / "m.partial").is_dir() and not (tmp_path / "m").exists()
    with pytest.raises(ConfigError, match="--resume"):
        run(*flags, tmp_path / "m")
    run(*flags, tmp_path / "m", "--resume")
    assert stored == [0, 1] and not (tmp_path / "m.partial").exists()
    whole, resumed = load_model(tmp_path / "whole"), load_model(tmp_path / "m")
    for name, weight in whole.weights.items():
        np.testing.assert_array_equal(weight.data, resumed.weights[name].data, err_msg=name)


def test_alternatives_keep_the_grid():
    recipe = RecipeChanges(group_size=32, damp=0.05).of(recipe_named("awq-gptq-int4-g64"))
    assert recipe.name == "awq-gptq-int4-g32 damp=0.05"
    others = alternatives(recipe, "rtn, gptq,awq,Q4_0")
    assert [r.name for r in others] == ["rtn-int4-g32", "gptq-int4-g32", "awq-int4-g32", "Q4_0"]
    assert all(r.group_size == 32 and r.head_format == recipe.head_format for r in others[:3])
    assert [r.needs_calibration for r in others] == [False, True, True, False]
    assert alternatives(recipe_named("rtn-int4-g64"), "rtn") == []
    assert RecipeChanges().of(recipe) is recipe


def test_pareto_goes_on_and_answers(run, tmp_path, monkeypatch):
    made = []
    make = pareto_cli.make
    monkeypatch.setattr(
        pareto_cli, "make", lambda base, r, *a, **o: made.append(r.name) or make(base, r, *a, **o)
    )
    result, page = tmp_path / "pareto.json", tmp_path / "page.md"
    flags = ("--save-result", result, "--num-seeds", 2)
    run("pareto", "--recipes", "int8,gptq-int4-g64", *flags)
    assert made == ["int8", "gptq-int4-g64", "gptq-int4-g64"]
    document = run("pareto", "--recipes", "int8,Q4_0,gptq-int4-g64", *flags, "--max-kl", 1e9, "--json")
    assert made[3:] == ["Q4_0"]
    assert {(r["name"], r["seed"]) for r in document["details"]["rows"]} == {
        ("int8", None),
        ("gptq-int4-g64", 0),
        ("gptq-int4-g64", 1),
        ("Q4_0", None),
    }
    sizes = {r["name"]: r["sizes"]["num_bytes"] for r in document["details"]["rows"]}
    assert document["details"]["best"] == min(sizes, key=sizes.get)
    with pytest.raises(ConfigError, match="num_threads"):
        run("pareto", "--recipes", "int8", *flags, "--num-threads", 1)

    page.write_text(f"before\n{pareto_cli.BEGIN}\nold\n{pareto_cli.END}\nafter\n")
    pictures = ("--page", page, "--plot", tmp_path / "front.svg")
    out = run("pareto", "--from-result", result, "--max-size", 1e-6, *pictures, fast=None)
    assert "No recipe keeps --max-size 1e-06" in out and "KL, logarithmic" in out
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + 3
    assert "<svg" in (tmp_path / "front.svg").read_text()


def test_what_pareto_refuses(run, tmp_path):
    with pytest.raises(ConfigError, match="--no-eval"):
        run("pareto", "--recipes", "int8", "--no-eval")
    with pytest.raises(ConfigError, match="--num-seeds 0"):
        run("pareto", "--recipes", "int8", "--num-seeds", 0)
    run("quantize", "--recipe", "int8", "-o", tmp_path / "m")
    for flag in ("--from-result", "--save-result"):
        with pytest.raises(ConfigError, match="'quantize', expected 'pareto'"):
            run("pareto", "--recipes", "int8", flag, tmp_path / "m" / "card.json")
    (tmp_path / "page.md").write_text("no place")
    run("pareto", "--recipes", "int8", "--save-result", tmp_path / "p.json")
    with pytest.raises(ConfigError, match="pareto: begin"):
        run("pareto", "--from-result", tmp_path / "p.json", "--page", tmp_path / "page.md", fast=None)


def test_calibration_needs_a_tokenizer():
    with pytest.raises(ConfigError, match="no tokenizer"):
        quantize_cli.CalibrationOptions().tokens(None)
