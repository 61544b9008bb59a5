"""The real scheduler under any workload, with step times from a function and no tensors.

The engine is a loop of schedule, execute, update; only execute needs a model. Here its duration comes from
`step_s` (a roofline prediction, a fitted line, recorded durations) and moves a virtual clock; tokens are
dummies. All else is the engine's own: scheduler, block pool, prefix hits, preemption, padding. So a capacity
question takes seconds, and a wrong answer can only come from a wrong step time. `Client` decides when
requests are sent, for the simulation and for a real engine alike.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ridgeline.bench.workload import WorkloadRequest, continue_with
from ridgeline.config import EngineConfig, ModelConfig
from ridgeline.engine.engine import make_scheduler
from ridgeline.engine.memory import plan_cache
from ridgeline.engine.scheduler import PlanRow, StepPlan
from ridgeline.request import Request, Sampled
from ridgeline.sampling_params import SamplingParams

StepRow = tuple[int, int]
"""(tokens computed in the step, padding included; tokens in the cache after it) of one request."""
StepTime = Callable[[Sequence[StepRow], int, int], float]
"""(rows, number of logit rows, keys in blocks that several rows read) -> seconds."""

_DUMMY = Sampled(token_id=0, logprob=0.0)


@dataclass(slots=True)
class RequestTimes:
    """One request, in seconds of the virtual clock. Owner: `simulate`."""

    request: WorkloadRequest
    arrival_s: float
    admitted_s: float | None = None
    """Start of the first step that computed any of its tokens."""
    token_times: list[float] = field(default_factory=list)
    """End of the step of each output token."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.arrival_s

    @property
    def e2el_s(self) -> float:
        return self.token_times[-1] - self.arrival_s

    @property
    def queue_s(self) -> float:
        """From arrival to admission."""
        assert self.admitted_s is not None
        return self.admitted_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """None for a single token."""
        num_gaps = len(self.token_times) - 1
        return (self.e2el_s - self.ttft_s) / num_gaps if num_gaps else None

    @property
    def itl_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_times)]


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step: when, how long, and how full everything was while it ran."""

    start_s: float
    duration_s: float
    num_rows: int
    num_tokens: int
    """Computed, padding included."""
    num_running: int
    num_waiting: int
    kv_cache_usage_ratio: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """What would have happened."""

    requests: tuple[RequestTimes, ...]
    """In the workload's order."""
    steps: tuple[StepSample, ...]
    num_prefix_queries: int
    """Prompt tokens that looked for a prefix, and those that found one."""
    num_prefix_hits: int
    num_kv_tokens: int
    """Tokens that the cache holds."""

    @property
    def duration_s(self) -> float:
        """First arrival to last token."""
        first = min(r.arrival_s for r in self.requests)
        return max(r.token_times[-1] for r in self.requests) - first

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(r.request.prompt_token_ids) for r in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(r.token_times) for r in self.requests)

    @property
    def num_preemptions(self) -> int:
        return sum(r.num_preemptions for r in self.requests)


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that the client sends now."""

    index: int
    request: WorkloadRequest
    """A later turn with the real answers in its history."""
    arrival_s: float
    """When it was ready: latency counts from here."""


class Client:
    """Owns the requests until they are sent. Invariant: at most `max_concurrency` are sent and unfinished.

    A request is ready at its arrival time, a later turn when the turn before it has finished. Latency counts
    from then, also where the cap or a long step made it wait: a late client must not hide a slow server.
    """

    def __init__(self, requests: Sequence[WorkloadRequest], *, max_concurrency: int | None = None) -> None:
        self._requests = list(requests)
        self._max_concurrency = max_concurrency or len(requests)
        self._num_outstanding = 0
        self._next_turn: dict[int, int] = {}
        self._ready: list[tuple[float, int]] = []
        last: dict[int, int] = {}
        for index, request in enumerate(requests):
            conversation = request.conversation
            if conversation is not None and conversation in last:
                self._next_turn[last[conversation]] = index
            else:
                self._ready.append((request.arrival_s, index))
            if conversation is not None:
                last[conversation] = index
        heapq.heapify(self._ready)

    @property
    def next_s(self) -> float | None:
        """When the next request is ready; None while none is left but turns that wait for answers."""
        return self._ready[0][0] if self._ready else None

    def due(self, now: float) -> list[Sent]:
        """The requests to send now, in order of arrival; they count as sent."""
        sent = []
        while self._ready and self._ready[0][0] <= now and self._num_outstanding < self._max_concurrency:
            ready_s, index = heapq.heappop(self._ready)
            self._num_outstanding += 1
            sent.append(Sent(index, self._requests[index], ready_s))
        return sent

    def finish(self, index: int, now: float, *, answer: Sequence[int]) -> None:
        """A sent request is finished; its conversation goes on with the answer in its history."""
        self._num_outstanding -= 1
        if index in self._next_turn:
            turn = self._next_turn.pop(index)
            self._requests[turn] = continue_with(self._requests[turn], self._requests[index], answer)
            heapq.heappush(self._ready, (max(now, self._requests[turn].arrival_s), turn))


def simulate(
    config: EngineConfig,
    model: ModelConfig,
    requests: Sequence[WorkloadRequest],
    step_s: StepTime,
    *,
    max_concurrency: int | None = None,
    on_step: Callable[[StepPlan], None] | None = None,
) -> Simulation:
    """Run all requests to their last token on a virtual clock that begins at 0.

    Every request gives its `max_tokens`: nothing samples, so nothing ends early. `on_step` sees each plan.
    Raises ConfigError for settings that contradict each other, RequestError for a request that the engine
    would refuse.
    """
    config = config.resolve(model, unavailable={})
    layout = plan_cache(config, model)
    scheduler = make_scheduler(config, model, layout, eos_token_ids=())
    client = Client(requests, max_concurrency=max_concurrency)
    params = {n: SamplingParams(temperature=0, max_tokens=n) for n in {r.max_tokens for r in requests}}
    times: dict[str, RequestTimes] = {}
    steps: list[StepSample] = []
    now = 0.0
    while True:
        for sent in client.due(now):
            prompt, limit = list(sent.request.prompt_token_ids), params[sent.request.max_tokens]
            request = Request(str(sent.index), prompt, limit, sent.arrival_s)
            scheduler.validate(request)
            scheduler.add(request)
            times[request.request_id] = RequestTimes(sent.request, sent.arrival_s)
        if not scheduler.has_unfinished:
            if client.next_s is None:
                break
            now = max(now, client.next_s)
            continue
        plan = scheduler.schedule()
        rows = [step_row(row) for row in plan.rows]
        num_logits = sum(row.num_logits for row in plan.rows)
        duration = step_s(rows, num_logits, shared_keys(plan, layout.block_size))
        steps.append(
            StepSample(
                now,
                duration,
                len(rows),
                sum(num_new for num_new, _ in rows),
                scheduler.num_running,
                scheduler.num_waiting,
                scheduler.kv_cache_usage_ratio,
            )
        )
        if on_step is not None:
            on_step(plan)
        for row in plan.rows:
            if times[row.request_id].admitted_s is None:
                times[row.request_id].admitted_s = now
        now += duration
        for request in scheduler.update(plan, {row.request_id: _DUMMY for row in plan.rows if row.samples}):
            record = times[request.request_id]
            record.token_times.append(now)
            if request.finish_reason is not None:
                record.num_cached_tokens = request.num_cached_tokens
                record.num_preemptions = request.num_preemptions
                client.finish(int(request.request_id), now, answer=request.output_token_ids)
    stats = scheduler.manager.pool.stats
    return Simulation(
        tuple(times[str(index)] for index in range(len(requests))),
        tuple(steps),
        stats.num_queried_tokens,
        stats.num_hit_tokens,
        layout.num_slots,
    )


def step_row(row: PlanRow) -> StepRow:
    """A plan's row as a predictor wants it; padding is computed too, against the row's own keys."""
    num_new = len(row.token_ids) + row.num_padding
    return num_new, max(row.start + len(row.token_ids), num_new)


def shared_keys(plan: StepPlan, block_size: int) -> int:
    """Keys of all rows in blocks that an earlier row reads as well."""
    blocks = [block for row in plan.rows for block in row.block_ids]
    return (len(blocks) - len(set(blocks))) * block_size


def timeline(simulation: Simulation, num_columns: int) -> dict[str, list[float]]:
    """Means over equal spans of the run, weighted by time.

    "running" and "waiting" are requests, "kv_cache" the share of its blocks that are held, 0 to 1.
    """
    start, end = simulation.steps[0].start_s, simulation.steps[-1].start_s + simulation.steps[-1].duration_s
    span = (end - start) / num_columns
    sums = {name: [0.0] * num_columns for name in ("running", "waiting", "kv_cache")}
    for step in simulation.steps:
        values = (step.num_running, step.num_waiting, step.kv_cache_usage_ratio)
        left = step.start_s - start
        right = left + step.duration_s
        for column in range(int(left / span), min(int(right / span) + 1, num_columns)):
            inside = min(right, (column + 1) * span) - max(left, column * span)
            for total, value in zip(sums.values(), values, strict=True):
                total[column] += max(inside, 0.0) / span * value
    return sums
