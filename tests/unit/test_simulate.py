"""The simulator is the engine without its numbers: the same plans, and with the same step times the same TTFTs."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest

import ridgeline.engine.engine as engine_module
import ridgeline.engine.outputs as outputs_module
from ridgeline.bench.simulate import Client, simulate, timeline
from ridgeline.bench.throughput import samples_of
from ridgeline.bench.workload import WorkloadRequest
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import RequestError
from ridgeline.sampling_params import SamplingParams
from tests.tiny import tiny_config, tiny_model

VOCAB_SIZE = 97


def affine(rows, num_logits, num_shared=0):
    """A step that reads the weights once and computes every token."""
    return 0.010 + 0.001 * sum(num_new for num_new, _ in rows)


def random_requests(num, *, seed, rate=None, shared=0, longest=60, turns=1, outputs=20):
    rng = random.Random(seed)
    prefix = [rng.randrange(VOCAB_SIZE) for _ in range(shared)]
    arrival = 0.0
    requests = []
    for index in range(num):
        conversation, turn = divmod(index, turns)
        if turn == 0:
            arrival += rng.expovariate(rate) if rate else 0.0
            history = list(prefix)
        history += [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))]
        num_output = rng.randint(1, outputs)
        requests.append(
            WorkloadRequest(
                tuple(history), num_output, arrival, None, conversation if turns > 1 else None, turn
            )
        )
        history += [0] * num_output
    return requests


def options(**changed):
    return EngineConfig.from_options("tiny", **({"max_model_len": 192, "kv_cache_tokens": 640} | changed))


class FakeClock:
    """time.monotonic for the real engine; each step takes what `durations` says for its number."""

    def __init__(self, durations):
        self.now = 0.0
        self.durations = durations
        self.plans = []

    def attach(self, monkeypatch, llm):
        submit = llm.executor.submit

        def timed(plan):
            handle = submit(plan)
            self.now += self.durations(len(self.plans), plan)
            self.plans.append(plan)
            return handle

        monkeypatch.setattr(llm.executor, "submit", timed)
        own = SimpleNamespace(monotonic=lambda: self.now)  # threads of other tests read the real clock
        for module in (engine_module, outputs_module):
            monkeypatch.setattr(module, "time", own)


def run_engine(monkeypatch, config, requests, durations, *, max_concurrency=None):
    """The real engine on a fake clock -> its plans, and each request's (TTFT, E2EL, cached tokens)."""
    llm = LLMEngine(config, tiny_model("llama"), None)
    clock = FakeClock(durations)
    client = Client(requests, max_concurrency=max_concurrency)
    measured = {}
    with monkeypatch.context() as patch:
        clock.attach(patch, llm)
        while True:
            for sent in client.due(clock.now):
                llm.add_request(
                    {"prompt_token_ids": sent.request.prompt_token_ids},
                    SamplingParams(temperature=0, max_tokens=sent.request.max_tokens, ignore_eos=True),
                    request_id=str(sent.index),
                    arrival_time=sent.arrival_s,
                )
            if not llm.has_unfinished:
                if client.next_s is None:
                    break
                clock.now = max(clock.now, client.next_s)
                continue
            for output in llm.step():
                if output.finished:
                    m = output.metrics
                    measured[int(output.request_id)] = (
                        m.first_token_time - m.arrival_time,
                        m.finished_time - m.arrival_time,
                        m.num_cached_tokens,
                    )
                    client.finish(int(output.request_id), clock.now, answer=output.outputs[0].token_ids)
    llm.close()
    return clock.plans, [measured[i] for i in range(len(requests))]


def shape(plan):
    """All of a plan but the words."""
    rows = [
        (r.request_id, len(r.token_ids), r.start, r.block_ids, r.num_logits, r.num_padding) for r in plan.rows
    ]
    return plan.step, rows, plan.preempted, plan.finished


