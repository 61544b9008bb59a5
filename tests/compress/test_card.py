"""Sizes, judgement and card, against figures that are computed here in another way."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from ridgeline.compress import judge as judging
from ridgeline.compress.card import (
    Made,
    bytes_table,
    card_document,
    cells,
    model_card,
    notes,
    table,
    void_reason,
    worst_table,
)
from ridgeline.compress.judge import BASE, JudgeOptions, judge
from ridgeline.compress.sizes import class_of, sizes_of
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError, RequestError
from ridgeline.models.load import load_model
from ridgeline.models.synth import synthesize
from ridgeline.quality.divergence import divergence, divergences
from ridgeline.quality.perplexity import perplexity
from ridgeline.quality.text import tokenize
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.groups import Groups, pack_groups
from ridgeline.quant.weight import Weight
from ridgeline.tokenizer import load_tokenizer
from tests.tiny import tiny_model

TEXT = "The harbour is quiet at night. " * 60
EAGER = {"executor": "eager", "speed": False, "eval_tokens": 256, "eval_context": 64}
LONG = {"eval_tokens": 4096, "eval_context": 2048}


def converted(model, format, *, tables=None):
    """Every matrix in `format`, embedding and head in `tables`; a tied head stays tied."""
    weights = {}
    for name, weight in model.weights.items():
        is_table = name in ("embed_tokens", "lm_head")
        wanted = FORMATS[(tables or format) if is_table else format]
        weights[name] = weight.converted(wanted) if len(weight.shape) > 1 else weight
    if model.config.tie_embeddings:
        weights["lm_head"] = weights["embed_tokens"]
    return replace(model, weights=weights)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A tiny Llama in float32 with its tokenizer, and a text file."""
    folder = tmp_path_factory.mktemp("card")
    model = load_model(synthesize("tiny-llama", "F32", path=folder / "m"))
    text = folder / "text.txt"
    text.write_text(TEXT)
    return model, load_tokenizer(model.checkpoint), text


def test_sizes_are_those_of_the_arithmetic():
    model = converted(tiny_model("gemma3"), "F16", tables="BF16")
    sizes = sizes_of(model)
    distinct = {id(w): w for w in model.weights.values()}.values()
    assert sizes.num_bytes == sum(w.data.nbytes for w in distinct) == sum(sizes.by_class.values())
    assert sizes.by_class["embedding"] == model.weights["embed_tokens"].data.nbytes  # tied: once
    assert sizes.float32_bytes == 4 * sum(w.num_elements for w in distinct)
    assert sum(sizes.by_format.values()) == sizes.num_bytes
    assert sizes.ratio == sizes.float32_bytes / sizes.num_bytes


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embed_tokens", "embedding"),
        ("lm_head", "embedding"),
        ("norm", "norms"),
        ("layers.0.q_proj", "attention"),
        ("layers.11.k_proj.bias", "attention"),
        ("layers.3.q_norm", "norms"),
        ("layers.3.down_proj", "mlp"),
        ("layers.3.post_mlp_norm", "norms"),
    ],
)
def test_every_name_has_its_class(name, kind):
    assert class_of(name) == kind


