"""Recipes as data: names, variants, errors."""

from __future__ import annotations

import pytest

from ridgeline.compress.grids import Grid
from ridgeline.compress.recipe import RECIPES, Part, recipe_named
from ridgeline.errors import ConfigError
from ridgeline.quant.formats import group_format
from ridgeline.quant.weight import ActivationQuant


def test_names_are_found_in_any_case_and_near_ones_are_named():
    assert recipe_named("q4_k_m") is RECIPES["Q4_K_M"]
    with pytest.raises(ConfigError, match="gptq-int4-g64"):
        recipe_named("gptq-int4")
    for name in ("int8", "llm-int8", "w8a8-smooth", "rtn-int4-g64", "gptq-int4-g64", "awq-int4-g64", "Q4_0"):
        assert recipe_named(name).name == name


def test_a_variant_changes_what_was_given_and_nothing_else():
    recipe = recipe_named("gptq-int4-g64")
    assert recipe.with_options(bits=3, damp=None) == recipe.with_options(bits=3)
    changed = recipe.with_options(bits=3, group_size=32, damp=0.05)
    assert (changed.bits, changed.group_size, changed.gptq_config.damp) == (3, 32, 0.05)
    assert changed.method == "gptq"
    with pytest.raises(ConfigError, match="no field bitz"):
        recipe.with_options(bitz=3)
    with pytest.raises(ConfigError, match="expected 2, 3, 4 or 8"):
        recipe.with_options(bits=5)


@pytest.mark.parametrize("head_format", ["int9", "int8-g", "int8-g0", "fp4", "int8g32"])
def test_head_formats_that_cannot_be(head_format):
    with pytest.raises(ConfigError, match="head_format"):
        recipe_named("int8").with_options(head_format=head_format)


def test_head_grids():
    recipe = recipe_named("int8")
    assert recipe.with_options(head_format="keep").head_grid is None
    assert recipe.with_options(head_format="int8").head_grid.group_size is None
    grid = recipe.with_options(head_format="int4-g32").head_grid
    assert (grid.bits, grid.group_size, grid.symmetric) == (4, 32, False)


def test_parts_and_clipping_by_name():
    recipe = recipe_named("awq-int4-g64").with_options(parts=(Part(".v_proj", 8, None),))
    assert recipe.grid("layers.3.v_proj") == Grid(8, None, symmetric=True, observer="mse")
    assert recipe.grid("layers.3.q_proj") == Grid(4, 64, observer="minmax")  # AWQ never clips q and k
    assert recipe.grid("layers.3.down_proj") == Grid(4, 64, observer="mse")


def test_what_needs_calibration():
    without = [name for name, recipe in RECIPES.items() if not recipe.needs_calibration]
    assert {"int8", "w8a8", "llm-int8", "rtn-int4-g64", "Q4_K_M"} <= set(without)
    assert not {"gptq-int4-g64", "awq-int4-g64", "w8a8-smooth", "w8a8-static", "best-int4"} & set(without)
    assert recipe_named("rtn-int4-g64").with_options(target_bpw=4.5).needs_calibration


def test_int8_is_a_quarter_of_float32():
    """Linears and tables of SmolLM2's widths, norms aside: at least 3.9 times smaller."""
    for name in ("int8", "int8-g96"):
        recipe = recipe_named(name)
        for grid in (recipe.grid("layers.0.q_proj"), recipe.head_grid):
            fmt = group_format(8, grid.group_size or 576, symmetric=True)
            assert 32 / fmt.bits_per_weight >= 3.9


def test_activations():
    assert recipe_named("w8a8").dynamic_activation == ActivationQuant()
    assert recipe_named("llm-int8").dynamic_activation == ActivationQuant(outlier_threshold=6.0)
    assert recipe_named("int8").dynamic_activation is None
