"""Where models are cut: every byte once, even sizes, block boundaries, and errors that say what to do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ridgeline.config import LoadConfig, ParallelConfig
from ridgeline.distributed.groups import RankPlace
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel, describe_model, load_model
from ridgeline.models.locate import locate_model
from ridgeline.models.registry import expected_shapes
from ridgeline.models.shard import load_shard, plan_cuts, shard_model
from ridgeline.models.synth import preset_config, synthesize
from ridgeline.ops.emulate import make_weight
from ridgeline.ops.packing import mapping_of
from ridgeline.quant.formats import format_named
from ridgeline.quant.weight import ActivationQuant, Weight
from tests.tiny import ARCHITECTURES, model_of, tiny_config, tiny_model


def places(tp_size, pp_size):
    parallel = ParallelConfig(tp_size=tp_size, pp_size=pp_size)
    return [RankPlace.of(rank, parallel) for rank in range(parallel.world_size)]


def cuts_of(model, tp_size=1, pp_size=1):
    return plan_cuts(model, ParallelConfig(tp_size=tp_size, pp_size=pp_size))


def described(like, format, **overrides):
    """Shapes and formats of a preset, without values."""
    config = preset_config(like, **overrides)
    weights = {
        name: Weight(name, format_named(format if len(shape) > 1 else "F32"), shape, {})
        for name, shape in expected_shapes(config).items()
    }
    if config.tie_embeddings:
        weights["lm_head"] = weights["embed_tokens"]
    return LoadedModel(config, weights, None)


def wide_model(format="Q4_0", **changes):
    """Random blocks in any format; 3 KV heads of 2 query heads each."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_heads": 6, "num_kv_heads": 3, "head_dim": 32}
    model = model_of(tiny_config("llama", **(sizes | changes), o_bias=True))
    rng = np.random.default_rng(0)
    weights = {
        name: make_weight(name, *w.shape, format=format, rng=rng) if len(w.shape) == 2 else w
        for name, w in model.weights.items()
    }
    return replace(model, weights=weights)


def sizes_of(shards):
    """Bytes of each shard, a tied weight counted once."""
    return [sum(w.num_bytes for w in {id(w): w for w in s.weights.values()}.values()) for s in shards]


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (5, 1)])
@pytest.mark.parametrize("format", ["Q4_0", "F16", "INT4_G32"])
def test_every_byte_is_in_exactly_one_shard(format, tp_size, pp_size):
    """Put side by side, the parts are the whole. Vectors of the activation are on every rank of the stage; 5
    ranks share 3 KV heads."""
    model = wide_model(format)
    shards = [shard_model(model, place) for place in places(tp_size, pp_size)]
    seen = []
    for stage in range(pp_size):
        ranks = shards[stage * tp_size : (stage + 1) * tp_size]
        for name, first in ranks[0].weights.items():
            whole_name = name
            if name.startswith("layers."):
                _, index, kind = name.split(".", 2)
                whole_name = f"layers.{int(index) + ranks[0].shard.layers.start}.{kind}"
            seen.append(whole_name)
            whole = model.weights[whole_name]
            parts = [r.weights[name] for r in ranks if name in r.weights]
            assert all(p.name == name and p.format is whole.format for p in parts)
            if "_proj" not in name and name not in ("embed_tokens", "lm_head"):
                assert all(np.array_equal(p.data, whole.data) for p in parts)
            elif name.endswith("o_proj.bias"):
                assert len(parts) == 1 and first.data is whole.data
            else:
                if ".k_proj" in name or ".v_proj" in name:
                    own = [r.num_kv_heads for r in (s.config for s in ranks)]
                    if sum(own) > model.config.num_kv_heads:
                        parts = [p for i, p in enumerate(parts) if i in (0, 2, 4)]  # 2 + 2 + 1 ranks
                axis = 1 if name.endswith(("o_proj", "down_proj")) else 0
                np.testing.assert_array_equal(np.concatenate([p.data for p in parts], axis), whole.data)
                assert sum(p.shape[axis] for p in parts) == whole.shape[axis]
    assert sorted(seen) == sorted(model.weights)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_have_the_shapes_that_a_rank_s_config_calls_for(name):
    model = tiny_model(name)
    for place in (*places(2, 2), *places(4, 1), *places(1, 2)):
        shard = shard_model(model, place)
        expected = expected_shapes(replace(shard.config, tie_embeddings=False))
        if not place.is_first_stage:
            del expected["embed_tokens"]
        if not place.is_last_stage:
            del expected["norm"], expected["lm_head"]
        assert {n: w.shape for n, w in shard.weights.items()} == expected
        assert shard.shard.place == place and shard.shard.vocab_size == model.config.vocab_size
        windows = [i + shard.shard.layers.start for i in shard.config.window_layers]
        assert windows == [i for i in model.config.window_layers if i in shard.shard.layers]
    alone = shard_model(tiny_model("gemma3"), RankPlace())
    assert alone.weights["lm_head"] is alone.weights["embed_tokens"]
    both = shard_model(tiny_model("gemma3"), RankPlace(1, 2, 0, 1))
    assert both.weights["lm_head"] is both.weights["embed_tokens"]