@pytest.mark.parametrize(
    ("changed", "workload", "cap"),
    [
        ({}, {"rate": None}, None),
        ({}, {"rate": 20.0}, None),
        ({"max_num_seqs": 4}, {"rate": 8.0}, 6),
        ({"max_num_batched_tokens": 40}, {"rate": 20.0, "shared": 70}, None),
        ({"enable_prefix_caching": False}, {"rate": 20.0, "shared": 70}, 5),
        ({"kv_cache_tokens": 256}, {"rate": None, "outputs": 90}, None),
        ({"batching": "static", "max_num_seqs": 4}, {"rate": 10.0}, None),
        ({"batching": "none"}, {"rate": 5.0}, None),
        ({"kv_cache": False, "max_num_seqs": 3}, {"rate": 5.0}, None),
        ({"kv_layout": "contiguous"}, {"rate": 10.0}, None),
        ({"max_num_seqs": 3}, {"rate": 10.0, "turns": 3, "longest": 30}, 4),
    ],
)
def test_plans_and_times_are_those_of_the_engine(monkeypatch, changed, workload, cap):
    requests = random_requests(24, seed=5, **workload)
    rng = random.Random(1)
    recorded = [rng.uniform(0.005, 0.05) for _ in range(3000)]
    config = options(**changed)
    plans, measured = run_engine(
        monkeypatch, config, requests, lambda n, plan: recorded[n], max_concurrency=cap
    )
    simulated = []
    replay = iter(recorded)
    found = simulate(
        config,
        tiny_config("llama"),
        requests,
        lambda rows, num_logits, num_shared: next(replay),
        max_concurrency=cap,
        on_step=simulated.append,
    )
    assert [shape(p) for p in simulated] == [shape(p) for p in plans]
    assert [(r.ttft_s, r.e2el_s, r.num_cached_tokens) for r in found.requests] == measured
    if changed.get("kv_cache_tokens") == 256:
        assert found.num_preemptions > 0 and any(p.preempted for p in plans)
    if "shared" in workload or "turns" in workload:
        assert (found.num_prefix_hits > 0) == (config.cache.enable_prefix_caching is None)


def test_one_request_by_hand():
    request = WorkloadRequest(tuple(range(50)), 3, 1.5)
    found = simulate(options(max_num_batched_tokens=32), tiny_config("llama"), [request], affine)
    chunks = [0.010 + 0.032, 0.010 + 0.018, 0.011, 0.011]
    assert [s.duration_s for s in found.steps] == pytest.approx(chunks)
    record = found.requests[0]
    assert record.admitted_s == found.steps[0].start_s == 1.5
    assert record.ttft_s == pytest.approx(sum(chunks[:2]))
    assert record.itl_s == pytest.approx(chunks[2:]) and record.tpot_s == pytest.approx(0.011)
    assert found.duration_s == pytest.approx(sum(chunks))
    assert (found.num_prompt_tokens, found.num_output_tokens) == (50, 3)


def test_the_clock_jumps_over_idle_time():
    requests = [WorkloadRequest((1, 2, 3), 1, at) for at in (0.0, 100.0)]
    found = simulate(options(), tiny_config("llama"), requests, affine)
    assert [s.start_s for s in found.steps] == [0.0, 100.0]
    assert [r.ttft_s for r in found.requests] == pytest.approx([0.013, 0.013])


def test_a_cap_limits_what_is_sent_and_hides_no_waiting():
    requests = [WorkloadRequest((1, 2, 3 + i), 4, 0.001 * i) for i in range(6)]
    found = simulate(options(), tiny_config("llama"), requests, affine, max_concurrency=2)
    assert max(s.num_running + s.num_waiting for s in found.steps) == 2
    assert [r.arrival_s for r in found.requests] == [r.arrival_s for r in requests]
    assert found.requests[5].queue_s > 0.05


