"""Perplexity, divergence and needle on tiny models: against transformers, against themselves, and the server."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers

from ridgeline.cli.main import app, main
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import RequestError
from ridgeline.llm import LLM
from ridgeline.models.synth import synthesize
from ridgeline.quality.divergence import divergence
from ridgeline.quality.needle import make_prompt, needle
from ridgeline.quality.perplexity import perplexity
from ridgeline.quality.text import tokenize
from tests.server.conftest import serving
from tests.tiny import tiny_model

TEXT = "The harbour is quiet at night. " * 40


def open_tiny(name="llama", seed=0, **options):
    options = {"executor": "eager", "max_model_len": 128, "max_num_seqs": 1} | options
    return LLMEngine(EngineConfig.from_options("tiny", **options), tiny_model(name, seed), None)


def random_ids(num, vocab=97):
    return [int(i) for i in np.random.default_rng(5).integers(0, vocab, num)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A Hugging Face directory with a tokenizer of bytes."""
    return synthesize("tiny-llama", "F32", path=tmp_path_factory.mktemp("hf") / "m")


@pytest.mark.parametrize("stride", [None, 24])
@pytest.mark.parametrize("like", ["tiny-llama", "tiny-gemma3"])
def test_perplexity_equals_transformers(tmp_path, like, stride):
    """Each window by one call of transformers, its loss over the scored labels."""
    path = synthesize(like, "F32", path=tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with LLM(str(path), executor="eager", dtype="float32", max_model_len=64, max_num_seqs=1) as llm:
        token_ids = tokenize(llm, TEXT)[:300]
        prefix = llm.engine.tokenizer.prefix_ids
        result = perplexity(llm, token_ids, context=64, stride=stride)
    total = count = previous = 0
    for begin in range(0, 300, stride or 64):
        end = min(begin + 64, 300)
        if stride is None and end - begin < 64:
            break
        window = torch.tensor([[*prefix, *token_ids[begin + len(prefix) : end]]])
        labels = window.clone()
        labels[:, : max(previous - begin, 0)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.inference_mode():
            total += float(model(window, labels=labels).loss) * scored
        count, previous = count + scored, end
        if end == 300:
            break
    assert result.num_tokens == count
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "sinks"])
@pytest.mark.parametrize("executor", ["eager", "native"])
def test_chunks_change_nothing(name, executor):
    dtype = {"dtype": "float64"} if executor == "eager" else {}
    results = []
    for budget in (128, 64, 17):
        engine = open_tiny(name, executor=executor, max_num_batched_tokens=budget, **dtype)
        results.append(perplexity(engine, random_ids(400), context=128, score_from=20))
        engine.close()
    assert results[0].num_windows == 3 and results[0].num_tokens == 3 * 108
    tolerance = 1e-10 if executor == "eager" else 0  # native: bit for bit
    for other in results[1:]:
        for ours, theirs in zip(other.log_likelihoods, results[0].log_likelihoods, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=0)


def test_engine_options_are_honoured():
    """The window of attention, kv_layout, kv_cache and block_size; what must not change does not."""
    token_ids = random_ids(256)

    def measure(**options):
        engine = open_tiny(dtype="float64", **options)
        return perplexity(engine, token_ids, context=128)

    plain = measure()
    for options in (
        {"kv_layout": "contiguous"},
        {"kv_cache": False},
        {"block_size": 64},
        {"attention": "naive"},
    ):
        assert measure(**options).nll_mean == pytest.approx(plain.nll_mean, abs=1e-9), options
    assert measure(kv_cache_dtype="int8").nll_mean != plain.nll_mean


def test_buckets_and_errors():
    result = perplexity(open_tiny(), random_ids(640), context=128)
    assert [(b.start, b.end) for b in result.buckets] == [(2**i, 2 ** (i + 1)) for i in range(7)]
    assert [b.num_tokens for b in result.buckets] == [5 * 2**i for i in range(7)]
    total = sum(b.nll_mean * b.num_tokens for b in result.buckets)
    assert total / result.num_tokens == pytest.approx(result.nll_mean)
    assert result.perplexity_error == pytest.approx(result.perplexity * result.nll_error)
    json.dumps(result.document(), allow_nan=False)
    assert perplexity(open_tiny(), random_ids(128), context=128).nll_error is None


