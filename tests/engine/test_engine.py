"""The corners of the engine: prompts that do not fit, stops in the first token, tiny pools, many requests."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from ridgeline import LLM
from ridgeline.errors import ConfigError, ModelNotFoundError, RequestError
from ridgeline.models.locate import locate_model
from ridgeline.sampling_params import SamplingParams
from tests.engine.test_equivalence import engine
from tests.tiny import tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


def finish(llm):
    done = {}
    while llm.has_unfinished:
        done |= {o.request_id: o for o in llm.step() if o.finished}
        llm.scheduler.check_invariants()
    return done


def test_prompts_that_cannot_be_served_are_refused_with_the_numbers():
    llm = engine(tiny_model("llama"), kv_cache_tokens=96)
    for prompt, message in (
        ([], "empty"),
        ([1] * 97, "97 tokens.*96.*3 blocks of 32"),
        ([1] * 400, "400 tokens"),
        ([97], "0 to 96"),
        (["a"], "0 to 96"),
        ("text", "no tokenizer"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.add_request({"prompt_token_ids": prompt} if prompt != "text" else prompt, GREEDY)
    assert not llm.has_unfinished


def test_a_pool_of_three_blocks_serves_everything_that_fits():
    llm = engine(tiny_model("llama"), kv_cache_tokens=96, enable_prefix_caching=True)
    prompts = [[i] * n for i, n in ((1, 90), (2, 5), (3, 40), (4, 60), (5, 33))]
    ids = [
        llm.add_request(
            {"prompt_token_ids": p}, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        )
        for p in prompts
    ]
    done = finish(llm)
    assert [done[i].outputs[0].finish_reason for i in ids] == ["length"] * 5
    assert len(done[ids[0]].outputs[0].token_ids) == 6, "ended by the size of the cache, 96 tokens"
    assert [len(done[i].outputs[0].token_ids) for i in ids[1:]] == [20] * 4


def test_five_hundred_waiting_requests_all_finish_in_order():
    llm = engine(tiny_model("llama"), max_num_seqs=16)
    ids = [
        llm.add_request({"prompt_token_ids": [i % 97, 3]}, SamplingParams(temperature=0, max_tokens=1))
        for i in range(500)
    ]
    assert list(finish(llm)) == ids


def test_n_choices_are_seeded_apart_and_reproducible():
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)
    results = []
    for _ in range(2):
        llm = engine(tiny_model("gemma3"))
        llm.add_request({"prompt_token_ids": [1, 2, 3]}, params, request_id="x")
        results.append([o.token_ids for o in finish(llm)["x"].outputs])
    assert results[0] == results[1]
    assert len({tuple(t) for t in results[0]}) == 3
    single = engine(tiny_model("gemma3"))
    single.add_request(
        {"prompt_token_ids": [1, 2, 3]},
        SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True),
        request_id="y",
    )
    assert finish(single)["y"].outputs[0].token_ids == results[0][0]


def test_logprobs_of_prompt_and_output_are_those_of_the_model():
    """Against a second run that is given prompt and answer as one prompt, chunked and not."""
    prompt = [5, 9, 2, 44, 17]
    for options in ({}, {"max_num_batched_tokens": 3, "max_num_seqs": 2}):
        llm = engine(tiny_model("llama"), **options)
        llm.add_request(
            {"prompt_token_ids": prompt},
            SamplingParams(temperature=0, max_tokens=4, logprobs=3, ignore_eos=True),
            request_id="a",
        )
        answer = finish(llm)["a"].outputs[0]
        llm.add_request(
            {"prompt_token_ids": prompt + answer.token_ids},
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2),
            request_id="b",
        )
        scored = finish(llm)["b"].prompt_logprobs
        assert scored[0] is None and len(scored) == 9
        for i, token in enumerate(answer.token_ids):
            assert len(answer.logprobs[i]) == 3, "the greedy token is one of the three most probable"
            assert answer.logprobs[i][token].rank == 1
            assert answer.logprobs[i][token].logprob == pytest.approx(scored[5 + i][token].logprob, abs=1e-12)
        assert answer.cumulative_logprob == pytest.approx(
            sum(e[t].logprob for t, e in zip(answer.token_ids, answer.logprobs, strict=True))
        )


def test_abort_frees_everything_at_once():
    llm = engine(tiny_model("llama"))
    ids = [llm.add_request({"prompt_token_ids": [i] * 40}, GREEDY) for i in range(4)]
    llm.step()
    for request_id in ids:
        llm.abort(request_id)
    llm.abort("never heard of")
    assert not llm.has_unfinished
    assert llm.scheduler.snapshot().blocks["referenced"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_gives_nearly_the_logprobs_of_float64(dtype):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for name in ("float64", dtype):
        llm = engine(tiny_model("llama"), dtype=name)
        llm.add_request({"prompt_token_ids": list(range(60))}, params, request_id="a")
        scored = finish(llm)["a"].prompt_logprobs
        found.append([e[i + 1].logprob for i, e in enumerate(scored[1:])])
    worst = np.abs(np.subtract(*found)).max()
    assert 0 < worst < {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.06}[dtype]


@pytest.mark.parametrize("kv_cache_dtype", ["float64", "float32", "float16", "bfloat16", "int8"])
def test_every_page_type_works(kv_cache_dtype):
    llm = engine(tiny_model("gemma3"), kv_cache_dtype=kv_cache_dtype)
    llm.add_request({"prompt_token_ids": list(range(70))}, GREEDY, request_id="a")
    assert len(finish(llm)["a"].outputs[0].token_ids) == 5


def test_sinks_keep_memory_flat():
    """A windowed model generates far beyond its window in a pool that holds little more than the window."""
    llm = engine(
        tiny_model("sinks"),
        kv_cache_tokens=5 * 32,
        max_num_batched_tokens=32,
        max_model_len=240,
        max_num_seqs=1,
    )
    llm.add_request(
        {"prompt_token_ids": [7] * 100},
        SamplingParams(temperature=0, max_tokens=130, ignore_eos=True),
        request_id="a",
    )
    most = 0
    while llm.has_unfinished:
        for output in llm.step():
            if output.finished:
                assert len(output.outputs[0].token_ids) == 130
        most = max(most, llm.scheduler.snapshot().blocks["referenced"])
    assert most <= 4


def real(**options):
    try:
        locate_model("smollm2")
    except ModelNotFoundError:
        pytest.skip("smollm2 is not installed")
    return LLM("smollm2", max_num_seqs=4, max_model_len=512, **options)


def test_stop_strings_and_text_on_the_real_model():
    with real(executor="native") as llm:
        plain = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=12))[
            0
        ].outputs[0]
        assert plain.text.startswith(" Paris.")
        first = llm.generate(
            "The capital of France is", SamplingParams(temperature=0, max_tokens=12, stop=["ari"])
        )[0].outputs[0]
        assert (first.text, first.finish_reason, first.stop_reason) == (" P", "stop", "ari")
        assert len(first.token_ids) == 1, "the stop string was in the first token"
        across = llm.generate(
            "The capital of France is", SamplingParams(temperature=0, max_tokens=12, stop=["is.\n"])
        )[0].outputs[0]
        assert across.text == " Par" and across.finish_reason == "stop", "the stop string spans two tokens"
        late = SamplingParams(temperature=0, max_tokens=12, stop=["ari"], min_tokens=3)
        kept = llm.generate("The capital of France is", late)[0].outputs[0]
        assert kept.text == plain.text, "a stop string before min_tokens neither stops nor swallows text"
        one = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=1))[
            0
        ].outputs[0]
        assert (one.text, one.finish_reason) == (" Paris", "length")
        streamed = list(llm.stream("The capital of France is", SamplingParams(temperature=0, max_tokens=12)))
        assert streamed[-1].outputs[0].text == plain.text and len(streamed) == 12
        chat = llm.chat(
            [{"role": "user", "content": "Say hello."}], SamplingParams(temperature=0, max_tokens=8)
        )
        assert chat[0].outputs[0].text
        again = llm.chat(
            [{"role": "user", "content": "Say hello."}], SamplingParams(temperature=0, max_tokens=8)
        )
        assert again[0].metrics.num_cached_tokens == 32
        assert again[0].outputs[0].text == chat[0].outputs[0].text


def test_executors_agree_on_the_real_model_where_the_margin_allows():
    prompts = ["The capital of France is", "1, 2, 3, 4,", "def fibonacci(n):"]
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=2)
    answers = []
    for executor in ("eager", "native"):
        exact = {"dtype": "float32", "kv_cache_dtype": "float32"}  # native rounds activations otherwise
        with real(executor=executor, **exact) as llm:
            answers.append([o.outputs[0] for o in llm.generate(prompts, params)])
    for eager, native in zip(*answers, strict=True):
        for i, (a, b) in enumerate(zip(eager.token_ids, native.token_ids, strict=True)):
            if a != b:
                first, second = sorted((e.logprob for e in eager.logprobs[i].values()), reverse=True)[:2]
                assert first - second < 1e-3, f"token {i} differs although the margin is {first - second}"
                break


WAYS = {
    "batched": {"max_num_seqs": 8},
    "chunked": {"max_num_seqs": 4, "max_num_batched_tokens": 17},
    "tight": {"max_num_seqs": 8, "kv_cache_tokens": 320},
    "static": {"batching": "static"},
    "no cache": {"kv_cache": False},
}


def test_the_real_model_gives_the_same_bits_every_way():
    """Tokens and log-probabilities on native, greedy and sampled, two prompts sharing most of their tokens."""
    shared = "The history of the bridge begins in the year 1802, when the town council decided that " * 6
    prompts = ["The capital of France is", shared + "it", shared + "they", "1, 2, 3,"]
    greedy = SamplingParams(temperature=0, max_tokens=12)
    sampled = SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=12)

    real(executor="native").close()  # skips where the model is not installed

    def run(**options):
        with LLM("smollm2", executor="native", max_model_len=256, **options) as llm:
            outputs = llm.generate(prompts, [greedy, sampled, greedy, sampled])
            return [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]

    alone = run(batching="none", enable_prefix_caching=False)
    assert {way: run(**options) == alone for way, options in WAYS.items()} == dict.fromkeys(WAYS, True)


def test_native_generation_imports_no_torch():
    real(executor="native").close()
    code = (
        "import sys; from ridgeline import LLM, SamplingParams\n"
        "out = LLM('smollm2', max_model_len=256).generate('Hi', SamplingParams(max_tokens=2))\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'pydantic', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_options_are_checked_by_name():
    with pytest.raises(ConfigError, match="unknown engine option 'max_seqs'"):
        LLM("smollm2", max_seqs=3)
