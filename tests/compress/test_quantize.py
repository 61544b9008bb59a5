"""Recipes on tiny models: what comes out, how good it is, and that a killed run goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ridgeline.compress.gptq import gptq
from ridgeline.compress.grids import Grid, rtn
from ridgeline.compress.passes import float_values
from ridgeline.compress.quantize import importance, linear_names, quantize_model
from ridgeline.compress.recipe import RECIPES, Part, recipe_named
from ridgeline.errors import ConfigError
from ridgeline.quant.weight import ActivationQuant
from tests.compress.models import eager_logits, make_calibration, make_model
from tests.compress.test_passes import exact_inputs

OWN = [name for name, recipe in RECIPES.items() if recipe.gguf_mix is None]


def small(name, **options):
    """A recipe for rows of 64, 96 and 128, quick enough for a test."""
    recipe = recipe_named(name)
    defaults = {
        "group_size": None if recipe.group_size is None else 32,
        "parts": tuple(replace(part, group_size=part.group_size and 32) for part in recipe.parts),
        "tune_steps": min(recipe.tune_steps, 2),
        "rounding_steps": min(recipe.rounding_steps, 5),
        "head_format": "int8-g32",
    }
    return replace(recipe, **(defaults | options))


def kl(base, other):
    p, q = (torch.from_numpy(x).log_softmax(-1) for x in (base, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture(scope="module")
def calibration():
    return make_calibration()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_recipe_gives_the_formats_it_names(name, architecture, calibration):
    model = make_model(architecture)
    recipe = small(name)
    result = quantize_model(model, recipe, calibration=calibration)
    names = linear_names(model)
    assert len(names) == 7 * model.config.num_layers
    by_name = {entry.name: entry for entry in result.report}
    assert set(by_name) == {*names, "embed_tokens"} | (
        {"lm_head"} - ({"lm_head"} if model.config.tie_embeddings else set())
    )
    for linear in names:
        weight = result.model.weights[linear]
        assert weight.format.codes is not None
        if not recipe.is_mixed:
            grid = recipe.grid(linear)
            assert weight.format.codes.bits == grid.bits and weight.format.codes.symmetric == grid.symmetric
            assert weight.format.block_size == grid.group_size or weight.shape[1]
        assert by_name[linear].bits_per_weight == weight.format.bits_per_weight
        assert (weight.activation is not None) == (recipe.activation != "none")
    tied = result.model.weights["lm_head"] is result.model.weights["embed_tokens"]
    assert tied == model.config.tie_embeddings
    assert result.seconds["total"] > 0
    windows = make_calibration(num_samples=2, seed=9).token_ids
    assert np.isfinite(eager_logits(result.model, windows)).all()


def test_rtn_is_rtn(model):
    result = quantize_model(model, small("rtn-int4-g64"))
    weight = result.model.weights["layers.1.down_proj"]
    expected = rtn(float_values(model.weights[weight.name]), Grid(4, 32)).dequantize()
    assert np.array_equal(weight.dequantize(), expected)


def test_gptq_of_the_first_input_is_gptq_of_its_exact_hessian(model, calibration):
    """The inputs of the first layer's q, k and v do not depend on any rounding but the embedding's."""
    recipe = small("gptq-int4-g64", head_format="keep")
    result = quantize_model(model, recipe, calibration=calibration)
    x = exact_inputs(model, calibration)["layers.0.k_proj"]
    hessian = (2 / len(x) * x.T @ x).float()
    values = float_values(model.weights["layers.0.k_proj"])
    expected = gptq(values, hessian, recipe.grid("layers.0.k_proj"), recipe.gptq_config).groups.dequantize()
    found = result.model.weights["layers.0.k_proj"].dequantize()
    assert (found == expected).mean() > 0.99  # ties may fall to the other side


def test_reported_output_errors_are_true(model, calibration):
    """‖X (W - Ŵ)ᵀ‖ / ‖X Wᵀ‖ over the tokens themselves, as the quantized layers before make them."""
    result = quantize_model(model, small("gptq-int4-g64"), calibration=calibration)
    exact = exact_inputs(result.model, calibration)
    for entry in result.report:
        if entry.output_error is None:
            continue
        x = exact[entry.name]
        w, q = (float_values(m.weights[entry.name]).double() for m in (model, result.model))
        assert entry.output_error == pytest.approx(float((x @ (w - q).T).norm() / (x @ w.T).norm()), rel=1e-3)
        assert entry.weight_error == pytest.approx(float((w - q).norm() / w.norm()), rel=1e-4)


def mean_output_error(result):
    errors = [entry.output_error for entry in result.report if entry.output_error is not None]
    return sum(errors) / len(errors)


def test_better_methods_are_better(model):
    """More calibration than columns: every step from rounding to all of it lowers the outputs' error."""
    calibration = make_calibration(num_samples=12)
    recipes = {
        "rtn": small("rtn-int4-g64"),
        "gptq": small("gptq-int4-g64"),
        "refined": small("gptq-int4-g64", refine_sweeps=3),
        "learned": small("gptq-int4-g64", rounding_steps=60),
    }
    errors = {
        name: mean_output_error(quantize_model(model, recipe, calibration=calibration))
        for name, recipe in recipes.items()
    }
    assert errors["gptq"] < 0.9 * errors["rtn"]
    assert errors["refined"] < errors["gptq"]
    assert errors["learned"] < errors["gptq"]