def test_a_turn_waits_for_the_answer_before_it():
    first, own = tuple(range(40)), tuple(range(50, 70))
    stand_in = (96,) * 30
    requests = [
        WorkloadRequest(first, 30, 0.0, conversation=0, turn=0),
        WorkloadRequest((*first, *stand_in, *own), 5, 0.0, conversation=0, turn=1, own_len=20),
        WorkloadRequest((7,), 2, 0.0),
    ]
    found = simulate(options(), tiny_config("llama"), requests, affine)
    assert found.requests[1].arrival_s == found.requests[0].token_times[-1]
    assert found.requests[1].num_cached_tokens == 64, "the answer is in the cache, the stand-in is not"


def test_steps_say_how_many_keys_are_shared():
    prefix = tuple(range(64))
    requests = [WorkloadRequest((*prefix, 100), 3, 0.0), WorkloadRequest((*prefix, 200), 1, 1e-9)]
    seen = []

    def step_s(rows, num_logits, num_shared):
        seen.append((len(rows), num_shared))
        return 1.0

    simulate(options(enable_prefix_caching=True), tiny_config("llama"), requests, step_s)
    assert seen == [(1, 0), (2, 64), (1, 0)]


def test_static_batching_pays_for_its_padding():
    requests = [WorkloadRequest(tuple(range(n)), 2) for n in (10, 40)]
    seen = []

    def step_s(rows, num_logits, num_shared):
        seen.append((rows, num_logits))
        return 1.0

    simulate(options(batching="static"), tiny_config("llama"), requests, step_s)
    assert seen == [([(40, 40), (40, 40)], 2), ([(1, 11), (1, 41)], 2)]


def test_metrics_are_those_of_the_requests():
    requests = [WorkloadRequest((1, 2, 3 + i), 1 + i % 2, 0.5 * i) for i in range(20)]
    found = simulate(options(), tiny_config("llama"), requests, affine)
    samples = samples_of(list(found.requests))
    assert samples["ttft_ms"] == pytest.approx([13.0] * 20)
    assert samples["itl_ms"] == pytest.approx([11.0] * 10) == samples["tpot_ms"]
    assert samples["e2el_ms"] == pytest.approx([13.0, 24.0] * 10)
    assert found.duration_s == pytest.approx(9.5 + 0.024)
    assert samples["output_throughput"] == pytest.approx([30 / 9.524])


def test_timeline_weighs_by_time():
    requests = [WorkloadRequest((1,) * 32, 1, at) for at in (0.0, 0.5, 2.0)]
    found = simulate(
        options(max_num_seqs=1), tiny_config("llama"), requests, lambda rows, num_logits, num_shared: 1.0
    )
    # Steps at 0, 1 and 2: each runs one request; the second waits only from the step after its arrival.
    assert timeline(found, 3)["running"] == pytest.approx([1.0, 1.0, 1.0])
    assert timeline(found, 2)["kv_cache"] == pytest.approx([1 / 20, 1 / 20])
    late = simulate(options(), tiny_config("llama"), requests[::2], lambda rows, num_logits, num_shared: 1.0)
    assert timeline(late, 3)["running"] == pytest.approx([1.0, 0.0, 1.0]), "idle time counts"
    assert sum(timeline(late, 7)["running"]) == pytest.approx(2 * 7 / 3)


def test_a_request_that_the_engine_would_refuse_is_refused():
    with pytest.raises(RequestError, match="prompt has 500 tokens"):
        simulate(options(), tiny_config("llama"), [WorkloadRequest((1,) * 500, 2)], affine)


def test_a_thousand_requests_take_seconds():
    requests = random_requests(1000, seed=9, rate=200.0)
    started = time.process_time()
    found = simulate(options(kv_cache_tokens=8192, max_num_seqs=64), tiny_config("llama"), requests, affine)
    assert found.num_output_tokens == sum(r.max_tokens for r in requests)
    assert time.process_time() - started < 10