def test_divergence_of_a_model_from_itself_is_nothing():
    result = divergence(open_tiny(), open_tiny(), random_ids(256), context=128)
    assert result.kl_mean == result.kl_max == result.flip_rate == result.log_likelihood_difference == 0
    assert result.top1_agreement == result.perplexity_ratio == 1
    assert result.num_tokens == 254


def test_divergence_is_what_the_two_perplexities_say():
    token_ids = random_ids(512)
    base, other = open_tiny(seed=0), open_tiny(seed=1, executor="native", max_num_batched_tokens=50)
    result = divergence(base, other, token_ids, context=128)
    assert result.reference_perplexity == pytest.approx(perplexity(base, token_ids, context=128).perplexity)
    assert result.perplexity == pytest.approx(perplexity(other, token_ids, context=128).perplexity)
    assert result.perplexity_ratio == pytest.approx(result.perplexity / result.reference_perplexity)
    assert result.kl_mean > 0.1 and result.kl_median <= result.kl_p99 <= result.kl_max
    assert result.top1_agreement < 0.5 and result.num_right_to_wrong > 0
    assert result.log_likelihood_difference_error > 0
    json.dumps(result.document(), allow_nan=False)


def test_a_smaller_change_is_a_smaller_divergence():
    token_ids = random_ids(256)
    base = open_tiny(dtype="float64")
    found = [
        divergence(base, open_tiny(**options), token_ids, context=128).kl_mean
        for options in ({"dtype": "float32"}, {"kv_cache_dtype": "int8"}, {"dtype": "bfloat16"})
    ]
    assert 0 <= found[0] < 1e-9 < found[1]
    assert found[0] < found[2]


def test_models_of_different_vocabularies_are_not_compared(model_path):
    with LLM(str(model_path), max_model_len=64) as llm, pytest.raises(RequestError, match="vocabulary"):
        divergence(llm, open_tiny(), random_ids(128), context=64)


def test_what_does_not_fit_is_said():
    with pytest.raises(RequestError, match="max_model_len"):
        perplexity(open_tiny(), random_ids(512), context=256)
    with pytest.raises(RequestError, match="longer text"):
        perplexity(open_tiny(), random_ids(100), context=128)
    with pytest.raises(RequestError, match="no tokenizer"):
        tokenize(open_tiny(), TEXT)


def test_the_needle_stands_where_it_should(model_path):
    with LLM(str(model_path), max_model_len=1024) as llm:
        tokenizer = llm.engine.tokenizer
        places = []
        for depth in (0.0, 0.5, 1.0):
            prompt = make_prompt(llm.engine, "48213", length=600, depth=depth)
            assert len(prompt) == 600
            text = tokenizer.decode(prompt)
            assert text.count("48213") == 2 and text.endswith("The secret number is")
            places.append(text.index("48213"))
        assert places == sorted(places) and places[0] < 150 < places[1]
        with pytest.raises(RequestError, match="too short"):
            make_prompt(llm.engine, "48213", length=50, depth=0.5)


def test_needle_scores_are_those_of_whole_prompts(model_path):
    """The answer's log-probability from the cached prompt equals that of prompt and answer in one window."""
    from ridgeline.quality.needle import _score_answers

    with LLM(str(model_path), executor="native", max_model_len=1024, max_num_batched_tokens=100) as llm:
        prompt = make_prompt(llm.engine, "48213", length=500, depth=0.3)
        scores, _ = _score_answers(llm.engine, prompt, [" 48213", " 1"])
        for answer, score in zip((" 48213", " 1"), scores, strict=True):
            whole = [*prompt, *llm.engine.tokenizer.encode(answer, add_special_tokens=False)]
            direct = perplexity(llm, whole, context=len(whole), score_from=500)
            assert score == pytest.approx(-direct.nll_mean * direct.num_tokens, abs=1e-9)
        result = needle(llm, [300, 400], [0.0, 1.0], num_trials=2)
        assert [(c.length, c.depth) for c in result.cells] == [(300, 0.0), (300, 1.0), (400, 0.0), (400, 1.0)]
        assert 0 <= result.accuracy <= 1
        assert needle(llm, [300, 400], [0.0, 1.0], num_trials=2) == result
        for lengths, depths in (([2000], [0.5]), ([300], [1.5]), ([], [0.5])):
            with pytest.raises(RequestError):
                needle(llm, lengths, depths)