def test_smollm2_over_two_ranks():
    """9 query and 3 KV heads: the rank with fewer heads has more of the MLP."""
    model = describe_model(locate_model("smollm2"))
    cuts = cuts_of(model, tp_size=2)
    assert [len(r) for r in cuts.kv_heads] == [2, 1] and [len(r) for r in cuts.heads] == [6, 3]
    assert [len(r) for r in cuts.vocabulary] == [24576, 24576]
    assert [len(r) for r in cuts.mlp_columns] == [768, 768]
    assert all(r.start % 32 == 0 and r.stop % 32 == 0 for r in cuts.mlp_columns)
    sizes = sizes_of([shard_model(model, place) for place in places(2, 1)])
    assert max(sizes) < 0.53 * sum(sizes), "the rank with two thirds of the heads has more"
    four = cuts_of(model, tp_size=4)
    assert [list(r) for r in four.kv_heads] == [[0], [0], [1], [2]]
    assert [len(r) for r in four.heads] == [2, 1, 3, 3]


@pytest.mark.parametrize("format", ["F16", "Q4_0", "Q4_K"])
def test_a_llama_1b_is_cut_evenly(format):
    model = described("llama-1b", format)
    for tp_size, most in ((2, 0.51), (4, 0.26), (3, 0.36)):
        sizes = sizes_of([shard_model(model, place) for place in places(tp_size, 1)])
        whole = sizes_of([model])[0]
        assert max(sizes) < most * whole, (tp_size, [s / whole for s in sizes])
        vectors = sum(w.num_bytes for w in model.weights.values() if len(w.shape) == 1)
        assert sum(sizes) == whole + (tp_size - 1) * vectors


def test_stages_have_as_much_to_do():
    """By bytes of layers and half of the head: 16 layers and a head of 4.3 of them."""
    model = described("llama-1b", "F16")
    layer = sum(w.num_bytes for n, w in model.weights.items() if n.startswith("layers.0."))
    head = model.weights["lm_head"].num_bytes / layer
    assert 4 < head < 4.5
    for pp_size, expected in ((1, [16]), (2, [9, 7]), (3, [6, 6, 4]), (4, [4, 5, 5, 2])):
        layers = cuts_of(model, pp_size=pp_size).layers
        assert [len(r) for r in layers] == expected
        assert [i for r in layers for i in r] == list(range(16))
    assert [len(r) for r in cuts_of(model, pp_size=16).layers] == [1] * 16


@pytest.mark.parametrize(
    ("like", "file"), [("tiny-llama", "m.gguf"), ("tiny-gemma3", "m.gguf"), ("tiny-llama", "hf")]
)
def test_a_file_is_cut_as_it_is_read(like, file, tmp_path):
    """The same parts as of the whole model, and views of the mapped file wherever nothing was moved."""
    path = synthesize(like, "Q8_0" if file.endswith("gguf") else "BF16", path=tmp_path / file)
    whole = load_model(path)
    for place in (*places(2, 2), *places(1, 2)):
        expected, found = shard_model(whole, place), load_shard(path, None, place)
        assert found.config == expected.config and found.shard == expected.shard
        assert list(found.weights) == list(expected.weights)
        for name, weight in found.weights.items():
            np.testing.assert_array_equal(weight.data, expected.weights[name].data)
            is_moved = like == "tiny-llama" and file == "m.gguf" and name.endswith(("q_proj", "k_proj"))
            assert (mapping_of(weight.data) is None) == is_moved, name


