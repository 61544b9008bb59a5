"""From outputs of the engine to what an OpenAI client reads: JSON bodies and server-sent events.

A reply in one piece and a reply in chunks are the same thing: a chunk is what is new of a choice since the
chunk before it, and the whole is the only chunk. What is written per token is one small dict; everything
around it is the same for all chunks of a reply and is made once.

The JSON is compact and ASCII: some clients split lines wherever Unicode allows it (U+2028 and others), so
such characters are always escaped.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ridgeline.errors import RidgelineError
from ridgeline.request import CompletionOutput, Logprob, RequestOutput

LOWEST_LOGPROB = -9999.0
"""JSON has no -inf."""

T = TypeVar("T")
TokenBytes = Callable[[int], bytes]
ScoredToken = tuple[int, str, Mapping[int, Logprob] | None]
"""Token id, its text, its logprobs (None for the first token of a prompt)."""

encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def completion_logprobs(tokens: Sequence[ScoredToken], offset: int) -> dict[str, Any]:
    """The lists of /v1/completions; text_offset counts characters of the choice's text."""
    offsets: list[int] = []
    for _, text, _ in tokens:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": [text for _, text, _ in tokens],
        "token_logprobs": [entries and _number(entries[i]) for i, _, entries in tokens],
        "top_logprobs": [
            # Of several tokens that read the same (parts of a character), the most probable stays.
            entries and {e.decoded_token or "": _number(e) for e in sorted(entries.values(), key=_number)}
            for _, _, entries in tokens
        ],
        "text_offset": offsets,
    }


