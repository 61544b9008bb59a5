"""Which tokens of which requests are computed in the next step: plain Python, no tensors, no phases.

Every request has `num_computed_tokens`; a step lets it catch up with its tokens. Prefill, chunks, decode,
prefix hits and recomputation after preemption are the same thing with different numbers, and so are the
switches: no batching is one sequence, no cache is a counter set back to 0, static batching is admission
only when a batch has ended. The result is a `StepPlan`, the contract between deciding and computing. In a
pipeline several plans are under way: a prompt's next chunk need not wait for the one before, a token must.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass

from ridgeline.config import SchedulerConfig
from ridgeline.errors import RequestError
from ridgeline.kvcache.block_pool import Content
from ridgeline.kvcache.manager import BlockManager
from ridgeline.pickles import pickled_by_position
from ridgeline.request import FinishReason, Request, RequestStatus, Sampled
from ridgeline.sampling_params import SamplingParams

WEIGHTS_AS_TOKENS = 8
"""Tokens of a prompt that take a core as long to compute as its weights take to read, measured."""


@pickled_by_position
@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the executor needs to choose a token, or to score prompt tokens."""

    params: SamplingParams
    seed: int
    num_output: int
    """Index of the output token to be chosen: the counter of the random hash."""
    forbidden_token_ids: tuple[int, ...] = ()
    """Tokens that may not be chosen yet (min_tokens)."""
    prompt_token_ids: tuple[int, ...] = ()
    output_token_ids: tuple[int, ...] = ()
    """Both only where params.needs_history."""
    prompt_targets: tuple[int, ...] = ()
    """With prompt_logprobs: the prompt tokens that the first logit rows predict, in order."""


@pickled_by_position
@dataclass(frozen=True, slots=True)
class PlanRow:
    """The part of one request in a step."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    """Position of the first token."""
    block_ids: tuple[int, ...]
    num_logits: int
    """The last so many tokens of the row get logits."""
    num_padding: int = 0
    """Rows computed for nothing (static batching)."""
    samples: bool = False
    """A token is chosen from the last logits."""
    sampling: SamplingRow | None = None


@pickled_by_position
@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Picklable, JSON-able, free of tensors."""

    step: int
    rows: tuple[PlanRow, ...]
    preempted: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    """Requests that ended since the plan before."""


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """State for statistics and displays."""

    running: tuple[str, ...]
    waiting: tuple[str, ...]
    blocks: dict[str, int]
    tables: dict[str, tuple[int, ...]]
    num_preemptions: int


