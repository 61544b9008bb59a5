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
from ridgeline.bench.workload import WorkloadRequest, continue_with

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
    """As it was sent: a later turn with the real answers in it."""
    history_is_real: bool
    """False for a later turn with a stand-in: an answer failed, or the server did not say its tokens."""
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
    payload: Callable[[WorkloadRequest], bytes],
    max_concurrency: int | None = None,
    closed_loop: bool = False,
    timeout_s: float = 600.0,
    progress: Progress | None = None,
) -> Run:
    """Send each request's payload (a whole HTTP request) when it is due, and wait for all answers.

    In a closed loop a request is due when one of `max_concurrency` places is free. A later turn of a
    conversation is due when the turn before it has been answered, and is made then, with the answer in it;
    all other payloads are made before the run. What goes wrong with one request is in its record; nothing is
    raised for it.
    """
    requests = list(requests)
    payloads = [payload(request) for request in requests]
    is_real = [True] * len(requests)
    places = asyncio.Semaphore(max_concurrency or len(requests))
    scheduled, free = [0.0] * len(requests), [0.0] * len(requests)
    exchanges: dict[int, Exchange] = {}
    started = clock() + _START_DELAY_S

    async def converse(turns: Sequence[int]) -> None:
        ready = started
        for last, i in zip((None, *turns), turns, strict=False):
            if last is not None:
                requests[i], is_real[i] = _continued(requests[i], requests[last], exchanges[last].answer())
                is_real[i] &= is_real[last]
                payloads[i] = payload(requests[i])
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
                history_is_real=is_real[i],
                scheduled=scheduled[i],
                free=free[i],
                counted_from=origin,
                answer=answer,
            )
        )
    return Run(records=tuple(records), started=started, client_cpu_s=cpu_s, client_wall_s=wall_s)


def _continued(
    request: WorkloadRequest, previous: WorkloadRequest, answer: Answer
) -> tuple[WorkloadRequest, bool]:
    """A later turn after this answer, and whether the answer is in it."""
    end = len(request.prompt_token_ids) - request.own_len
    stand_in = request.prompt_token_ids[end - previous.max_tokens : end]
    if answer.error is not None:
        text = request.texts[-2] if request.texts else None
        return continue_with(request, previous, stand_in, text=text), False
    if request.texts:  # what is sent is text: the ids just count
        counted = stand_in[: answer.num_output_tokens]
        return continue_with(request, previous, counted, text=answer.text), True
    return continue_with(request, previous, answer.token_ids or stand_in), answer.token_ids is not None


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
        run = await run_workload(target, requests, payload=lambda request: request_bytes(target, "/"))
    return [
        arrived - float(written)
        for record in run.answered
        for arrived, written in zip(record.answer.token_times, record.answer.text.split(), strict=True)
    ]