def test_smoothquant_loses_less_than_w8a8(model):
    calibration, windows = make_calibration(num_samples=12), make_calibration(4, seed=5).token_ids
    base = eager_logits(model, windows)
    plain = kl(base, eager_logits(quantize_model(model, small("w8a8")).model, windows))
    smooth = quantize_model(model, small("w8a8-smooth"), calibration=calibration)
    assert kl(base, eager_logits(smooth.model, windows)) < 0.85 * plain
    assert any(entry.alpha for entry in smooth.report)


def test_static_scales_are_those_of_the_inputs(model, calibration):
    result = quantize_model(model, small("w8a8-static"), calibration=calibration)
    exact = exact_inputs(result.model, calibration)
    for name in linear_names(model):
        scale = result.model.weights[name].activation.static_scale
        largest = float(exact[name].abs().max())
        assert 0.3 * largest / 127 < scale <= 1.01 * largest / 127
    assert quantize_model(model, small("llm-int8")).model.weights[name].activation == ActivationQuant(
        outlier_threshold=6.0
    )


def test_tables_have_their_own_format(model, calibration):
    for head_format, expected in (
        ("keep", "F32"),
        ("f16", "F16"),
        ("int8", "INT8_G64_SYM"),
        ("int4-g32", "INT4_G32"),
    ):
        result = quantize_model(model, small("rtn-int4-g64", head_format=head_format))
        assert {result.model.weights[n].format.name for n in ("embed_tokens", "lm_head")} == {expected}


def test_parts_get_their_own_bits(model, calibration):
    recipe = small("gptq-int4-g64", parts=(Part(".v_proj", 8, 64), Part("layers.0.down_proj", 3, 32)))
    weights = quantize_model(model, recipe, calibration=calibration).model.weights
    assert weights["layers.1.v_proj"].format.name == "INT8_G64_SYM"
    assert weights["layers.0.down_proj"].format.name == "INT3_G32"
    assert weights["layers.1.down_proj"].format.name == weights["layers.1.q_proj"].format.name == "INT4_G32"


def test_full_act_order_is_stored_and_read_back(model, calibration):
    result = quantize_model(model, small("gptq-int4-g64", act_order="full"), calibration=calibration)
    order = result.model.weights["layers.0.down_proj"].buffers["order"]
    assert sorted(order) == list(range(128)) and not np.array_equal(order, np.arange(128))
    assert mean_output_error(result) < 0.2


def test_a_group_that_does_not_divide_is_refused_at_once(model, calibration):
    with pytest.raises(ConfigError, match="group_size 48 does not divide the 64"):
        quantize_model(
            model, recipe_named("gptq-int4-g64").with_options(group_size=48), calibration=calibration
        )


def test_calibration_is_asked_for(model):
    with pytest.raises(ConfigError, match="needs calibration"):
        quantize_model(model, small("gptq-int4-g64"))


def test_importance_is_the_mean_square_of_each_input(model, calibration):
    found = importance(model, calibration)
    exact = exact_inputs(model, calibration)
    assert set(found) == {*linear_names(model), "lm_head"}
    for name, x in exact.items():
        assert np.allclose(found[name], x.square().mean(0), rtol=1e-4)


