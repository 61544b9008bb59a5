"""The bits of a request on native do not depend on anything else: not on load, chunks, cache hits or threads.

On the real model, whose weights are quantized, with texts long enough for several KV partitions.
"""

from __future__ import annotations

import pytest

from ridgeline import LLM, SamplingParams
from ridgeline.errors import ModelNotFoundError
from ridgeline.models.locate import locate_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_k=30, seed=5, max_tokens=10, ignore_eos=True)
LONG = "The council met again in the spring of 1803 and, after some talk about the cost of stone, agreed to build. "
PROMPTS = [LONG * 14 + "Then", "The capital of France is", LONG * 14 + "It was", LONG * 3, "1, 2, 3,"]

WAYS = {
    "batch of 17": {"max_num_seqs": 17},
    "chunks of 33": {"max_num_batched_tokens": 33, "max_num_seqs": 4},
    "chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    "one thread": {"num_threads": 1},
    "preempted": {"kv_cache_tokens": 576, "enable_prefix_caching": False},
    "prefix hits": {"max_num_seqs": 1},
    "static": {"batching": "static", "max_num_seqs": 4},
    "contiguous": {"kv_layout": "contiguous", "max_num_seqs": 4},
}


def run(alias: str, copies: int = 1, **options):
    """The prompts, `copies` times each in one go -> (tokens, log-probability) of the first copies."""
    with LLM(alias, executor="native", max_model_len=512, **options) as llm:
        outputs = llm.generate(
            PROMPTS * copies, [GREEDY if i % 2 else SAMPLED for i in range(len(PROMPTS))] * copies
        )
        answers = [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]
    assert answers == answers[: len(PROMPTS)] * copies
    return answers[: len(PROMPTS)]


@pytest.fixture(scope="module", params=["smollm2", "gemma3-270m"])
def model(request):
    try:
        locate_model(request.param)
    except ModelNotFoundError:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture(scope="module")
def alone(model):
    return run(model, batching="none", enable_prefix_caching=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_request_has_the_bits_it_has_alone(model, alone, way):
    copies = 4 if way == "batch of 17" else 2 if way == "prefix hits" else 1
    assert run(model, copies, **WAYS[way]) == alone


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("attention", ["flash", "naive"])
def test_so_it_is_with_every_page_type_and_attention(model, kv_cache_dtype, attention):
    if model != "smollm2":
        pytest.skip("one model is enough")
    options = {"kv_cache_dtype": kv_cache_dtype, "attention": attention}
    expected = run(model, batching="none", enable_prefix_caching=False, num_threads=1, **options)
    assert run(model, max_num_seqs=17, max_num_batched_tokens=100, **options) == expected
