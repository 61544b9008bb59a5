"""Whatever the schedule, each request gives exactly the tokens it gives alone; and nothing leaks.

A state machine adds, aborts (also while a step is in flight), finishes and steps under a random
configuration; a long seeded run does the same without hypothesis, ten thousand steps of it.
"""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ridgeline.request import FinishReason, Sampled
from ridgeline.sampling_params import SamplingParams
from tests.unit.fake_executor import Engine, text


def constant_hash(parent, token_ids):
    return b"same"


MODES = {
    "continuous": {},
    "chunks of 5": {"budget": 5},
    "whole prompts": {"chunked": False, "budget": 40, "max_model_len": 40},
    "no prefix cache": {"prefix": False},
    "hash collisions": {"hash_function": constant_hash},
    "one at a time": {"batching": "none", "prefix": False},
    "one at a time, prefix cache": {"max_num_seqs": 1},
    "static": {"batching": "static", "budget": 60, "max_model_len": 40},
    "no kv cache": {"kv_cache": False, "budget": 60, "max_model_len": 40},
    "static, no kv cache": {"batching": "static", "kv_cache": False, "budget": 60, "max_model_len": 40},
    "window": {"window": 6, "num_blocks": 10, "budget": 5},
    "window of 1": {"window": 1, "num_blocks": 6, "budget": 5},
    "window and sinks": {"window": 9, "num_sinks": 5, "num_blocks": 12},
    "window, no prefix cache": {"window": 6, "num_blocks": 10, "prefix": False},
    "window, static": {"window": 6, "batching": "static", "budget": 60, "max_model_len": 40},
    "window, tiny pool": {"window": 6, "num_blocks": 3, "max_num_seqs": 3},
    "pool of 3": {"num_blocks": 3},
    "pool of 3, no prefix cache": {"num_blocks": 3, "prefix": False},
    "contiguous": {"block_size": 64, "num_blocks": 3, "max_num_seqs": 3, "prefix": False},
    "many": {"num_blocks": 40, "max_num_seqs": 12},
    "blocks of 1": {"block_size": 1, "num_blocks": 50},
    "two in flight": {"max_in_flight": 2, "num_blocks": 24, "max_num_seqs": 8},
    "three in flight, chunks of 5": {"max_in_flight": 3, "budget": 5, "max_num_seqs": 5},
    "two in flight, tiny pool": {"max_in_flight": 2, "num_blocks": 4},
    "two in flight, window": {"max_in_flight": 2, "window": 6, "num_blocks": 12, "budget": 5},
    "two in flight, static": {"max_in_flight": 2, "batching": "static", "budget": 60, "max_model_len": 40},
    "two in flight, no kv cache": {
        "max_in_flight": 2,
        "kv_cache": False,
        "budget": 60,
        "max_model_len": 40,
    },
}


def prompt_of(engine, rng):
    """Of three families with shared prefixes, as long as the engine allows."""
    family = text(60, seed=rng.randrange(3))
    kept = rng.choice((0, 3, 8, 12, 17, 30))
    own = text(rng.randrange(1, 9), seed=rng.randrange(100))
    return (family[:kept] + own)[: engine.scheduler.max_request_tokens - 1]


def params_of(rng):
    max_tokens = rng.choice((1, 2, 5, 12, None))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(rng.choice((0, 0, 3)), max_tokens or 3),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=rng.choice(((), (7, 8))),
        prompt_logprobs=rng.choice((None, None, None, 0)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.5)),
    )


def act(engine, rng):
    """One random thing -> the plan, if it was a step."""
    choice = rng.random()
    if choice < 0.25 or len(engine.live) < 3:
        engine.add(
            prompt_of(engine, rng),
            params_of(rng),
            priority=rng.choice((0, 0, 0, -1, 5)),
            seed=rng.randrange(3),
        )
    elif choice < 0.29 and engine.live:
        engine.abort(rng.choice(sorted(engine.live)))
    elif choice < 0.31 and engine.live:
        finish(engine, rng.choice(sorted(engine.live)))
    elif choice < 0.35:
        return engine.step(meanwhile=lambda: replace_one(engine, rng))
    elif choice < 0.36:
        return skip_a_plan(engine, rng)
    else:
        return engine.step()
    return None


