"""A workload through an engine in this process, in real time.

The client of `simulate` decides when a request is sent; here the clock is real and the step is the engine's.
A request that becomes due during a step is sent after it, but its latency counts from when it was due.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ridgeline.bench.simulate import Client, RequestTimes
from ridgeline.bench.workload import WorkloadRequest
from ridgeline.engine.engine import LLMEngine
from ridgeline.sampling_params import SamplingParams


def drive(
    llm: LLMEngine, requests: Sequence[WorkloadRequest], *, max_concurrency: int | None = None
) -> list[RequestTimes]:
    """Run all requests, greedy and on after end-of-sequence -> their times in seconds from the start.

    Raises RequestError for one that the engine cannot serve; the others are given up.
    """
    client = Client(requests, max_concurrency=max_concurrency)
    indices: dict[str, int] = {}
    times: dict[int, RequestTimes] = {}
    started = time.perf_counter()
    try:
        while True:
            now = time.perf_counter() - started
            for sent in client.due(now):
                params = SamplingParams(temperature=0, max_tokens=sent.request.max_tokens, ignore_eos=True)
                prompt = list(sent.request.prompt_token_ids)
                indices[llm.add_request({"prompt_token_ids": prompt}, params)] = sent.index
                times[sent.index] = RequestTimes(sent.request, sent.arrival_s)
            if not llm.has_unfinished:
                if client.next_s is None:
                    break
                time.sleep(max(0.0, client.next_s - now))
                continue
            outputs = llm.step()
            now = time.perf_counter() - started
            for output in outputs:
                record, tokens = times[indices[output.request_id]], output.outputs[0].token_ids
                record.token_times += [now] * (len(tokens) - len(record.token_times))
                if output.finished:
                    record.num_cached_tokens = output.metrics.num_cached_tokens
                    record.num_preemptions = output.metrics.num_preemptions
                    client.finish(indices.pop(output.request_id), now, answer=tokens)
    finally:
        for request_id in indices:
            llm.abort(request_id)
    return [times[index] for index in range(len(requests))]