def test_load_options_come_before_the_cut(tmp_path):
    path = synthesize("tiny-llama", "F32", path=tmp_path / "m.gguf")
    load = LoadConfig(num_kv_heads=4, sliding_window=10, num_sinks=2)
    whole = load_model(path, load)
    for place in places(4, 1):
        found, expected = load_shard(path, load, place), shard_model(whole, place)
        assert found.config == expected.config and found.config.num_kv_heads == 1
        for name, weight in found.weights.items():
            np.testing.assert_array_equal(weight.data, expected.weights[name].data)


def with_weight(model, name, **changes):
    return replace(model, weights=dict(model.weights) | {name: replace(model.weights[name], **changes)})


@pytest.mark.parametrize(
    ("model", "tp_size", "pp_size", "message"),
    [
        (tiny_model("llama"), 7, 1, r"tp_size=7: the model has 6 query heads.*up to 6, or pp_size"),
        (tiny_model("llama"), 1, 3, r"pp_size=3: the model has 2 layers.*up to 2, or tp_size"),
        (
            described("smollm2-135m", "Q4_K", hidden_size=768, num_heads=12, num_kv_heads=4),
            2,
            1,
            r"tp_size=2: o_proj in Q4_K can be cut at multiples of 256 columns only.*pp_size, or a format",
        ),
        (
            described("llama-1b", "Q4_K", intermediate_size=512),
            4,
            1,
            r"tp_size=4: the 512 columns of down_proj in Q4_K are fewer than 4 times its 256",
        ),
        (
            model_of(tiny_config("llama", vocab_size=40)),
            4,
            1,
            r"tp_size=4: a vocabulary of 40 tokens has fewer than 4 times 16 rows",
        ),
        (
            with_weight(tiny_model("llama"), "layers.1.down_proj", activation=ActivationQuant()),
            2,
            1,
            r"layers.1.down_proj rounds its input with one scale a token \(W8A8\).*use pp_size",
        ),
    ],
)
def test_what_cannot_be_cut_says_what_to_do(model, tp_size, pp_size, message):
    with pytest.raises(ConfigError, match=message):
        cuts_of(model, tp_size, pp_size)


def test_act_order_cannot_be_cut_by_columns():
    model = wide_model("INT4_G32")
    order = np.arange(192, dtype=np.int32)[::-1].copy()
    down = model.weights["layers.0.down_proj"]
    ordered = with_weight(model, "layers.0.down_proj", buffers={**down.buffers, "order": order})
    with pytest.raises(ConfigError, match=r"layers.0.down_proj.*act-order.*use pp_size"):
        shard_model(ordered, RankPlace(0, 2, 0, 1))
    shard_model(ordered, RankPlace(0, 1, 0, 2))
    gate = model.weights["layers.0.gate_proj"]
    rows = with_weight(model, "layers.0.gate_proj", buffers={**gate.buffers, "order": order[:64]})
    part = shard_model(rows, RankPlace(1, 2, 0, 1)).weights["layers.0.gate_proj"]
    np.testing.assert_array_equal(part.buffers["order"], order[:64])


def test_static_scales_can_be_cut():
    """They are the same for every rank."""
    static = ActivationQuant(static_scale=0.5)
    model = with_weight(tiny_model("llama"), "layers.1.down_proj", activation=static)
    assert shard_model(model, RankPlace(0, 2)).weights["layers.1.down_proj"].activation == static


def test_heads_stay_together_where_blocks_are_wide():
    """16 KV heads of 128 columns in blocks of 256: two at a time, so that 3 ranks get 6, 6 and 4."""
    model = described("llama-1b", "Q4_K", num_heads=16, num_kv_heads=16, head_dim=128)
    assert [len(r) for r in cuts_of(model, tp_size=3).kv_heads] == [6, 6, 4]
