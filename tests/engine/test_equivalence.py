"""THE test: alone = batched = chunked = prefix-cached = preempted, token for token.

In float64 on seeded tiny models of every architecture, greedy and with seeded sampling; a state machine adds,
aborts and steps at random and checks the invariants after every step. Native must agree bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.sampling_params import SamplingParams
from tests.tiny import ARCHITECTURES, tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, seed=11, max_tokens=12, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, max_tokens=12, ignore_eos=True
)

WAYS = {
    "batched": {},
    "chunked": {"max_num_batched_tokens": 9, "max_num_seqs": 7},
    "preempted": {"kv_cache_tokens": 5 * 32, "enable_prefix_caching": False},
    "preempted, prefix cache": {"kv_cache_tokens": 5 * 32},
    "one at a time": {"batching": "none"},
    "static": {"batching": "static", "max_num_seqs": 4},
    "contiguous": {"kv_layout": "contiguous"},
    "blocks of 64": {"block_size": 64},
    "no prefix cache": {"enable_prefix_caching": False},
    "no chunked prefill": {"enable_chunked_prefill": False},
    "no cache": {"kv_cache": False},
    "naive": {"attention": "naive"},
    "flash": {"attention": "flash"},
}


def engine(model, **options) -> LLMEngine:
    options = {"executor": "eager", "dtype": "float64", "attention": "sdpa", "max_model_len": 160} | options
    return LLMEngine(EngineConfig.from_options("tiny", **options), model, None)


def prompts(model, seed: int = 0) -> list[list[int]]:
    """Ragged prompts; three of them share their first 70 tokens, two are the same."""
    rng = np.random.default_rng(seed)

    def ids(length):
        return [int(i) for i in rng.integers(0, model.config.vocab_size, length)]

    shared = ids(70)
    same = ids(64)
    return [
        ids(1),
        ids(5),
        shared,
        shared + ids(3),
        shared[:50] + ids(30),
        same,
        same,
        ids(31),
        ids(33),
        ids(100),
    ]


def run(llm: LLMEngine, requests) -> list[tuple[list[int], float]]:
    """Everything at once -> (tokens, log-probability) of each, with the invariants checked after every step."""
    ids = [llm.add_request({"prompt_token_ids": p}, params) for p, params in requests]
    done = {}
    while llm.has_unfinished:
        for output in llm.step():
            if output.finished:
                done[output.request_id] = output.outputs[0]
        llm.scheduler.check_invariants()
    llm.close()
    return [(done[i].token_ids, done[i].cumulative_logprob) for i in ids]


def alone(model, requests, **options):
    results = []
    for request in requests:
        results += run(engine(model, **options), [request])
    return results


def mixed(model):
    kinds = (GREEDY, SAMPLED, PENALISED)
    return [(p, kinds[i % 3]) for i, p in enumerate(prompts(model))]


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def case(request):
    model = tiny_model(request.param)
    requests = mixed(model)
    return model, requests, alone(model, requests)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_tokens_of_a_request_alone(case, way):
    model, requests, expected = case
    together = run(engine(model, **WAYS[way]), requests)
    assert [t for t, _ in together] == [t for t, _ in expected]
    np.testing.assert_allclose([lp for _, lp in together], [lp for _, lp in expected], rtol=0, atol=1e-9)


@pytest.mark.parametrize("way", [w for w in WAYS if "attention" not in WAYS[w]])
def test_native_gives_the_same_bits_every_way(case, way):
    model, requests, _ = case
    native = {"executor": "native", "dtype": None, "attention": None}
    assert run(engine(model, **native, **WAYS[way]), requests) == alone(model, requests, **native)


def test_native_and_eager_agree_in_float32(case):
    model, requests, expected = case
    exact = {"dtype": None, "attention": None, "kv_cache_dtype": "float32"}
    native = run(engine(model, executor="native", **exact), requests)
    same = sum(a == b for (a, _), (b, _) in zip(native, expected, strict=True))
    assert same >= len(requests) - 1, "more than one request differs: not a matter of rounding"


def test_preemption_really_happened(case):
    model, requests, _ = case
    llm = engine(model, **WAYS["preempted"])
    for prompt, params in requests:  # more than fits: some must give way
        llm.add_request({"prompt_token_ids": prompt}, params)
    preempted = 0
    while llm.has_unfinished:
        preempted += sum(o.metrics.num_preemptions for o in llm.step() if o.finished)
    assert preempted > 0


class Machine(RuleBasedStateMachine):
    """Adds, aborts and steps at random under a random configuration; every finished request is as if alone."""

    running = Bundle("running")

    @initialize(
        arch=st.sampled_from(sorted(ARCHITECTURES)),
        budget=st.integers(8, 40),
        num_seqs=st.integers(1, 8),
        blocks=st.integers(5, 12),
        prefix=st.booleans(),
    )
    def start(self, arch, budget, num_seqs, blocks, prefix):
        self.model = tiny_model(arch)
        self.llm = engine(
            self.model,
            max_num_batched_tokens=max(budget, num_seqs),
            max_num_seqs=num_seqs,
            kv_cache_tokens=blocks * 32,
            enable_prefix_caching=prefix,
        )
        self.requests = {}
        self.expected = _EXPECTED.setdefault(arch, {})

    @rule(target=running, which=st.integers(0, 9), kind=st.sampled_from((GREEDY, SAMPLED)))
    def add(self, which, kind):
        prompt = prompts(self.model)[which]
        request_id = self.llm.add_request({"prompt_token_ids": prompt}, kind)
        self.requests[request_id] = (which, kind, prompt)
        return request_id

    @rule(request_id=consumes(running))
    def abort(self, request_id):
        self.llm.abort(request_id)

    @rule(times=st.integers(1, 8))
    def step(self, times):
        for _ in range(times):
            if not self.llm.has_unfinished:
                return
            for output in self.llm.step():
                if output.finished:
                    self.check(output)
            self.llm.scheduler.check_invariants()

    def check(self, output):
        which, kind, prompt = self.requests[output.request_id]
        key = which, kind is GREEDY
        if key not in self.expected:
            self.expected[key] = alone(self.model, [(prompt, kind)])[0][0]
        assert output.outputs[0].token_ids == self.expected[key]

    @invariant()
    def consistent(self):
        if hasattr(self, "llm"):
            self.llm.scheduler.check_invariants()

    def teardown(self):
        if hasattr(self, "llm"):
            while self.llm.has_unfinished:
                for output in self.llm.step():
                    if output.finished:
                        self.check(output)


_EXPECTED: dict = {}
TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
