"""What the engine has done so far, as counters and histograms of plain numbers.

The engine tells it about each step and about requests that end in between; times are given, never read from a
clock. `snapshot` is plain data under the names of Prometheus (see `server.metrics`), without their prefix:
gauges are read from the scheduler at that moment, counters end in `_total`, histograms in `_seconds`.
TTFT, ITL and E2EL are measured from arrival at the engine; a preempted request's gap counts as any other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ridgeline.engine.scheduler import Scheduler
from ridgeline.request import FinishReason, Request

BUCKETS_S = tuple(float(f"{digit}e{power}") for power in range(-4, 3) for digit in (1, 2.5, 5))
"""Upper bounds of all histograms, 0.1 ms to 500 s; above them is one bucket more."""


@dataclass(slots=True)
class Histogram:
    """Counts per bucket; bucket i holds what is at most BUCKETS_S[i] and above the bound before."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum += seconds

    def snapshot(self) -> dict[str, Any]:
        return {
            "bounds": list(BUCKETS_S),
            "counts": list(self.counts),
            "sum": self.sum,
            "count": sum(self.counts),
        }


class EngineStats:
    """Owns the totals of one engine. Invariant: it follows exactly the unfinished requests with output."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._last_token: dict[str, tuple[int, float]] = {}
        """Of requests with output: number of output tokens, time of the last one."""
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_finished = {reason.value: 0 for reason in FinishReason}
        self.ttft, self.itl, self.e2el, self.step_time = (Histogram() for _ in range(4))

    def record_step(self, changed: Iterable[Request], *, started: float, now: float) -> None:
        """One step, from `started` to `now`, and what `Scheduler.update` returned for it."""
        self.num_steps += 1
        self.step_time.observe(now - started)
        for request in changed:
            num_output = len(request.output_token_ids)
            num_before, last = self._last_token.get(request.request_id, (0, request.arrival_time))
            if num_output > num_before:
                if num_before == 0:
                    self.num_prompt_tokens += len(request.prompt_token_ids)
                (self.itl if num_before else self.ttft).observe(now - last)
                self.num_generation_tokens += num_output - num_before
                self._last_token[request.request_id] = (num_output, now)
            if request.finish_reason is not None:
                self.record_finish(request, now=now)

    def record_finish(self, request: Request, *, now: float) -> None:
        """A request ended; by abort or error also between steps."""
        assert request.finish_reason is not None
        self._last_token.pop(request.request_id, None)
        self.num_finished[request.finish_reason.value] += 1
        self.e2el.observe(now - request.arrival_time)

    def snapshot(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        scheduler, pool = self._scheduler, self._scheduler.manager.pool
        return {
            "num_requests_running": scheduler.num_running,
            "num_requests_waiting": scheduler.num_waiting,
            "kv_cache_usage_ratio": scheduler.kv_cache_usage_ratio,
            "num_steps_total": self.num_steps,
            "num_preemptions_total": scheduler.num_preemptions,
            "prompt_tokens_total": self.num_prompt_tokens,
            "generation_tokens_total": self.num_generation_tokens,
            "prefix_cache_queries_total": pool.stats.num_queried_tokens,
            "prefix_cache_hits_total": pool.stats.num_hit_tokens,
            "num_evicted_blocks_total": pool.stats.num_evicted_blocks,
            "request_success_total": dict(self.num_finished),
            "time_to_first_token_seconds": self.ttft.snapshot(),
            "inter_token_latency_seconds": self.itl.snapshot(),
            "e2e_request_latency_seconds": self.e2el.snapshot(),
            "step_time_seconds": self.step_time.snapshot(),
        }
