"""A model without numbers: it shows whether a schedule computes what each request would compute alone.

The cache is a dict from slot to a hash of the token, its position and the hash before it, as K and V depend
on all that came before. The next token is a hash of everything the table shows. So a wrong block, a stale or
unearned prefix hit, a block evicted too early or a token computed twice changes the tokens of a request.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

from ridgeline.config import SchedulerConfig
from ridgeline.engine.scheduler import Scheduler, largest_plan
from ridgeline.kvcache.block_pool import BlockPool, chain_hash
from ridgeline.kvcache.manager import BlockManager
from ridgeline.request import FinishReason, Request, RequestStatus, Sampled
from ridgeline.sampling_params import SamplingParams

VOCAB_SIZE = 50
EOS = 0
NOTHING = 7


def attend(kv_at, position, window, num_sinks):
    """Hash of what the token at `position` sees."""
    first = 0 if window is None else max(0, position - window + 1)
    sinks = range(min(num_sinks, first))
    return hash(tuple(kv_at(p) for p in (*sinks, *range(first, position + 1))))


def kv(token_id, position, previous):
    return hash((token_id, position, previous))


def choose(state, seed, forbidden):
    token_id = hash((state, seed)) % VOCAB_SIZE
    while token_id in forbidden:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def score(state):
    return float(state % 1009)


class Alone:
    """The definition: one request, one list, no schedule."""

    def __init__(self, prompt, params, *, seed, limit, window=None, num_sinks=0):
        self.kv = []
        self.states = []
        self.tokens = []
        self.view = window, num_sinks
        for token_id in prompt:
            self.push(token_id)
        self.scores = [score(s) for s in self.states[:-1]]
        stops = {EOS, *params.stop_token_ids}
        self.reason = self.stop_reason = None
        while self.reason is None:
            early = len(self.tokens) < params.min_tokens
            token_id = choose(self.states[-1], seed, stops if early else ())
            self.tokens.append(token_id)
            self.push(token_id)
            enough = len(self.tokens) >= params.min_tokens
            if enough and token_id in params.stop_token_ids:
                self.reason, self.stop_reason = FinishReason.STOP, token_id
            elif enough and token_id == EOS and not params.ignore_eos:
                self.reason = FinishReason.STOP
            elif len(self.tokens) == params.max_tokens or len(prompt) + len(self.tokens) == limit:
                self.reason = FinishReason.LENGTH

    def push(self, token_id):
        position = len(self.kv)
        previous = self.kv[-1] if self.kv and self.view[0] != 1 else NOTHING
        self.kv.append(kv(token_id, position, previous))
        self.states.append(attend(self.kv.__getitem__, position, *self.view))


class Engine:
    """Scheduler, pool and fake executor; every step is checked."""

    def __init__(
        self,
        *,
        num_blocks=16,
        block_size=4,
        max_num_seqs=4,
        budget=16,
        max_model_len=64,
        batching="continuous",
        chunked=None,
        prefix=None,
        kv_cache=True,
        window=None,
        num_sinks=0,
        hash_function=chain_hash,
        max_in_flight=1,
    ):
        chunked = (kv_cache and batching != "static") if chunked is None else chunked
        prefix = (kv_cache and batching == "continuous") if prefix is None else prefix
        self.config = SchedulerConfig(
            batching=batching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_chunked_prefill=chunked,
        )
        self.pool = BlockPool(
            num_blocks, block_size, enable_prefix_caching=prefix, hash_function=hash_function
        )
        self.manager = BlockManager(self.pool, window=window, num_sinks=num_sinks)
        self.scheduler = Scheduler(
            self.config,
            self.manager,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            kv_cache=kv_cache,
            max_in_flight=max_in_flight,
        )
        self.max_in_flight = max_in_flight
        self.restarted = False
        """Whether a request has begun under the name of one that was aborted in flight."""
        self.in_flight = deque()
        self.most_in_flight = 0
        self.num_followed = 0
        """Chunks that were planned while an earlier one of their request was in flight."""
        self.view = {"window": window, "num_sinks": num_sinks}
        self.static = batching == "static"
        self.block_size = block_size
        self.slots = {}
        self.num_computed = 0
        self.live = {}
        self.done = []
        self.scores = {}
        self.num_added = 0

    def add(self, prompt, params=None, *, request_id=None, priority=0, arrival=None, seed=0):
        params = params or SamplingParams(max_tokens=4, ignore_eos=True)
        request_id = request_id or f"r{self.num_added}"
        arrival = float(self.num_added) if arrival is None else arrival
        request = Request(request_id, list(prompt), params, arrival, seed=seed, priority=priority)
        self.scheduler.validate(request)
        self.num_added += 1
        self.scheduler.add(request)
        self.live[request_id] = request
        self.scores[request_id] = []
        return request

    def abort(self, request_id):
        request = self.scheduler.abort(request_id)
        assert request is self.live.pop(request_id)
        assert request.finish_reason is FinishReason.ABORT and not self.manager.table(request)
        self.scheduler.check_invariants()
        return request

    def step(self, meanwhile=None):
        """One step -> the plan whose results were taken. `meanwhile` runs while it is in flight."""
        while len(self.in_flight) < self.max_in_flight:
            running = self.scheduler.snapshot().running
            plan = self.scheduler.schedule()
            if plan.preempted:
                rows = {r.request_id for r in plan.rows}
                assert rows <= set(running), "one goes and another comes in one step"
            if self.in_flight and not plan.rows:
                break
            self.check_plan(plan)
            self.check_chunks(plan)
            self.in_flight.append((plan, self.execute(plan), dict(self.live)))
            self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
            self.scheduler.check_invariants()
        plan, sampled, before = self.in_flight.popleft()
        if meanwhile is not None:
            meanwhile()
        for request in self.scheduler.update(plan, sampled):
            same = before.get(request.request_id) is request
            assert same, "a row of an earlier request was taken for this one's"
            self.scores[request.request_id] += [e[0] for e in sampled[request.request_id].prompt_logprobs]
            if request.status is RequestStatus.FINISHED:
                self.check_finished(self.live.pop(request.request_id))
        self.scheduler.check_invariants()
        self.check_published()
        return plan

    def drain(self, limit=3000):
        """Step until nothing is left -> the plans. Fails if that takes longer than it ever should."""
        plans = []
        while self.scheduler.has_unfinished or self.in_flight:
            plans.append(self.step())
            assert len(plans) < limit, "requests starve"
        assert not self.live and self.pool.num_free == self.pool.num_blocks
        return plans

    def check_plan(self, plan):
        config, rows = self.config, plan.rows
        limit = largest_plan(config, self.max_in_flight)
        assert sum(len(r.token_ids) + r.num_padding for r in rows) <= limit <= config.max_num_batched_tokens
        assert len(rows) <= config.max_num_seqs
        assert config.batching != "none" or len(rows) <= 1
        assert len({r.request_id for r in rows}) == len(rows)
        for row in rows:
            assert (row.sampling is not None) == (row.num_logits > 0) and row.samples <= (row.num_logits > 0)
            if not row.token_ids:
                assert row == replace(row, start=0, block_ids=(), num_logits=0, sampling=None)
                assert self.static and row.num_padding
                continue
            request = self.live[row.request_id]
            end = row.start + len(row.token_ids)
            assert row.token_ids == tuple(request.tokens(row.start, end))
            assert row.samples == (end == request.num_tokens)
            assert self.static or not row.num_padding
            if not config.enable_chunked_prefill:
                assert row.samples
            if request.params.prompt_logprobs is None:
                assert row.num_logits == row.samples
        if self.static:
            assert len({len(r.token_ids) + r.num_padding for r in rows}) <= 1, "not padded to the longest"

    def check_chunks(self, plan):
        """Of a request that is in flight only a later chunk may follow, and never what a token is waited for."""
        under_way = {r.request_id: r for other, _, _ in self.in_flight for r in other.rows}
        for row in plan.rows:
            before = under_way.get(row.request_id)
            if before is not None and not self.restarted:
                assert not before.samples and row.start == before.start + len(before.token_ids)
                self.num_followed += 1

    def execute(self, plan):
        written = set()
        for row in plan.rows:
            for i, token_id in enumerate(row.token_ids):
                position = row.start + i
                slot = self.slot(row, position)
                assert slot not in written, "two requests write one slot"
                assert self.pool.content_of(slot // self.block_size) is None, "a published block is written"
                written.add(slot)
                far = position == 0 or self.view["window"] == 1
                previous = NOTHING if far else self.slots[self.slot(row, position - 1)][1]
                self.slots[slot] = token_id, kv(token_id, position, previous)
                self.num_computed += 1
        sampled = {}
        for row in plan.rows:
            if row.num_logits:
                sampled[row.request_id] = self.sample(row)
        return sampled

    def sample(self, row):
        end = row.start + len(row.token_ids)
        states = [
            attend(lambda p: self.slots[self.slot(row, p)][1], position, *self.view.values())
            for position in range(end - row.num_logits, end)
        ]
        sampling = row.sampling
        request = self.live[row.request_id]
        assert sampling.num_output == len(request.output_token_ids)
        if sampling.params.needs_history:
            assert sampling.prompt_token_ids == tuple(request.prompt_token_ids)
            assert sampling.output_token_ids == tuple(request.output_token_ids)
        targets = sampling.prompt_targets
        scores = tuple(((t, score(s), 1),) for t, s in zip(targets, states, strict=False))
        assert len(scores) == len(targets)
        token_id = choose(states[-1], sampling.seed, sampling.forbidden_token_ids) if row.samples else -1
        return Sampled(token_id, 0.0, prompt_logprobs=scores)

    def slot(self, row, position):
        block_id = row.block_ids[position // self.block_size]
        assert block_id >= 0, "a block behind the window is used"
        return block_id * self.block_size + position % self.block_size

    def check_finished(self, request):
        self.done.append(request)
        params, prompt = request.params, request.prompt_token_ids
        limit = self.scheduler.max_request_tokens
        alone = Alone(prompt, params, seed=request.seed, limit=limit, **self.view)
        assert request.output_token_ids == alone.tokens
        assert (request.finish_reason, request.stop_reason) == (alone.reason, alone.stop_reason)
        if params.prompt_logprobs is not None:
            expected = [(t, s, 1) for t, s in zip(prompt[1:], alone.scores, strict=True)]
            assert self.scores[request.request_id] == expected
        assert not self.manager.table(request)

    def check_published(self):
        """What the index says a block holds is what was computed into it."""
        for block_id in range(self.pool.num_blocks):
            content = self.pool.content_of(block_id)
            if content is not None:
                first = block_id * self.block_size
                held = tuple(self.slots[s][0] for s in range(first, first + self.block_size))
                assert held == content.token_ids


def text(length, seed=0):
    """Token ids without EOS."""
    rng = random.Random(seed)
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]
