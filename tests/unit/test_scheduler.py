"""What the scheduler decides, case by case: order, chunks, preemption, prefixes, static batches, the end.

The fake executor checks in passing that every request gives the tokens it gives alone.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import random

import pytest

from ridgeline.engine.scheduler import PlanRow, SamplingRow, StepPlan
from ridgeline.errors import RequestError
from ridgeline.request import FinishReason, RequestStatus, Sampled
from ridgeline.sampling_params import SamplingParams
from tests.unit.fake_executor import EOS, Engine, text


def sizes(plan):
    """Tokens per request of a plan, in its order."""
    return {row.request_id: len(row.token_ids) for row in plan.rows}


def wanting(num_tokens, **params):
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, **params)


class TestContinuous:
    def test_a_prompt_is_chunked_and_decode_rows_come_first(self):
        engine = Engine(budget=8)
        engine.add(text(19), wanting(9))
        engine.add(text(6, seed=1), wanting(9))
        assert [sizes(engine.step()) for _ in range(4)] == [
            {"r0": 8},
            {"r0": 8},
            {"r0": 3, "r1": 5},
            {"r0": 1, "r1": 1},
        ]
        engine.add(text(9, seed=2), wanting(9), priority=-1)
        assert sizes(engine.step()) == {"r0": 1, "r1": 1, "r2": 6}
        assert list(sizes(engine.step()))[:2] == ["r0", "r1"], "decode before the chunk, priority or not"
        engine.drain()

    def test_only_the_last_chunk_has_logits(self):
        engine = Engine(budget=8)
        engine.add(text(19), wanting(2))
        rows = [plan.rows[0] for plan in engine.drain()]
        assert [(r.start, r.num_logits, r.samples) for r in rows] == [
            (0, 0, False),
            (8, 0, False),
            (16, 1, True),
            (19, 1, True),
        ]

    def test_without_chunks_a_prompt_waits_until_it_fits(self):
        engine = Engine(budget=20, max_model_len=20, chunked=False)
        engine.add(text(12), wanting(2))
        engine.add(text(9, seed=1), wanting(2))
        engine.add(text(2, seed=2), wanting(2))
        assert sizes(engine.step()) == {"r0": 12}, "in order: the third does not overtake the second"
        assert sizes(engine.step()) == {"r0": 1, "r1": 9, "r2": 2}
        engine.drain()

    def test_lower_priority_numbers_run_first_and_ties_by_arrival(self):
        engine = Engine(max_num_seqs=1)
        for name, priority, arrival in (
            ("a", 1, 0.0),
            ("b", 0, 2.0),
            ("c", 0, 1.0),
            ("d", 0, 1.0),
            ("e", -5, 9.0),
        ):
            engine.add(text(3), wanting(1), request_id=name, priority=priority, arrival=arrival)
        assert [next(iter(sizes(plan))) for plan in engine.drain()] == list("ecdba")

    def test_at_most_max_num_seqs_run(self):
        engine = Engine(max_num_seqs=3, num_blocks=40)
        for seed in range(5):
            engine.add(text(3, seed=seed), wanting(4))
        engine.step()
        assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (3, 2)
        engine.drain()

    def test_one_at_a_time(self):
        engine = Engine(batching="none", max_num_seqs=8)
        for seed in range(3):
            engine.add(text(3, seed=seed), wanting(3))
        assert [sizes(p) for p in engine.drain()] == [{f"r{i}": n} for i in range(3) for n in (3, 1, 1)]

    def test_without_kv_cache_every_step_computes_all_tokens(self):
        engine = Engine(kv_cache=False, budget=40, max_model_len=40)
        engine.add(text(5), wanting(4))
        assert [sizes(p) for p in engine.drain()] == [{"r0": n} for n in (5, 6, 7, 8)]


class TestPreemption:
    def test_the_newest_of_the_lowest_priority_goes_and_comes_back(self):
        engine = Engine(num_blocks=6, prefix=False, max_num_seqs=3)
        engine.add(text(4), wanting(16))
        engine.add(text(4, seed=1), wanting(16))
        engine.add(text(4, seed=2), wanting(16), priority=-1)
        plans = engine.drain()
        preempted = [name for plan in plans for name in plan.preempted]
        assert preempted and set(preempted) <= {"r0", "r1"} and preempted[0] == "r1"
        by_name = {r.request_id: r for r in engine.done}
        assert by_name["r2"].num_preemptions == 0
        assert engine.scheduler.num_preemptions == len(preempted)
        assert [r.request_id for r in engine.done] == ["r2", "r0", "r1"]
        rows = [row for plan in plans for row in plan.rows if row.request_id == "r1"]
        assert any(row.start == 0 and len(row.token_ids) > 4 for row in rows), "it computes its output again"

    def test_published_blocks_help_it_back(self):
        engine = Engine(num_blocks=12, max_num_seqs=2)
        engine.add(text(16), wanting(16))
        engine.add(text(16, seed=1), wanting(12))
        plans = engine.drain()
        at = next(i for i, plan in enumerate(plans) if plan.preempted)
        back = next(row for plan in plans[at:] for row in plan.rows if row.request_id == "r1")
        assert back.start > 0
        victim = next(r for r in engine.done if r.request_id == "r1")
        assert victim.num_preemptions == 1 and victim.num_cached_tokens == 0

    def test_it_goes_to_the_front_of_the_queue(self):
        engine = Engine(num_blocks=5, max_num_seqs=2, prefix=False)
        for seed in range(4):
            engine.add(text(4, seed=seed), wanting(12))
        while not engine.step().preempted:
            pass
        assert engine.scheduler.snapshot().waiting[0] == "r1"
        engine.drain()

    def test_admission_keeps_room_for_the_running_ones(self):
        engine = Engine(num_blocks=6, max_num_seqs=4, prefix=False, max_model_len=24)
        engine.add(text(12), wanting(12))
        engine.add(text(4, seed=1), wanting(12))
        engine.add(text(4, seed=2), wanting(12))
        engine.step()
        assert engine.scheduler.num_running == 2
        engine.drain()

    def test_one_that_needs_no_more_blocks_needs_no_room(self):
        engine = Engine(
            num_blocks=3, block_size=16, max_model_len=16, budget=64, max_num_seqs=3, prefix=False
        )
        for seed in range(3):
            engine.add(text(4, seed=seed), wanting(8))
        assert len(engine.step().rows) == 3, "contiguous cache: every seat can be taken"
        assert engine.scheduler.kv_cache_usage_ratio == 1.0
        assert not any(plan.preempted for plan in engine.drain())


class TestPrefix:
    def test_a_shared_prefix_is_computed_once(self):
        engine = Engine(num_blocks=80, max_num_seqs=32, budget=64)
        shared = text(40)
        for seed in range(32):
            engine.add(shared + text(3, seed=100 + seed), wanting(1))
        engine.drain()
        assert engine.num_computed == 40 + 32 * 3
        assert sum(r.num_cached_tokens for r in engine.done) == engine.pool.stats.num_hit_tokens == 31 * 40
        assert engine.pool.stats.num_queried_tokens == 32 * 43

    def test_also_when_the_prompt_takes_several_steps(self):
        engine = Engine(num_blocks=60, max_num_seqs=8, budget=8)
        for seed in range(8):
            engine.add(text(40) + text(3, seed=100 + seed), wanting(3))
        engine.drain()
        assert engine.num_computed == 40 + 8 * (3 + 2)

    def test_those_who_wait_for_a_prefix_let_others_pass(self):
        engine = Engine(budget=14, num_blocks=40)
        engine.add(text(20), wanting(1))
        engine.add(text(20), wanting(1))
        engine.add(text(2, seed=9), wanting(1))
        plans = [sizes(p) for p in engine.drain()]
        assert plans == [{"r0": 14}, {"r0": 6, "r2": 2}, {"r1": 4}]

    def test_it_waits_no_longer_when_the_other_is_aborted(self):
        engine = Engine(budget=8, num_blocks=40)
        engine.add(text(20), wanting(1))
        engine.add(text(20), wanting(1))
        engine.step()
        engine.abort("r0")
        plan = engine.step()
        assert (plan.rows[0].request_id, plan.rows[0].start, plan.finished) == ("r1", 8, ("r0",))
        engine.drain()

    def test_without_prefix_caching_nobody_waits(self):
        engine = Engine(budget=30, prefix=False)
        engine.add(text(10), wanting(1))
        engine.add(text(10), wanting(1))
        assert sizes(engine.step()) == {"r0": 10, "r1": 10}

    def test_a_whole_prompt_that_hits_computes_its_last_block_again(self):
        engine = Engine()
        engine.add(text(12), wanting(1))
        engine.drain()
        again = engine.add(text(12), wanting(1))
        assert sizes(engine.step()) == {"r1": 4}
        assert again.num_cached_tokens == 8

    def test_prompt_logprobs_compute_everything(self):
        engine = Engine(budget=8)
        engine.add(text(21), wanting(2))
        engine.drain()
        scored = engine.add(text(21), wanting(2, prompt_logprobs=3))
        rows = [plan.rows[0] for plan in engine.drain()]
        assert scored.num_cached_tokens == 0
        assert [(r.num_logits, len(r.sampling.prompt_targets), r.samples) for r in rows] == [
            (8, 8, False),
            (8, 8, False),
            (5, 4, True),
            (1, 0, True),
        ]
        targets = [t for r in rows for t in r.sampling.prompt_targets]
        assert targets == scored.prompt_token_ids[1:]

    def test_each_prompt_token_is_scored_once_though_preempted_or_without_cache(self):
        engine = Engine(num_blocks=8, budget=5, prefix=False, max_num_seqs=2)
        engine.add(text(8), wanting(20))
        engine.add(text(12, seed=1), wanting(12, prompt_logprobs=0))
        plans = engine.drain()
        assert any(plan.preempted for plan in plans)
        engine = Engine(kv_cache=False, budget=40, max_model_len=40)
        engine.add(text(8), wanting(4, prompt_logprobs=0))
        assert [p.rows[0].num_logits for p in engine.drain()] == [8, 1, 1, 1]


class TestStatic:
    def options(self, **options):
        return {"batching": "static", "budget": 60, "max_model_len": 30, "num_blocks": 40} | options

    def test_a_batch_is_padded_and_nobody_joins_until_it_ends(self):
        engine = Engine(**self.options(max_num_seqs=3))
        for i, (length, num_output) in enumerate(((4, 1), (9, 3), (6, 2), (5, 1))):
            engine.add(text(length, seed=i), wanting(num_output))
        plans = engine.drain()
        shapes = [[(r.request_id, len(r.token_ids), r.num_padding) for r in plan.rows] for plan in plans]
        assert shapes == [
            [("r0", 4, 5), ("r1", 9, 0), ("r2", 6, 3)],
            [("r0", 0, 1), ("r1", 1, 0), ("r2", 1, 0)],
            [("r0", 0, 1), ("r1", 1, 0), ("r2", 0, 1)],
            [("r3", 5, 0)],
        ]

    def test_padding_counts_for_the_budget(self):
        engine = Engine(**self.options(budget=30, max_num_seqs=4))
        for i, length in enumerate((3, 3, 12, 12)):
            engine.add(text(length, seed=i), wanting(1))
        assert [len(plan.rows) for plan in engine.drain()] == [2, 2]

    def test_blocks_are_reserved_for_the_whole_answer(self):
        engine = Engine(**self.options(num_blocks=9, max_num_seqs=4))
        for seed in range(3):
            engine.add(text(4, seed=seed), wanting(12))
        plan = engine.step()
        assert [len(row.block_ids) for row in plan.rows] == [4, 4]
        assert not any(p.preempted for p in engine.drain())

    def test_an_aborted_member_stays_as_padding(self):
        engine = Engine(**self.options())
        for seed in range(2):
            engine.add(text(4, seed=seed), wanting(5))
        engine.step()
        engine.abort("r0")
        assert [(r.request_id, r.num_padding) for r in engine.step().rows] == [("r0", 1), ("r1", 0)]
        engine.abort("r1")
        assert engine.step().rows == ()


class TestEnd:
    def token(self, engine, token_id):
        """One step in which every request gets this token."""
        plan = engine.scheduler.schedule()
        return engine.scheduler.update(plan, {r.request_id: Sampled(token_id, 0.0) for r in plan.rows})

    @pytest.mark.parametrize(
        ("params", "token_id", "reason", "stop_reason"),
        [
            ({}, EOS, FinishReason.STOP, None),
            ({"ignore_eos": True}, EOS, None, None),
            ({"stop_token_ids": [5]}, 5, FinishReason.STOP, 5),
            ({"stop_token_ids": [5]}, 6, None, None),
            ({"stop_token_ids": [5], "min_tokens": 2}, 5, None, None),
            ({"min_tokens": 2}, EOS, None, None),
            ({"min_tokens": 1}, EOS, FinishReason.STOP, None),
            ({"max_tokens": 1}, 9, FinishReason.LENGTH, None),
            ({"max_tokens": 1}, EOS, FinishReason.STOP, None),
            ({"max_tokens": None}, 9, None, None),
        ],
    )
    def test_why_a_request_ends(self, params, token_id, reason, stop_reason):
        engine = Engine()
        request = engine.add(text(4), SamplingParams(**({"max_tokens": 9} | params)))
        assert self.token(engine, token_id) == [request]
        assert (request.finish_reason, request.stop_reason) == (reason, stop_reason)
        assert request.output_token_ids == [token_id]
        assert engine.scheduler.has_unfinished == (reason is None)

    def test_forbidden_tokens_until_min_tokens(self):
        engine = Engine()
        engine.add(
            text(4), SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=(7, 8), ignore_eos=True)
        )
        rows = [plan.rows[0] for plan in engine.drain()]
        assert [row.sampling.forbidden_token_ids for row in rows[:3]] == [(EOS, 7, 8), (EOS, 7, 8), ()]

    @pytest.mark.parametrize(("options", "length"), [({"max_model_len": 20}, 20), ({"num_blocks": 3}, 12)])
    def test_no_more_than_the_model_or_the_cache_holds(self, options, length):
        engine = Engine(**options)
        request = engine.add(text(5), SamplingParams(max_tokens=None, ignore_eos=True))
        engine.drain()
        assert request.num_tokens == length and request.finish_reason is FinishReason.LENGTH

    def test_a_window_lets_a_request_outgrow_the_cache(self):
        engine = Engine(num_blocks=8, window=6, max_model_len=200)
        request = engine.add(text(50), SamplingParams(max_tokens=None, ignore_eos=True))
        engine.drain()
        assert request.num_tokens == 200 and request.num_preemptions == 0

    def test_behind_a_window_a_long_prompt_needs_little_room(self):
        engine = Engine(num_blocks=12, window=6, budget=8, max_model_len=200)
        engine.add(text(4), wanting(40))
        engine.add(text(60, seed=1), wanting(3))
        engine.step()
        engine.step()
        assert engine.scheduler.num_running == 2
        engine.drain()

    @pytest.mark.parametrize(
        ("options", "length", "words"),
        [
            ({}, 0, "empty"),
            ({}, 64, r"has 64 tokens; with max_model_len=64 at most 63"),
            (
                {"num_blocks": 3, "block_size": 32, "max_model_len": 2048},
                900,
                r"900 .* holds 96 \(3 blocks of 32\)",
            ),
            ({"chunked": False, "budget": 16}, 16, r"16 tokens; .* max_num_batched_tokens=16"),
        ],
    )
    def test_a_prompt_that_never_fits_is_refused_with_the_numbers(self, options, length, words):
        engine = Engine(**options)
        with pytest.raises(RequestError, match=words):
            engine.add(text(length))
        assert not engine.scheduler.has_unfinished
        if length:
            engine.add(
                text(length if length < 64 else 63)[: engine.scheduler.max_request_tokens - 1], wanting(1)
            )
            engine.drain()

    def test_abort_frees_at_once_even_with_a_step_in_flight(self):
        engine = Engine()
        request = engine.add(text(9), wanting(9))
        engine.step()
        engine.step(meanwhile=lambda: engine.abort("r0"))
        assert request.status is RequestStatus.FINISHED and len(request.output_token_ids) == 1
        assert engine.pool.num_free == 16
        assert engine.scheduler.abort("r0") is None
        assert engine.step().finished == ("r0",)
        assert engine.step().finished == ()

    def test_results_of_a_plan_before_a_preemption_are_not_taken(self):
        """As with several steps in flight: the request is back at the same position, in other blocks."""
        engine = Engine(budget=4, prefix=False)
        request = engine.add(text(8), wanting(2))
        scheduler = engine.scheduler
        old = scheduler.schedule()
        scheduler._preempt(request)
        new = scheduler.schedule()
        assert old.rows[0].start == new.rows[0].start == 0
        scheduler.update(old, {})
        assert request.num_computed_tokens == 0
        scheduler.update(new, {})
        assert request.num_computed_tokens == 4

    def test_tokens_in_flight_are_not_planned_again(self):
        engine = Engine()
        request = engine.add(text(8), wanting(5))
        plans = [engine.scheduler.schedule() for _ in range(2)]
        assert request.is_in_flight and not plans[1].rows
        for plan in plans:
            engine.scheduler.update(plan, {"r0": Sampled(9, 0.0)})
        assert request.output_token_ids == [9] and request.num_computed_tokens == 8

    def test_500_waiting(self):
        engine = Engine(num_blocks=30, max_num_seqs=8, budget=32)
        for seed in range(500):
            engine.add(text(1 + seed % 13, seed=seed % 40), wanting(1 + seed % 5))
        plans = engine.drain()
        assert len(engine.done) == 500 and len(plans) < 500

    def test_a_stream_of_short_ones_does_not_starve_a_long_one(self):
        engine = Engine(num_blocks=8, budget=32, max_model_len=32, chunked=False)
        engine.add(text(4), wanting(4))
        long = engine.add(text(27, seed=1), wanting(2))
        for i in range(60):
            engine.add(text(3, seed=i), wanting(3))
            engine.step()
        assert long.finish_reason is FinishReason.LENGTH
        engine.drain()


def workload(**options):
    """A seeded workload with everything in it -> its engine and plans."""
    engine, rng, plans = Engine(**options), random.Random(7), []
    for i in range(10):
        prompt = text(rng.choice((0, 8, 12))) + text(rng.randrange(1, 12), seed=i)
        scores = 0 if i == 3 else None
        engine.add(prompt, wanting(rng.randrange(1, 9), prompt_logprobs=scores), priority=i % 3 - 1)
        plans += [engine.step() for _ in range(rng.randrange(2))]
        if i == 6:
            engine.abort(sorted(engine.live)[0])
    return engine, plans + engine.drain()


def plan_of(fields):
    """A StepPlan from plain data."""
    rows = []
    for row in fields["rows"]:
        sampling = row["sampling"]
        if sampling is not None:
            lists = {k: tuple(v) if isinstance(v, list) else v for k, v in sampling.items()}
            sampling = SamplingRow(**(lists | {"params": SamplingParams(**sampling["params"])}))
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        rows.append(PlanRow(**(lists | {"sampling": sampling})))
    return StepPlan(fields["step"], tuple(rows), tuple(fields["preempted"]), tuple(fields["finished"]))


def test_a_plan_survives_json_and_pickle():
    engine, plans = workload(num_blocks=10, budget=12)
    engine.add(text(5), SamplingParams(repetition_penalty=1.5, stop="x", logit_bias={3: 1.5}, min_tokens=2))
    plans.append(engine.step())
    for plan in plans:
        assert plan_of(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan
        assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_plan_does_not_change_after_it_was_made():
    engine = Engine()
    engine.add(text(5), wanting(6, repetition_penalty=1.5))
    plans = []
    before = []
    while engine.scheduler.has_unfinished:
        plans.append(engine.step())
        before.append(pickle.dumps(plans[-1]))
    assert [pickle.dumps(p) for p in plans] == before
    assert [len(p.rows[0].sampling.output_token_ids) for p in plans] == list(range(6))


def test_a_snapshot_is_plain_data():
    engine = Engine(max_num_seqs=2, num_blocks=20)
    for seed in range(3):
        engine.add(text(6, seed=seed), wanting(3))
    engine.step()
    snapshot = engine.scheduler.snapshot()
    assert json.loads(json.dumps(dataclasses.asdict(snapshot))) == {
        "running": ["r0", "r1"],
        "waiting": ["r2"],
        "blocks": {"free": 16, "cached": 0, "referenced": 4},
        "tables": {"r0": [0, 1], "r1": [2, 3]},
        "num_preemptions": 0,
    }