def finish(engine, request_id):
    """As the detokenizer does for a stop string."""
    request = engine.live.pop(request_id)
    engine.scheduler.finish(request_id, FinishReason.STOP, "stop")
    assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, "stop")
    engine.scheduler.finish(request_id, FinishReason.STOP, "again")
    assert request.stop_reason == "stop"


def replace_one(engine, rng):
    """While a step is in flight, abort a request and begin another under its name."""
    if engine.live:
        request_id = rng.choice(sorted(engine.live))
        engine.abort(request_id)
        if rng.random() < 0.7:
            engine.restarted = True
            engine.add(prompt_of(engine, rng), params_of(rng), request_id=request_id)


def skip_a_plan(engine, rng):
    """A step whose every request is gone, and one of them back, before its results arrive."""
    if engine.max_in_flight > 1:
        return engine.step()
    plan = engine.scheduler.schedule()
    engine.check_plan(plan)
    sampled = engine.execute(plan)
    victims = [r.request_id for r in plan.rows if r.request_id in engine.live]
    for request_id in victims:
        engine.abort(request_id)
    for request_id in victims[:1]:
        engine.add(prompt_of(engine, rng), params_of(rng), request_id=request_id)
    later = engine.scheduler.schedule()
    engine.check_plan(later)
    late = engine.execute(later)
    assert engine.scheduler.update(plan, sampled) == [], "results of an older request were taken"
    for request in engine.scheduler.update(later, late):
        engine.scores[request.request_id] += [e[0] for e in late[request.request_id].prompt_logprobs]
        if request.finish_reason is not None:
            engine.check_finished(engine.live.pop(request.request_id))
    engine.scheduler.check_invariants()
    return later


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        mode=st.sampled_from(sorted(MODES)),
        num_blocks=st.none() | st.integers(3, 24),
        max_num_seqs=st.none() | st.integers(1, 6),
    )
    def start(self, mode, num_blocks, max_num_seqs):
        options = dict(MODES[mode])
        if num_blocks is not None:
            options["num_blocks"] = num_blocks
        if max_num_seqs is not None:
            options["max_num_seqs"] = min(max_num_seqs, options.get("budget", 16))
        self.engine = Engine(**options)

    @rule(seed=st.integers(0, 10**6), priority=st.sampled_from((0, 0, -1, 5)))
    def add(self, seed, priority):
        rng = random.Random(seed)
        self.engine.add(prompt_of(self.engine, rng), params_of(rng), priority=priority, seed=seed % 3)

    @precondition(lambda self: self.engine.live)
    @rule(which=st.integers(0, 1000), outside=st.booleans())
    def end(self, which, outside):
        live = sorted(self.engine.live)
        (finish if outside else Engine.abort)(self.engine, live[which % len(live)])

    @rule(times=st.integers(1, 6))
    def step(self, times):
        for _ in range(times):
            self.engine.step()

    @rule(seed=st.integers(0, 10**6))
    def step_and_replace(self, seed):
        rng = random.Random(seed)
        self.engine.step(meanwhile=lambda: replace_one(self.engine, rng))

    @rule(seed=st.integers(0, 10**6))
    def late_results(self, seed):
        skip_a_plan(self.engine, random.Random(seed))

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("mode", MODES)
def test_random_steps(mode):
    """500 steps in each mode: together more than 10,000."""
    engine, rng = Engine(**MODES[mode]), random.Random(mode)
    seen = Counter()
    num_steps = 0
    while num_steps < 500:
        plan = act(engine, rng)
        if plan is not None:
            num_steps += 1
            seen.update(rows=len(plan.rows), preempted=len(plan.preempted))
        if len(engine.live) > 15:
            engine.step()
            num_steps += 1
    engine.drain()
    assert len(engine.done) > 25 and seen["rows"] > 200
    if mode in ("continuous", "whole prompts", "window and sinks", "blocks of 1"):
        assert seen["preempted"] > 0
    if mode in ("continuous", "many", "window"):
        assert engine.pool.stats.num_hit_tokens > 100
    if mode == "two in flight":
        assert engine.most_in_flight == 2 and engine.num_followed > 0 and seen["preempted"] > 0
    if "no prefix cache" in mode:
        assert engine.pool.stats.num_hit_tokens == 0


