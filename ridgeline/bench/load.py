"""Many requests, each sent when it is due, and one record of each.

A client that is late, or waits for a free place, must not hide the waiting ("coordinated omission", G. Tene).
So latencies count from the scheduled arrival, and the time from there to the sending is kept beside them.
Only in a closed loop, where a request has no arrival of its own but follows an earlier one, do they count
from the sending.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ridgeline.bench.http_client import Answer, Exchange, Target, clock, connect, request_bytes
from ridgeline.bench.workload import WorkloadRequest

Progress = Callable[[int, int, float], None]
"""Called with requests done, requests in all, and seconds since the start."""

_START_DELAY_S = 0.05
"""Time to make the first connections in."""
_CONNECT_AHEAD_S = 0.02
_SPIN_S = 0.002
_DELAY_STREAMS, _DELAY_EVENTS, _DELAY_GAP_S = 4, 50, 0.004


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request and what came of it. Times are of `http_client.clock`, in seconds."""

    request: WorkloadRequest
    scheduled: float
    """When it should have been sent."""
    free: float
    """When it could be sent at the earliest: `scheduled`, or when a place was free."""
    counted_from: float
    """Start of its latencies: `scheduled`, in a closed loop the sending."""
    answer: Answer

    @property
    def num_output_tokens(self) -> int:
        return self.answer.num_output_tokens or len(self.answer.token_times)

    @property
    def num_prompt_tokens(self) -> int:
        return self.answer.num_prompt_tokens or len(self.request.prompt_token_ids)

    def latencies_ms(self) -> dict[str, float]:
        """TTFT, E2EL and, of more than one token, TPOT."""
        times = self.answer.token_times
        measured = {
            "ttft_ms": 1000 * (times[0] - self.counted_from),
            "e2el_ms": 1000 * (times[-1] - self.counted_from),
        }
        if self.num_output_tokens > 1:
            measured["tpot_ms"] = 1000 * (times[-1] - times[0]) / (self.num_output_tokens - 1)
        return measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All requests of one run, and what the client itself cost."""

    records: tuple[RequestRecord, ...]
    started: float
    client_cpu_s: float
    client_wall_s: float
    """What client_cpu_s is a part of; longer than the run by the making of the first connections."""

    @property
    def answered(self) -> list[RequestRecord]:
        return [record for record in self.records if record.answer.error is None]

    @property
    def duration_s(self) -> float:
        return max(record.answer.end for record in self.records) - self.started


async def run_workload(
    target: Target,
    requests: Sequence[WorkloadRequest],
    *,
    payloads: Sequence[bytes],
    max_concurrency: int | None = None,
    closed_loop: bool = False,
    timeout_s: float = 600.0,
    progress: Progress | None = None,
) -> Run:
    """Send each request's payload (a whole HTTP request) when it is due, and wait for all answers.

    In a closed loop a request is due when one of `max_concurrency` places is free. A later turn of a
    conversation is due when the turn before it has been answered. What goes wrong with one request is in its
    record; nothing is raised for it.
    """
    places = asyncio.Semaphore(max_concurrency or len(requests))
    scheduled, free = [0.0] * len(requests), [0.0] * len(requests)
    exchanges: dict[int, Exchange] = {}
    started = clock() + _START_DELAY_S

    async def converse(turns: Sequence[int]) -> None:
        ready = started
        for i in turns:
            due = max(ready, started + requests[i].arrival_s)
            await _sleep_until(due - _CONNECT_AHEAD_S)
            async with places:
                free[i] = max(due, clock())
                scheduled[i] = free[i] if closed_loop else due
                try:
                    exchange = exchanges[i] = await connect(target)
                except OSError as error:
                    exchange = exchanges[i] = Exchange()
                    exchange.failure = f"no connection to {target.url}: {error or 'timed out'}"
                else:
                    await _sleep_until(scheduled[i])
                    await exchange.send(payloads[i], timeout_s=timeout_s)
            ready = exchange.end
            if progress is not None:
                progress(len(exchanges), len(requests), clock() - started)

    conversations: dict[tuple[str, int], list[int]] = {}
    for i, request in enumerate(requests):
        alone = request.conversation is None
        key = ("request", i) if alone else ("conversation", request.conversation or 0)
        conversations.setdefault(key, []).append(i)
    gc.collect()
    gc.disable()  # a collection in the middle delays every stream
    try:
        cpu_s, wall_s = time.thread_time(), clock()
        await asyncio.gather(
            *(converse(sorted(turns, key=lambda i: requests[i].turn)) for turns in conversations.values())
        )
        cpu_s, wall_s = time.thread_time() - cpu_s, clock() - wall_s
    finally:
        gc.enable()
    records = []
    for i, request in enumerate(requests):
        answer = exchanges[i].answer()
        origin = answer.sent if closed_loop else scheduled[i]
        records.append(
            RequestRecord(
                request=request,
                scheduled=scheduled[i],
                free=free[i],
                counted_from=origin,
                answer=answer,
            )
        )
    return Run(records=tuple(records), started=started, client_cpu_s=cpu_s, client_wall_s=wall_s)


async def _sleep_until(when: float) -> None:
    """To some 10 microseconds: the event loop rounds its sleeps up to milliseconds, so the rest is spun."""
    while (left := when - clock()) > 0:
        await asyncio.sleep(max(0.0, left - _SPIN_S))


async def reading_delays() -> list[float]:
    """Seconds from a server's write to the time this client gives it: no figure of it is better than that.

    The server is a few scripted streams in this process, on the same event loop, each event with the time of
    its writing as its text.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for _ in range(_DELAY_EVENTS):
            await asyncio.sleep(_DELAY_GAP_S)
            writer.write(f'data: {{"choices":[{{"text":"{clock()!r} "}}]}}\n\n'.encode())
        writer.write(b"data: [DONE]\n\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        target = Target("127.0.0.1", server.sockets[0].getsockname()[1])
        requests = [WorkloadRequest((), _DELAY_EVENTS) for _ in range(_DELAY_STREAMS)]
        payloads = [request_bytes(target, "/")] * len(requests)
        run = await run_workload(target, requests, payloads=payloads)
    return [
        arrived - float(written)
        for record in run.answered
        for arrived, written in zip(record.answer.token_times, record.answer.text.split(), strict=True)
    ]