def chat_logprobs(
    tokens: Sequence[ScoredToken], _: int, *, token_bytes: TokenBytes, num_top: int
) -> dict[str, Any]:
    """The records of /v1/chat/completions. A token may be half a character: only its bytes say which."""

    def record(token_id: int, entry: Logprob) -> dict[str, Any]:
        return {
            "token": entry.decoded_token or "",
            "logprob": _number(entry),
            "bytes": list(token_bytes(token_id)),
        }

    def top(entries: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
        return sorted(entries.items(), key=lambda item: item[1].rank)[:num_top]

    return {
        "content": [
            {
                **record(token_id, entries[token_id]),
                "top_logprobs": [record(i, entry) for i, entry in top(entries)],
            }
            for token_id, _, entries in tokens
            if entries is not None
        ]
    }


def _number(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST_LOGPROB)


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """What differs between completions and chat completions in a reply."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole: Callable[[str], dict[str, Any]]
    chunk: Callable[[str], dict[str, Any]]
    opening: dict[str, Any] | None
    """Content of a first chunk that comes before any text."""
    logprobs: Callable[[Sequence[ScoredToken], int], dict[str, Any]]


COMPLETION = Endpoint(
    id_prefix="cmpl-",
    whole_object="text_completion",
    chunk_object="text_completion",
    whole=lambda text: {"text": text},
    chunk=lambda text: {"text": text},
    opening=None,
    logprobs=completion_logprobs,
)


def chat_endpoint(token_bytes: TokenBytes, *, num_top: int) -> Endpoint:
    """Chat completions with `num_top` alternatives for each token, where logprobs are asked for."""
    return Endpoint(
        id_prefix="chatcmpl-",
        whole_object="chat.completion",
        chunk_object="chat.completion.chunk",
        whole=lambda text: {"message": {"role": "assistant", "content": text}},
        chunk=lambda text: {"delta": {"content": text} if text else {}},
        opening={"delta": {"role": "assistant", "content": ""}},
        logprobs=partial(chat_logprobs, token_bytes=token_bytes, num_top=num_top),
    )


@dataclass(slots=True)
class _Sent:
    """How much of one choice the client has."""

    num_chars: int = 0
    num_tokens: int = 0
    started: bool = False
    finished: bool = False
    offset: int = 0
    """Characters of the tokens with logprobs that were sent."""


class Reply:
    """How the outputs of one HTTP request are told to its client.

    Choices are numbered through: prompt index · n + the prompt's own choice.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        model: str,
        n: int,
        echo: Callable[[RequestOutput], tuple[str, list[ScoredToken]]] | None = None,
        with_output: bool = True,
        with_prompt_logprobs: bool = False,
        with_token_ids: bool = False,
    ) -> None:
        """`echo` gives the text and tokens to put before each choice; with_output=False is that alone."""
        self._endpoint = endpoint
        self._n = n
        self._echo = echo
        self._with_output = with_output
        self._with_prompt_logprobs = with_prompt_logprobs
        self._with_token_ids = with_token_ids
        self._envelope = {
            "id": endpoint.id_prefix + uuid.uuid4().hex,
            "object": endpoint.whole_object,
            "created": int(time.time()),
            "model": model,
        }

    async def body(self, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> bytes:
        """The whole reply, when all of it is there."""
        by_prompt = {index: output async for index, output in outputs if output.finished}
        final = [by_prompt[index] for index in sorted(by_prompt)]
        choices = [
            self._piece(index, output, choice, _Sent(), render=self._endpoint.whole)
            for index, output in enumerate(final)
            for choice in output.outputs
        ]
        return encode({**self._envelope, "choices": choices, "usage": self._usage(final)}).encode()

    async def events(
        self, outputs: AsyncGenerator[tuple[int, RequestOutput], None], *, include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        """Chunks as server-sent events, one whenever a client would see something new.

        An error before the first output is raised; later ones become an event, the status has been sent.
        """
        envelope = encode({**self._envelope, "object": self._endpoint.chunk_object})[:-1]
        before, after = f'data: {envelope},"choices":[', "]}\n\n"
        sent: dict[int, _Sent] = {}
        newest: dict[int, RequestOutput] = {}
        try:
            async with aclosing(outputs):
                async for index, output in outputs:
                    newest[index] = output
                    pieces = self._new_pieces(index, output, sent)
                    if pieces:
                        yield "".join(f"{before}{encode(piece)}{after}" for piece in pieces).encode()
            if include_usage:
                yield f'{before}],"usage":{encode(self._usage(list(newest.values())))}}}\n\n'.encode()
        except RidgelineError as error:
            if not newest:
                raise
            yield f"data: {encode(error_body(str(error), kind='server_error'))}\n\n".encode()
        yield b"data: [DONE]\n\n"

    def _new_pieces(self, index: int, output: RequestOutput, sent: dict[int, _Sent]) -> list[dict[str, Any]]:
        """What is new of each choice of one prompt."""
        pieces: list[dict[str, Any]] = []
        if output.prompt_logprobs is not None and len(output.prompt_logprobs) < len(output.prompt_token_ids):
            return pieces  # they belong to the first chunk
        for choice in output.outputs:
            key = index * self._n + choice.index
            if key not in sent:
                sent[key] = _Sent()
                if self._endpoint.opening is not None:
                    pieces.append(self._choice(index, choice, self._endpoint.opening, finish_reason=None))
            have = sent[key]
            news = len(choice.text) > have.num_chars and self._with_output
            due = self._echo is not None and not have.started
            if not have.finished and (news or due or choice.finish_reason is not None):
                pieces.append(self._piece(index, output, choice, have, render=self._endpoint.chunk))
        return pieces

    def _piece(
        self,
        index: int,
        output: RequestOutput,
        choice: CompletionOutput,
        have: _Sent,
        *,
        render: Callable[[str], dict[str, Any]],
    ) -> dict[str, Any]:
        """One choice without what the client has."""
        text = ""
        tokens: list[ScoredToken] = []
        first, have.started = not have.started, True
        if first and self._echo is not None:
            text, tokens = self._echo(output)
        if self._with_output:
            text += choice.text[have.num_chars :]
            if choice.logprobs is not None:
                new = zip(
                    choice.token_ids[have.num_tokens :], choice.logprobs[have.num_tokens :], strict=True
                )
                tokens += [(i, entries[i].decoded_token or "", entries) for i, entries in new]
        content = render(text)
        if choice.logprobs is not None:
            content["logprobs"] = self._endpoint.logprobs(tokens, have.offset)
            have.offset += sum(len(token_text) for _, token_text, _ in tokens)
        if first and self._with_prompt_logprobs and output.prompt_logprobs is not None:
            content["prompt_logprobs"] = [_prompt_entry(entries) for entries in output.prompt_logprobs]
        if self._with_token_ids:
            # As vLLM: a text that is encoded again need not give the tokens that were generated.
            content["token_ids"] = list(choice.token_ids[have.num_tokens :]) if self._with_output else []
        have.num_chars, have.num_tokens = len(choice.text), len(choice.token_ids)
        have.finished = choice.finish_reason is not None
        return self._choice(index, choice, content, finish_reason=choice.finish_reason)

    def _choice(
        self, index: int, choice: CompletionOutput, content: Mapping[str, Any], *, finish_reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": index * self._n + choice.index,
            "logprobs": None,
            **content,
            "finish_reason": finish_reason,
        }

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
        num_output = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
        num_output *= self._with_output
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(o.metrics.num_cached_tokens for o in outputs)},
        }


def _prompt_entry(entries: Mapping[int, Logprob] | None) -> dict[int, dict[str, Any]] | None:
    """One prompt token's log-probabilities, in the form of vLLM."""
    if entries is None:
        return None
    return {
        token_id: {"logprob": _number(e), "rank": e.rank, "decoded_token": e.decoded_token}
        for token_id, e in entries.items()
    }


def error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in the form of the OpenAI API."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_response(content: Any, status: int = 200, headers: Any = None) -> Response:
    if not isinstance(content, bytes):
        content = encode(content).encode()
    return Response(content, status, headers, media_type="application/json")


async def until_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None: the client went away first and `work` was cancelled."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. The status is sent with the first one, so that an error before it has its own.

    A client that goes away closes the events, and with them the requests behind them.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnected(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            event = await anext(events)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": event, "more_body": True})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