@pytest.mark.parametrize("mode", ["continuous", "two in flight", "static", "window"])
def test_what_ran_on_a_lost_executor_ends_and_the_rest_goes_on(mode):
    engine, rng = Engine(**MODES[mode]), random.Random(1)
    num_failed = 0
    for _ in range(40):
        for _ in range(6):
            engine.add(prompt_of(engine, rng), params_of(rng), seed=rng.randrange(3))
        for _ in range(rng.randrange(1, 6)):
            engine.step()
        engine.slots.clear()  # the pages are gone: whoever reads one fails with a KeyError
        engine.in_flight.clear()
        for request in engine.scheduler.fail_running():
            assert engine.live.pop(request.request_id) is request
            assert request.finish_reason is FinishReason.ERROR
            num_failed += 1
        engine.scheduler.check_invariants()
        assert engine.scheduler.num_running == 0 and engine.pool.num_free == engine.pool.num_blocks
    engine.drain()
    assert num_failed > 20 and len(engine.done) > 20


def test_requests_are_dealt_out_to_the_plans_in_flight():
    engine = Engine(max_in_flight=2, max_num_seqs=8, num_blocks=64, budget=64)
    for i in range(8):
        engine.add(text(4, seed=i), SamplingParams(max_tokens=20, ignore_eos=True))
    plans = [engine.step() for _ in range(12)]
    assert {len(plan.rows) for plan in plans[4:]} == {4}
    engine.drain()


@pytest.mark.parametrize(("max_in_flight", "sizes"), [(2, [23, 19, 14, 8]), (3, [16, 14, 12, 10, 7, 5])])
def test_a_prompt_goes_through_the_stages_in_chunks(max_in_flight, sizes):
    """A chunk follows the one before it at once; the first token is waited for."""
    engine = Engine(max_in_flight=max_in_flight, num_blocks=64, budget=64, max_model_len=128)
    engine.add(text(64), SamplingParams(max_tokens=3, ignore_eos=True))
    plans = engine.drain()
    assert [sum(len(row.token_ids) for row in plan.rows) for plan in plans] == [*sizes, 1, 1]
    assert engine.num_followed == len(sizes) - 1


def test_a_chunk_takes_no_seat_of_a_later_plan():
    engine = Engine(max_in_flight=2, max_num_seqs=4, num_blocks=64, budget=64, max_model_len=128)
    for i in range(3):
        engine.add(text(2, seed=i), SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(6):
        engine.step()
    engine.add(text(64), SamplingParams(max_tokens=1))
    plans = [engine.step() for _ in range(6)]
    assert max(len(plan.rows) for plan in plans) == 3, "two that decode and a chunk"
    assert engine.num_followed > 2
    engine.drain()


def test_ten_thousand_bare_steps_take_seconds():
    """As in a simulation: no fake cache and no checks, 500 requests waiting, fewer blocks than they want."""
    engine = Engine(num_blocks=60, block_size=16, max_num_seqs=16, budget=256, max_model_len=512)
    scheduler, rng = engine.scheduler, random.Random(0)
    texts = [text(200, seed=seed) for seed in range(30)]
    started, num_steps = time.perf_counter(), 0
    while num_steps < 10_000:
        if scheduler.num_waiting == 0:
            for _ in range(500):
                params = SamplingParams(max_tokens=rng.randrange(1, 60), ignore_eos=True)
                engine.add(rng.choice(texts)[: rng.randrange(1, 200)], params)
        plan = scheduler.schedule()
        scheduler.update(plan, {r.request_id: Sampled(9, 0.0) for r in plan.rows if r.num_logits})
        num_steps += 1
    seconds = time.perf_counter() - started
    assert engine.num_added > 1000 and scheduler.num_preemptions > 5
    assert engine.pool.stats.num_hit_tokens > 10_000
    assert seconds < 60, f"{seconds:.1f} s"
