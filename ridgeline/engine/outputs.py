"""From sampled tokens to what a caller reads: text, log-probabilities, stop strings, n choices.

Each running request has a detokenizer that never emits half a character and a finder that holds text back
while it could still become a stop string. A request with n > 1 runs as n requests of one choice; this module
joins them again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ridgeline.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestMetrics,
    RequestOutput,
    Sampled,
)
from ridgeline.sampling_params import SamplingParams
from ridgeline.tokenizer import IncrementalDetokenizer, StopStringFinder, Tokenizer


@dataclass(slots=True)
class _Choice:
    """One of the n answers while it is being generated."""

    parent: _Parent
    output: CompletionOutput
    detokenizer: IncrementalDetokenizer | None
    finder: StopStringFinder | None


@dataclass(slots=True)
class _Parent:
    """A request as the caller knows it."""

    output: RequestOutput
    params: SamplingParams
    num_unfinished: int
    choices: list[str] = field(default_factory=list)


class OutputProcessor:
    """Owns the outputs of all requests in the engine, from submission to finish."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._choices: dict[str, _Choice] = {}
        self._parents: dict[str, _Parent] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._parents

    def add(self, request_id: str, prompt: str | None, requests: list[Request]) -> None:
        """A request and the n scheduler requests that serve it."""
        first = requests[0]
        outputs = [CompletionOutput(index) for index in range(len(requests))]
        parent = _Parent(
            RequestOutput(
                request_id,
                prompt,
                first.prompt_token_ids,
                outputs,
                RequestMetrics(first.arrival_time),
                [None] if first.params.prompt_logprobs is not None else None,
            ),
            first.params,
            len(requests),
            [request.request_id for request in requests],
        )
        self._parents[request_id] = parent
        for request, output in zip(requests, outputs, strict=True):
            params = request.params
            if params.logprobs is not None:
                output.logprobs = []
            detokenizer = finder = None
            if self._tokenizer is not None:
                detokenizer = IncrementalDetokenizer(
                    self._tokenizer, skip_special_tokens=params.skip_special_tokens
                )
                finder = StopStringFinder(tuple(params.stop), include_stop=params.include_stop_str_in_output)
            self._choices[request.request_id] = _Choice(parent, output, detokenizer, finder)

    def children(self, request_id: str) -> list[str]:
        """Ids of the scheduler requests of a request that has not finished."""
        return list(self._parents[request_id].choices) if request_id in self._parents else []

    def update(
        self, changed: list[Request], sampled: Mapping[str, Sampled]
    ) -> tuple[list[RequestOutput], list[tuple[str, str]]]:
        """Take over a step's tokens -> (outputs that changed, (request id, stop string) to finish).

        A stop string is found here, after the scheduler has counted the token; the caller tells it to finish.
        """
        now = time.monotonic()
        stopped: list[tuple[str, str]] = []
        touched: dict[str, RequestOutput] = {}
        for request in changed:
            choice = self._choices.get(request.request_id)
            if choice is None:
                continue
            token = sampled.get(request.request_id)
            if token is not None:
                self._append_prompt_logprobs(choice, token)
                if token.token_id >= 0:
                    stop = self._append(choice, request, token, now)
                    if stop is not None:
                        stopped.append((request.request_id, stop))
                        request.finish_reason, request.stop_reason = FinishReason.STOP, stop
            if request.finish_reason is not None:
                self._finish(choice, request, now)
            touched[choice.parent.output.request_id] = choice.parent.output
        return list(touched.values()), stopped

    def abort(self, request: Request, error: str | None = None) -> RequestOutput | None:
        """Close a choice that was aborted, or that an `error` ended; the parent's output when that was its
        last one."""
        choice = self._choices.get(request.request_id)
        if choice is None:
            return None
        choice.parent.output.error = choice.parent.output.error or error
        self._finish(choice, request, time.monotonic())
        return choice.parent.output if choice.parent.output.finished else None

    def _append(self, choice: _Choice, request: Request, token: Sampled, now: float) -> str | None:
        """One token more -> the stop string that it completed."""
        output, metrics = choice.output, choice.parent.output.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
        metrics.num_cached_tokens = max(metrics.num_cached_tokens, request.num_cached_tokens)
        output.token_ids.append(token.token_id)
        output.cumulative_logprob += token.logprob
        if output.logprobs is not None:
            output.logprobs.append(self._logprobs(((token.token_id, token.logprob, token.rank),), token))
        ended_by_token = request.finish_reason is FinishReason.STOP
        if choice.detokenizer is None or choice.finder is None or ended_by_token:
            return None
        may_stop = len(output.token_ids) >= request.params.min_tokens
        text, stop = choice.finder.push(choice.detokenizer.push(token.token_id), search=may_stop)
        output.text += text
        return stop

    def _logprobs(self, chosen: tuple[tuple[int, float, int], ...], token: Sampled) -> dict[int, Logprob]:
        entries = {
            token_id: (logprob, rank + 1) for rank, (token_id, logprob) in enumerate(token.top_logprobs)
        }
        entries = {token_id: (logprob, rank) for token_id, logprob, rank in chosen} | entries
        return {i: Logprob(logprob, rank, self._token_text(i)) for i, (logprob, rank) in entries.items()}

    def _append_prompt_logprobs(self, choice: _Choice, token: Sampled) -> None:
        collected = choice.parent.output.prompt_logprobs
        if collected is None or choice.output.index > 0:
            return
        for entries in token.prompt_logprobs:
            if len(collected) < len(choice.parent.output.prompt_token_ids):
                collected.append({i: Logprob(lp, rank, self._token_text(i)) for i, lp, rank in entries})

    def _token_text(self, token_id: int) -> str | None:
        return (
            None if self._tokenizer is None else self._tokenizer.decode([token_id], skip_special_tokens=False)
        )

    def _finish(self, choice: _Choice, request: Request, now: float) -> None:
        assert request.finish_reason is not None
        output, parent = choice.output, choice.parent
        output.finish_reason = request.finish_reason.value
        output.stop_reason = request.stop_reason
        if (
            choice.detokenizer is not None
            and choice.finder is not None
            and not isinstance(request.stop_reason, str)
        ):
            text, _ = choice.finder.push(choice.detokenizer.flush())
            output.text += text + choice.finder.flush()
        del self._choices[request.request_id]
        parent.num_unfinished -= 1
        parent.output.metrics.num_preemptions += request.num_preemptions
        if parent.num_unfinished == 0:
            parent.output.finished = True
            parent.output.metrics.finished_time = now
            del self._parents[parent.output.request_id]