def test_scores_through_the_server_are_the_same(model_path):
    """echo + logprobs + max_tokens=0, as lm-eval asks: the same perplexity from the outside."""
    options = dict(executor="eager", max_model_len=128, max_num_seqs=2, num_threads=1)
    engine = LLMEngine.from_config(EngineConfig.from_options(str(model_path), **options))
    token_ids = tokenize(engine, TEXT)[:256]
    want = perplexity(engine, token_ids, context=64)
    with serving(engine) as server:
        scores = []
        for start in range(0, 256, 64):
            body = {"prompt": token_ids[start : start + 64], "max_tokens": 0, "echo": True, "logprobs": 1}
            choice = server.post("/v1/completions", json=body).json()["choices"][0]
            scores += choice["logprobs"]["token_logprobs"][1:]
    assert len(scores) == want.num_tokens
    assert math.exp(-sum(scores) / len(scores)) == pytest.approx(want.perplexity, rel=1e-5)


@pytest.fixture
def run(capsys, tmp_path, model_path):
    """`ridgeline eval ...` on a text file -> its JSON document, or its output."""
    if "eval" not in app:
        app.command("ridgeline.cli.eval:eval", name="eval")
    (tmp_path / "text.txt").write_text(TEXT)

    def call(*arguments):
        try:
            main(["eval", *map(str, arguments), "-m", str(model_path)])
        except SystemExit as error:
            if error.code:
                raise
        out = capsys.readouterr().out
        return json.loads(out.splitlines()[-1]) if "--json" in arguments else out

    call.text = ("--text", tmp_path / "text.txt", "--context", 64)
    return call


def test_commands_end_with_one_document(run, model_path):
    found = run("perplexity", *run.text, "--json", "--executor", "native", "--num-tokens", 200)
    assert found["num_windows"] == 3 and found["num_tokens"] == 3 * 63
    assert found["settings"]["executor"] == "native" and found["settings"]["max_model_len"] == 64
    with LLM(str(model_path), executor="native", max_model_len=64) as llm:
        want = perplexity(llm, tokenize(llm, TEXT, num_tokens=200), context=64)
    assert found["perplexity"] == want.perplexity
    assert found["metrics"]["nll"]["mean"] == pytest.approx(want.nll_mean)
    options = ("--reference-executor", "eager", "--reference-dtype", "float32", "--kv-cache-dtype", "int8")
    found = run("divergence", *run.text, "--json", *options)
    assert 0 < found["kl_mean"] < 0.1
    assert found["details"]["reference_settings"]["kv_cache_dtype"] == "float32"
    assert found["settings"]["kv_cache_dtype"] == "int8"
    found = run("needle", "--lengths", "300", "--depths", "0,1", "--num-trials", 1, "--json")
    assert len(found["cells"]) == 2


def test_commands_for_people(run):
    assert "perplexity" in run("perplexity", *run.text, "--stride", 32)
    assert "KL(reference || model)" in run("divergence", *run.text)
    assert "depth" in run("needle", "--lengths", "300", "--depths", "0.5", "--num-trials", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("perplexity", "--text", "nowhere.txt"),
        ("perplexity", "--num-tokens", 0),
        ("perplexity", "--context", 0),
        ("needle", "--lengths", "many"),
    ],
)
def test_mistakes_are_one_line(run, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert str(error.value).startswith("ridgeline: ") and "Traceback" not in capsys.readouterr().err
