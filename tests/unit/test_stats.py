"""Counters and histograms, with times that are given."""

from __future__ import annotations

import json

import pytest

from ridgeline.engine.stats import BUCKETS_S, EngineStats, Histogram
from ridgeline.request import FinishReason
from ridgeline.sampling_params import SamplingParams
from tests.unit.fake_executor import Engine, text


def test_a_bucket_holds_what_is_at_most_its_bound():
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 0.0025, 1e6):
        histogram.observe(seconds)
    snapshot = histogram.snapshot()
    counted = {bound: n for bound, n in zip([*BUCKETS_S, "above"], snapshot["counts"], strict=True) if n}
    assert counted == {0.0001: 1, 0.001: 1, 0.0025: 2, "above": 1}
    assert snapshot["count"] == 5 and snapshot["sum"] == pytest.approx(1e6 + 0.0046)
    assert list(BUCKETS_S) == sorted(set(BUCKETS_S))


def step(engine, stats, started, now):
    plan = engine.scheduler.schedule()
    changed = engine.scheduler.update(plan, engine.execute(plan))
    stats.record_step(changed, started=started, now=now)


def test_a_run_is_counted():
    engine = Engine(budget=8)
    stats = EngineStats(engine.scheduler)
    first = engine.add(text(12), SamplingParams(max_tokens=3, ignore_eos=True), arrival=10.0)
    second = engine.add(text(13), SamplingParams(max_tokens=9, ignore_eos=True), arrival=11.0)
    for i in range(4):  # the second waits for the prefix that the first computes in steps 0 and 1
        step(engine, stats, 12.0 + i, 12.5 + i)
    during = stats.snapshot()
    assert (during["num_requests_running"], during["num_requests_waiting"]) == (1, 0)
    assert during["kv_cache_usage_ratio"] == 4 / 16
    engine.scheduler.abort(second.request_id)
    stats.record_finish(second, now=20.0)
    after = json.loads(json.dumps(stats.snapshot()))
    counted = {name: value for name, value in after.items() if isinstance(value, (int, float))}
    assert counted == {
        "num_requests_running": 0,
        "num_requests_waiting": 0,
        "kv_cache_usage_ratio": 0.0,
        "num_steps_total": 4,
        "num_preemptions_total": 0,
        "prompt_tokens_total": 25,
        "generation_tokens_total": 5,
        "prefix_cache_queries_total": 25,
        "prefix_cache_hits_total": 12,
        "num_evicted_blocks_total": 0,
    }
    assert after["request_success_total"] == {"stop": 0, "length": 1, "abort": 1, "error": 0}
    histograms = {
        name: (value["count"], value["sum"]) for name, value in after.items() if "counts" in str(value)
    }
    assert histograms == {
        "time_to_first_token_seconds": (2, 3.5 + 3.5),
        "inter_token_latency_seconds": (3, 3.0),
        "e2e_request_latency_seconds": (2, 5.5 + 9.0),
        "step_time_seconds": (4, 2.0),
    }
    assert first.finish_reason is FinishReason.LENGTH


def test_scores_of_a_prompt_are_no_token():
    engine = Engine(budget=4)
    stats = EngineStats(engine.scheduler)
    engine.add(text(9), SamplingParams(max_tokens=1, prompt_logprobs=0))
    step(engine, stats, 0.0, 1.0)
    assert stats.snapshot()["generation_tokens_total"] == 0
    step(engine, stats, 1.0, 2.0)
    step(engine, stats, 2.0, 3.0)
    assert stats.snapshot()["generation_tokens_total"] == 1
    assert stats.snapshot()["prompt_tokens_total"] == 9


def test_an_id_that_comes_back_is_a_new_request():
    engine = Engine()
    stats = EngineStats(engine.scheduler)
    for i in range(2):
        engine.add(text(5), SamplingParams(max_tokens=1), request_id="again", arrival=float(i))
        step(engine, stats, i, i + 2.0)
        engine.live.clear()
    assert stats.snapshot()["time_to_first_token_seconds"]["count"] == 2
    assert stats.snapshot()["prompt_tokens_total"] == 10


def test_a_preempted_request_is_counted_once():
    engine = Engine(num_blocks=5, max_num_seqs=2, prefix=False)
    stats = EngineStats(engine.scheduler)
    for seed in range(2):
        engine.add(text(4, seed=seed), SamplingParams(max_tokens=12, ignore_eos=True))
    now = 0.0
    while engine.scheduler.has_unfinished:
        step(engine, stats, now, now + 1)
        now += 1
    snapshot = stats.snapshot()
    assert snapshot["num_preemptions_total"] > 0
    assert (snapshot["prompt_tokens_total"], snapshot["generation_tokens_total"]) == (8, 24)
    assert snapshot["time_to_first_token_seconds"]["count"] == 2
    assert snapshot["inter_token_latency_seconds"]["count"] == 22