def largest_plan(config: SchedulerConfig, max_in_flight: int) -> int:
    """Tokens of the largest plan that a resolved config allows with so many plans in flight."""
    budget = config.max_num_batched_tokens
    assert budget is not None
    if max_in_flight == 1 or not config.enable_chunked_prefill or config.batching == "static":
        return budget
    seats = -(-config.max_num_seqs // max_in_flight)
    return min(seats + _chunk_tokens(budget, max_in_flight), budget)


def _chunk_tokens(num_prompt: int, max_in_flight: int) -> int:
    """P tokens in chunks of c go through s stages in P / c + s - 1 steps of c tokens and the weights, which
    are as much work as w tokens: least at c^2 = w P / (s - 1)."""
    return max(1, math.ceil(math.sqrt(WEIGHTS_AS_TOKENS * num_prompt / (max_in_flight - 1))))


class Scheduler:
    """Owns the requests between arrival and finish.

    Invariant: a request is in exactly one of waiting and running, each ordered by priority and arrival.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        manager: BlockManager,
        *,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        kv_cache: bool = True,
        max_in_flight: int = 1,
    ) -> None:
        """`config` is resolved: its None fields are decided. `max_in_flight`: plans whose results are not
        known yet, one for each stage of a pipeline. Chunks of a prompt may be in several of them."""
        assert config.max_num_batched_tokens is not None and config.enable_chunked_prefill is not None
        assert kv_cache or not manager.pool.enable_prefix_caching
        self.manager = manager
        self._static = config.batching == "static"
        self._max_num_seqs = 1 if config.batching == "none" else config.max_num_seqs
        self._budget = config.max_num_batched_tokens
        self._chunked = config.enable_chunked_prefill
        self._kv_cache = kv_cache
        self._max_model_len = max_model_len
        self._capacity = manager.max_request_tokens(self._budget)
        limits = (self._capacity, None if self._chunked else self._budget)
        self.max_request_tokens = min([max_model_len, *(n for n in limits if n is not None)])
        """Prompt and output of the longest request that can be served."""
        self._eos = eos_token_ids
        self._watermark = -(-manager.pool.num_blocks // 100)
        self._requests: dict[str, Request] = {}
        self._order: dict[str, tuple[int, float, int]] = {}
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._batch: list[Request] = []
        """Static batching: members of the batch, the finished ones included."""
        self._num_scored: dict[str, int] = {}
        """Prompt tokens whose log-probabilities were given out."""
        self._admitted: dict[str, int] = {}
        """Step in which a running request was admitted: rows of earlier plans are not its own."""
        self._finished: list[str] = []
        self._max_in_flight = max_in_flight
        self._num_steps = 0
        self._num_added = 0
        self.num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def validate(self, request: Request) -> None:
        """Raise RequestError, with the numbers, for a request that can never be served."""
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise RequestError("the prompt is empty; give at least one token")
        if num_prompt < self.max_request_tokens:
            return
        given = f"prompt has {num_prompt} tokens"
        if self.max_request_tokens == self._max_model_len:
            raise RequestError(
                f"{given}; with max_model_len={self._max_model_len} at most {self._max_model_len - 1} leave "
                "room for an answer. Shorten it, or raise max_model_len"
            )
        if self.max_request_tokens == self._capacity:
            block_size = self.manager.block_size
            raise RequestError(
                f"{given}; the cache holds {self._capacity} ({self._capacity // block_size} blocks of "
                f"{block_size}), one of them for the answer. Shorten it, or give the cache more memory "
                "(kv_cache_memory_bytes, kv_cache_tokens)"
            )
        raise RequestError(
            f"{given}; without chunked prefill at most max_num_batched_tokens={self._budget} are computed in "
            "one step, one of them for the answer. Shorten it, raise max_num_batched_tokens, or chunk prefill"
        )

    def add(self, request: Request) -> None:
        """Queue a request that `validate` accepted."""
        assert request.request_id not in self._requests
        self._requests[request.request_id] = request
        self._order[request.request_id] = (request.priority, request.arrival_time, self._num_added)
        self._num_added += 1
        self._enqueue(request)

    def abort(self, request_id: str) -> Request | None:
        """End a request at any moment; its blocks are free at once. None if it is not here."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, FinishReason.ABORT, None)
        return request

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a request for a reason found outside: a stop string. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, reason, stop_reason)

    def fail_running(self) -> list[Request]:
        """End every running request with an error, and forget what the cache holds: the executor lost it.

        Waiting requests stay, and plans that are in flight may be forgotten -> the ended requests.
        """
        ended = list(self._running)
        for request in ended:
            self._end(request, FinishReason.ERROR, None)
        self._batch = []
        self.manager.pool.forget_content()
        return ended

    def schedule(self) -> StepPlan:
        """Decide the next step. It has no rows only when there is nothing to do, or all is in flight."""
        preempted: list[str] = []
        rows = self._schedule_static() if self._static else self._schedule_continuous(preempted)
        assert rows or self._is_any_in_flight or not self._requests, "requests are left, but none can run"
        self._num_steps += 1
        finished, self._finished = tuple(self._finished), []
        return StepPlan(self._num_steps - 1, tuple(rows), tuple(preempted), finished)

    def update(self, plan: StepPlan, sampled: Mapping[str, Sampled]) -> list[Request]:
        """Record what a step computed -> requests that got a token or prompt scores.

        Rows of requests that were aborted, preempted or restarted since the plan are ignored.
        """
        changed: list[Request] = []
        for row in plan.rows:
            request = self._requests.get(row.request_id)
            if request is None or plan.step < self._admitted.get(row.request_id, plan.step + 1):
                continue
            if not row.token_ids:
                continue
            assert row.start == request.num_computed_tokens
            request.num_computed_tokens += len(row.token_ids)
            self.manager.publish(request)
            if row.sampling is not None:
                self._num_scored[row.request_id] = self._num_scored.get(row.request_id, 0) + len(
                    row.sampling.prompt_targets
                )
                changed.append(request)
            if row.samples:
                self._append(request, sampled[row.request_id].token_id)
            if not self._kv_cache:
                request.num_computed_tokens = request.num_planned_tokens = 0
        return changed

    @property
    def kv_cache_usage_ratio(self) -> float:
        """Share of the blocks that requests hold, 0 to 1."""
        pool = self.manager.pool
        return 1.0 - pool.num_free / pool.num_blocks

    def snapshot(self) -> SchedulerSnapshot:
        """Plain data about this moment."""
        return SchedulerSnapshot(
            tuple(r.request_id for r in self._running),
            tuple(r.request_id for r in self._waiting),
            self.manager.pool.counts(),
            {r.request_id: tuple(self.manager.table(r)) for r in self._running},
            self.num_preemptions,
        )

    def check_invariants(self) -> None:
        """Assert what must hold between steps."""
        self.manager.check_invariants()
        assert len(self._waiting) + len(self._running) == len(self._requests)
        assert len(self._running) <= self._max_num_seqs
        assert self._admitted.keys() == {r.request_id for r in self._running}
        for queue, status in ((self._waiting, RequestStatus.WAITING), (self._running, RequestStatus.RUNNING)):
            assert queue == sorted(queue, key=self._key)
            for request in queue:
                assert request.status is status
                assert request.num_computed_tokens <= request.num_planned_tokens <= request.num_tokens
                assert request.num_tokens <= self.max_request_tokens
        for request in self._waiting:
            assert request.num_planned_tokens == 0 and not self.manager.table(request)
        for request in self._running:
            assert self.manager.num_missing(request, request.num_planned_tokens) == 0

    def _key(self, request: Request) -> tuple[int, float, int]:
        return self._order[request.request_id]

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        insort(self._waiting, request, key=self._key)

    def _schedule_continuous(self, preempted: list[str]) -> list[PlanRow]:
        planned: dict[str, int] = {}  # request id -> tokens of this step, in plan order
        seats = self._seats()
        budget = self._plan_budget(seats)
        wants = [(r, r.num_tokens - r.num_planned_tokens) for r in self._running]
        for request, wanted in sorted(wants, key=lambda pair: pair[1] > 1):  # decode rows first; stable
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted a moment ago
            num_new = self._grant(wanted, budget)
            # A request in flight is at a later chunk of its prompt, and its seat is in an earlier plan.
            if num_new == 0 or (len(planned) >= seats and not request.is_in_flight):
                continue
            while not self.manager.allocate(request, request.num_planned_tokens + num_new):
                victim = next((r for r in reversed(self._running) if not r.is_in_flight), request)
                if request.is_in_flight or (victim is request and self._is_any_in_flight):
                    break  # what is in flight may give blocks back
                budget += planned.pop(victim.request_id, 0)
                self._preempt(victim)
                preempted.append(victim.request_id)
                if victim is request:
                    break
            else:
                planned[request.request_id] = num_new
                budget -= num_new
        if not preempted:
            self._admit(planned, budget, seats)
        return [self._row(self._requests[i], n) for i, n in planned.items()]

    @property
    def _is_any_in_flight(self) -> bool:
        return any(r.is_in_flight for r in self._running)

    def _seats(self) -> int:
        """Requests of one plan: those that can run are dealt out evenly to the plans in flight."""
        if self._max_in_flight == 1:
            return self._max_num_seqs
        num_runnable = min(len(self._running) + len(self._waiting), self._max_num_seqs)
        return -(-num_runnable // self._max_in_flight)

    def _plan_budget(self, seats: int) -> int:
        """Tokens of one plan: in a pipeline the decode rows and a chunk of the prompts, of which no more are
        looked at than one process would compute in a step."""
        if self._max_in_flight == 1 or not self._chunked:
            return self._budget
        missing = [r.num_tokens - r.num_planned_tokens for r in self._running]
        num_decode = min(missing.count(1), seats)
        arriving = self._waiting[: self._max_num_seqs - len(self._running)]
        num_prompt = sum(n for n in missing if n > 1) + sum(r.num_tokens for r in arriving)
        num_prompt = min(num_prompt, self._budget)
        return min(num_decode + _chunk_tokens(num_prompt, self._max_in_flight), self._budget)

    def _grant(self, wanted: int, budget: int) -> int:
        """Tokens that a request may compute now: what it wants, as far as the budget and chunking allow."""
        if wanted <= budget:
            return wanted
        return budget if self._chunked else 0

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks; it computes its tokens again later (published blocks may help)."""
        self.manager.free(request)
        self._running.remove(request)
        del self._admitted[request.request_id]
        request.num_computed_tokens = request.num_planned_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(request)

    def _admit(self, planned: dict[str, int], budget: int, seats: int) -> None:
        """Let waiting requests run, in order, while there are seats, budget and blocks."""
        for request in list(self._waiting):
            if budget <= 0 or len(self._running) >= self._max_num_seqs or len(planned) >= seats:
                return
            matched = self.manager.match_prefix(request)
            if self._is_being_computed(request, len(matched)):
                continue
            num_matched = len(matched) * self.manager.block_size
            num_new = self._grant(request.num_tokens - num_matched, budget)
            if num_new == 0 or not self._has_room(request, matched):
                return
            self.manager.adopt(request, matched)
            has_blocks = self.manager.allocate(request, num_matched + num_new)
            assert has_blocks, "there was room a moment ago"
            self._run(request)
            planned[request.request_id] = num_new
            budget -= num_new

    def _run(self, request: Request) -> None:
        """Move a request that has its blocks from waiting to running."""
        self._waiting.remove(request)
        request.status = RequestStatus.RUNNING
        self._admitted[request.request_id] = self._num_steps
        insort(self._running, request, key=self._key)

    def _has_room(self, request: Request, matched: list[Content]) -> bool:
        """Blocks for all its tokens, and some that it and the running ones can grow into (the watermark).

        A request that would run alone is always admitted. The running ones have blocks for all their tokens:
        where one lacks some, no budget is left to admit another.
        """
        if not self._running:
            return True
        manager = self.manager
        num_tokens = request.num_tokens
        if self._capacity is None:  # windowed: after a step, blocks behind it are free again
            num_tokens = min(num_tokens, len(matched) * manager.block_size + self._budget)
        needed = manager.num_blocks_for(num_tokens) - len(matched) + manager.num_unheld(matched)
        growth = sum(
            manager.num_blocks_for(self._most_tokens(r)) - manager.num_blocks_for(r.num_tokens)
            for r in (request, *self._running)
        )
        return needed + min(growth, self._watermark) <= manager.pool.num_free

    def _most_tokens(self, request: Request) -> int:
        """Tokens that a request ends with at the latest."""
        limit = request.params.max_tokens
        return (
            self.max_request_tokens
            if limit is None
            else min(self.max_request_tokens, len(request.prompt_token_ids) + limit)
        )

    def _is_being_computed(self, request: Request, index: int) -> bool:
        """True while a running request computes the full block that this one would need next.

        Waiting for it turns 32 equal prefixes into one computation. The other is running, so it proceeds.
        """
        if not self.manager.may_reuse(request):
            return False
        end = (index + 1) * self.manager.block_size
        return any(
            other.num_computed_tokens < end and self.manager.is_same_block(request, other, index)
            for other in self._running
        )

    def _schedule_static(self) -> list[PlanRow]:
        if self._is_any_in_flight:
            return []
        if not any(r.status is RequestStatus.RUNNING for r in self._batch):
            self._batch = self._form_batch()
        running = [r for r in self._batch if r.status is RequestStatus.RUNNING]
        longest = max((r.num_tokens - r.num_computed_tokens for r in running), default=0)
        rows = []
        for request in self._batch:
            if request.status is RequestStatus.RUNNING:
                wanted = request.num_tokens - request.num_computed_tokens
                rows.append(self._row(request, wanted, num_padding=longest - wanted))
            elif running:
                rows.append(PlanRow(request.request_id, (), 0, (), 0, num_padding=longest))
        return rows

    def _form_batch(self) -> list[Request]:
        """As many waiting requests as have room, padded, for all the tokens they may ever have."""
        batch: list[Request] = []
        longest = 0
        for request in list(self._waiting):
            most = self._most_tokens(request)
            longest = max(longest, request.num_tokens if self._kv_cache else most)
            full = len(batch) >= self._max_num_seqs or (len(batch) + 1) * longest > self._budget
            if (batch and full) or not self.manager.allocate(request, most):
                break
            self._run(request)
            batch.append(request)
        return batch

    def _row(self, request: Request, num_new: int, *, num_padding: int = 0) -> PlanRow:
        """The next num_new tokens of a request, with logits where they are wanted."""
        params, start = request.params, request.num_planned_tokens
        end = request.num_planned_tokens = start + num_new
        samples = end == request.num_tokens
        num_logits = int(samples)
        targets: tuple[int, ...] = ()
        if params.prompt_logprobs is not None:
            # Position p of the prompt is predicted by the logits at p - 1; each is given out once.
            first = max(start + 1, self._num_scored.get(request.request_id, 0) + 1)
            last = min(end + 1, len(request.prompt_token_ids))
            if first < last:
                targets = tuple(request.prompt_token_ids[first:last])
                num_logits = end - (first - 1)
        sampling = None
        if num_logits:
            num_output = len(request.output_token_ids)
            history = params.needs_history
            sampling = SamplingRow(
                params,
                request.seed,
                num_output,
                forbidden_token_ids=(*self._eos, *params.stop_token_ids)
                if num_output < params.min_tokens
                else (),
                prompt_token_ids=tuple(request.prompt_token_ids) if history else (),
                output_token_ids=tuple(request.output_token_ids) if history else (),
                prompt_targets=targets,
            )
        return PlanRow(
            request.request_id,
            tuple(request.tokens(start, end)),
            start,
            tuple(self.manager.table(request)),
            num_logits,
            num_padding,
            samples,
            sampling,
        )

    def _append(self, request: Request, token_id: int) -> None:
        """Take over a sampled token and stop where it says so."""
        params = request.params
        request.output_token_ids.append(token_id)
        num_output = len(request.output_token_ids)
        if num_output >= params.min_tokens:
            if token_id in params.stop_token_ids:
                return self._end(request, FinishReason.STOP, token_id)
            if token_id in self._eos and not params.ignore_eos:
                return self._end(request, FinishReason.STOP, None)
        if params.max_tokens is not None and num_output >= params.max_tokens:
            return self._end(request, FinishReason.LENGTH, None)
        if request.num_tokens >= self.max_request_tokens:
            return self._end(request, FinishReason.LENGTH, None)
        return None

    def _end(self, request: Request, reason: FinishReason, stop_reason: int | str | None) -> None:
        queue = self._running if request.status is RequestStatus.RUNNING else self._waiting
        queue.remove(request)
        self.manager.forget(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        del self._requests[request.request_id]
        del self._order[request.request_id]
        self._num_scored.pop(request.request_id, None)
        self._admitted.pop(request.request_id, None)
        self._finished.append(request.request_id)