def same_bits(first, second):
    return all(
        np.array_equal(weight.buffers[key], second.weights[name].buffers[key])
        and weight.format == second.weights[name].format
        for name, weight in first.weights.items()
        for key in weight.buffers
    )


def test_the_same_seed_gives_the_same_bits(model, calibration):
    first, second = (
        quantize_model(model, small("awq-gptq-int4-g64"), calibration=calibration) for _ in range(2)
    )
    assert same_bits(first.model, second.model)


KILLED = """
import os, signal, sys
from pathlib import Path
from ridgeline.compress.quantize import quantize_model
from tests.compress.models import make_calibration, make_model
from tests.compress.test_quantize import small

def die(done, total, message):
    if done == int(sys.argv[3]) and [*Path(sys.argv[2]).glob("state-*")]:
        os.kill(os.getpid(), signal.SIGKILL)

model = make_model("gemma3", num_layers=4)
quantize_model(
    model, small(sys.argv[1]), calibration=make_calibration(), work_dir=Path(sys.argv[2]), on_progress=die
)
"""


@pytest.mark.parametrize("name", ["best-int4", "w8a8-static"])
def test_a_killed_run_goes_on_to_the_same_bits(name, tmp_path):
    model, recipe, calibration = make_model("gemma3", num_layers=4), small(name), make_calibration()
    whole = quantize_model(model, recipe, calibration=calibration)
    work_dir = tmp_path / "work"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, name, work_dir, "10"],
        cwd=Path(__file__).parents[2],
        env={**os.environ},
    )
    assert killed.returncode == -signal.SIGKILL
    kept = {"layer-000.npz", "layer-001.npz", "run.json", "state-002.npy"}
    assert {f.name for f in work_dir.iterdir()} - {"grids.json"} == kept

    done = []
    rest = quantize_model(
        model, recipe, calibration=calibration, work_dir=work_dir, on_progress=lambda d, t, m: done.append(d)
    )
    assert done[0] == 8  # two layers of four inputs
    assert same_bits(whole.model, rest.model)
    strip = [replace(entry, seconds=0.0) for entry in whole.report]
    assert [replace(entry, seconds=0.0) for entry in rest.report] == strip


def test_a_work_directory_of_another_run_is_refused(model, calibration, tmp_path):
    work_dir = tmp_path / "work"
    quantize_model(model, small("gptq-int4-g64"), calibration=calibration, work_dir=work_dir)
    for change in ({"recipe": small("gptq-int4-g64", damp=0.02)}, {"calibration": make_calibration(seed=1)}):
        arguments = {"recipe": small("gptq-int4-g64"), "calibration": calibration} | change
        with pytest.raises(ConfigError, match=f"another {next(iter(change))}"):
            quantize_model(
                model, arguments["recipe"], calibration=arguments["calibration"], work_dir=work_dir
            )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is not empty"):
        quantize_model(model, small("gptq-int4-g64"), calibration=calibration, work_dir=tmp_path / "other")


@pytest.mark.parametrize("name", ["rtn-int4-g64", "gptq-int4-g64", "awq-int4-g64"])
def test_the_first_layers_alone_are_quantized_as_in_the_whole_model(name, model, calibration):
    recipe = small(name, head_format="keep")
    tokens = calibration if recipe.needs_calibration else None
    whole = quantize_model(model, recipe, calibration=tokens).model.weights
    part = quantize_model(model, recipe, calibration=tokens, num_layers=1)
    touched = set(linear_names(model, num_layers=1))
    assert touched and touched < set(linear_names(model))
    for weight_name, weight in part.model.weights.items():
        if weight_name in touched:
            assert weight.format is whole[weight_name].format
            assert np.array_equal(weight.data, whole[weight_name].data)
        elif not weight_name.startswith("layers.0."):
            assert weight is model.weights[weight_name]
    assert {entry.name for entry in part.report} - {"embed_tokens", "lm_head"} == touched


def test_layers_are_counted_only_where_that_means_something(model, calibration):
    for name in ("best-int4", "Q4_0"):
        with pytest.raises(ConfigError, match="num_layers=1"):
            quantize_model(model, recipe_named(name), calibration=calibration, num_layers=1)
    for number in (0, model.config.num_layers + 1):
        with pytest.raises(ConfigError, match="num_layers"):
            quantize_model(model, small("rtn-int4-g64"), num_layers=number)