def test_bits_per_weight_count_scales_zeros_and_order():
    base = tiny_model("llama")
    rng = np.random.default_rng(0)
    weights = {}
    for name, weight in base.weights.items():
        if len(weight.shape) < 2 or not name.startswith("layers."):
            weights[name] = weight
            continue
        n, k = weight.shape
        groups = Groups(
            4,
            rng.integers(0, 16, (n, k)).astype(np.uint8),
            np.ones((n, k // 24), np.float32),
            np.full((n, k // 24), 7, np.uint8),
        )
        fmt, rows = pack_groups(groups)
        weights[name] = Weight(name, fmt, (n, k), {"data": rows})
    sizes = sizes_of(replace(base, weights=weights))
    assert sizes.linear_bits == pytest.approx(4 + (16 + 8) / 24)
    assert sizes.table_bits == 32
    name = "layers.0.down_proj"
    order = np.arange(weights[name].shape[1], dtype=np.int32)
    ordered = replace(weights[name], buffers=weights[name].buffers | {"order": order})
    more = sizes_of(replace(base, weights=weights | {name: ordered}))
    assert more.num_bytes - sizes.num_bytes == order.nbytes


def test_several_models_at_once_are_each_as_alone(opened):
    model, tokenizer, _ = opened
    options = {"executor": "eager", "dtype": "float64", "max_model_len": 128, "max_num_seqs": 1}

    def engine(loaded):
        return LLMEngine(EngineConfig.from_options("tiny", **options), loaded, tokenizer)

    base, others = engine(model), [engine(converted(model, name)) for name in ("Q8_0", "Q4_0")]
    token_ids = tokenize(base, TEXT)[:384]
    together = divergences(base, others, token_ids, context=128)
    for found, other in zip(together, others, strict=True):
        alone = divergence(base, other, token_ids, context=128)
        assert replace(found, seconds=0.0) == replace(alone, seconds=0.0)
        assert found.probability_difference_rms > 0
    assert together[0].kl_mean < together[1].kl_mean


def test_judgement_is_what_the_parts_say(opened):
    """Perplexities from `perplexity` on engines of the test's own; the paired error from their windows."""
    model, tokenizer, text = opened
    small = converted(model, "Q4_0", tables="Q8_0")
    options = JudgeOptions(eval_text=text, **EAGER)
    judged = judge(model, {"small": small}, tokenizer, options)
    assert judged.keys() == {BASE, "small"} and judged[BASE].quality is None
    quality = judged["small"].document()["quality"]

    scores = []
    for loaded in (model, small):
        config = EngineConfig.from_options("tiny", executor="eager", max_model_len=64, max_num_seqs=1)
        engine = LLMEngine(config, loaded, tokenizer)
        scores.append(perplexity(engine, tokenize(engine, TEXT, num_tokens=256), context=64))
    assert quality["reference_perplexity"] == pytest.approx(scores[0].perplexity, rel=1e-6)
    assert quality["perplexity"] == pytest.approx(scores[1].perplexity, rel=1e-6)
    ratio = scores[1].perplexity / scores[0].perplexity
    assert quality["perplexity_change"] == pytest.approx(ratio - 1, rel=1e-4)
    means = [
        float((b - a).mean())
        for a, b in zip(scores[0].log_likelihoods, scores[1].log_likelihoods, strict=True)
    ]
    want = ratio * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    assert quality["perplexity_change_error"] == pytest.approx(want, rel=1e-3)
    assert quality["num_tokens"] == 4 * 63


def test_the_base_is_judged_in_float32_whatever_its_file_holds(opened):
    """A Q4_0 file, and the same numbers as float32 matrices: no divergence at all."""
    model, tokenizer, text = opened
    stored = converted(model, "Q4_0")
    values = converted(stored, "F32")
    options = JudgeOptions(eval_text=text, **EAGER | {"executor": "native"})
    found = judge(stored, {"same": values, "rounded inputs": stored}, tokenizer, options)
    assert found["same"].quality.kl_max == 0 and found["same"].quality.perplexity_ratio == 1
    assert found["rounded inputs"].quality.kl_mean > 0  # native multiplies Q4_0 by 8-bit inputs


def test_speed_is_measured_in_turns(opened, monkeypatch):
    model, tokenizer, _ = opened
    calls = []

    def timed(engine, workload, seed):
        calls.append((engine.config.model, seed))
        factor = 3.0 if engine.config.model == "small" else 1.0
        drift = 1.0 + seed  # the machine gets faster: ratios of one turn do not see it
        return {"prefill_tok_s": [100 * factor * drift], "decode_tok_s": [10 * factor * drift]}

    monkeypatch.setattr(judging, "time_batch", timed)
    options = JudgeOptions(eval=False, speed_rounds=4, executor="native")
    judged = judge(model, {"small": converted(model, "Q8_0")}, tokenizer, options)
    assert calls[2:] == [(name, turn) for turn in range(4) for name in (BASE, "small")]
    assert judged["small"].speed_ratios == pytest.approx({"prefill_tok_s": 3.0, "decode_tok_s": 3.0})
    assert judged["small"].speeds["decode_tok_s"].samples == (30.0, 60.0, 90.0, 120.0)
    assert judged["small"].quality is None


def test_real_speeds_have_a_sample_a_turn(opened):
    model, tokenizer, _ = opened
    judged = judge(model, {}, tokenizer, JudgeOptions(speed_rounds=2))
    assert all(len(m.samples) == 2 and min(m.samples) > 0 for m in judged[BASE].speeds.values())


def test_the_same_format_again_is_void():
    base = tiny_model("llama")
    wide = replace(
        base,
        weights={
            name: Weight(name, FORMATS["F32"], (32, 64), {"data": np.zeros((32, 64), np.float32)})
            for name in ("layers.0.q_proj", "layers.0.up_proj", "embed_tokens", "lm_head")
        },
    )
    stored = converted(wide, "Q4_1", tables="Q8_0")
    assert "exact" in void_reason(stored, converted(wide, "Q4_1"))
    assert void_reason(stored, converted(wide, "Q4_0", tables="Q8_0")) is None  # only the tables are the same
    assert void_reason(wide, wide) is None  # floats that stay floats are no claim


def card(opened, **quality):
    model, tokenizer, text = opened
    models = {"rtn": converted(model, "Q4_0"), "other": converted(model, "Q8_0")}
    judged = judge(model, models, tokenizer, JudgeOptions(eval_text=text, **EAGER | quality))
    tensors = [
        {"name": f"layers.{i}.q_proj", "format": "Q4_0", "output_error": error, "damp": 0.05, "num_dead": 2}
        for i, error in enumerate((0.1, 0.3, 0.2))
    ]
    recipe = {"summary": "rounded", "damp": 0.01}
    made = {
        "rtn": Made(recipe, tensors, {"total": 1.5, "linears": 1.0}, None),
        "other": Made({"summary": "more"}, [], {"total": 0.5}, "of a test"),
    }
    return card_document(
        "tiny",
        judged,
        made,
        settings={"eval_tokens": 256},
        seed=3,
        details={
            "calibration": {"num_samples": 8, "length": 32, "seed": 3, "text": "a text"},
            "evaluation": {"text": "text.txt", "executor": "eager"} if quality.get("eval", True) else None,
            "output": {"path": "out", "kind": "gguf", "file_bytes": 10},
        },
    )


def test_a_card_says_it_all_and_is_json(opened):
    document = json.loads(json.dumps(card(opened), allow_nan=False))
    assert document["kind"] == "quantize" and document["settings"]["model"] == "tiny"
    assert document["metrics"]["kl"]["n"] == 4
    first = document["details"]["rows"][0]
    assert document["metrics"]["kl"]["mean"] == pytest.approx(first["quality"]["kl_mean"])
    rows = table(document)
    assert [row[0] for row in rows] == ["model", "base, float32", "rtn", "other (void)"]
    assert "decode tok/s" not in rows[0]  # nothing was timed
    by_name = dict(zip(rows[0], rows[2], strict=True))
    assert by_name["linears"] == "4.50" and by_name["made in"] == "1.5 s"
    assert by_name["perplexity"] == f"{first['quality']['perplexity']:.3f}"
    assert by_name["change"].count("±") == by_name["KL"].count("±") == 1
    assert worst_table(first, 2)[1:] == [
        ("layers.1.q_proj", "Q4_0", "0.3000"),
        ("layers.2.q_proj", "Q4_0", "0.2000"),
    ]
    text = " ".join(notes(document))
    for part in (
        "252 tokens of text.txt",
        "8 × 32 tokens",
        "other is void: of a test",
        "3 tensors",
        "6 input",
    ):
        assert part in text
    assert len(bytes_table(document)) == 3
    page = model_card(document)
    assert "# tiny quantized: rtn" in page and "ridgeline chat -m out" in page
    assert all(
        line.count("|") == len(rows[0]) + 1 for line in page.splitlines() if line.startswith("| rtn | 5")
    )


def test_a_card_without_quality_has_no_such_columns(opened):
    document = card(opened, eval=False)
    num_bytes = sum(w.data.nbytes for w in opened[0].weights.values())
    assert document["metrics"] == {} and document["details"]["rows"][0]["quality"] is None
    rows = table(document)
    assert "KL" not in rows[0] and "perplexity" not in rows[0] and "MiB" in rows[0]
    assert cells(document["details"]["base"])[4:6] == (f"{num_bytes / 2**20:.1f}", "× 1.00")
    assert "Quality" not in model_card(document)


def test_what_cannot_be_judged_is_said(opened):
    model, tokenizer, text = opened
    with pytest.raises(ConfigError, match="--no-eval"):
        JudgeOptions(eval_tokens=100, eval_context=128)
    with pytest.raises(ConfigError, match="--speed-rounds"):
        JudgeOptions(speed_rounds=0)
    with pytest.raises(RequestError, match="longer text"):
        judge(model, {"m": model}, tokenizer, JudgeOptions(eval_text=text, **EAGER | LONG))
    with pytest.raises(RequestError, match="no tokenizer"):
        judge(model, {"m": model}, None, JudgeOptions(eval_text=text, **EAGER))
