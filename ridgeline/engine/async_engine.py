"""The engine behind asyncio: one thread owns an `LLMEngine`, coroutines talk to it.

Orders (add, abort) go through an inbox that the thread empties before each step; it sleeps while there is
nothing to do. What a step produced comes back with one wakeup of the event loop for all requests together.
Outputs are cumulative, so a consumer that is slow finds the newest state and misses nothing: nothing queues
up behind it. A consumer that goes away aborts its requests, and their blocks are free before the next step.

A bad request is its caller's error. An exception in a step ends every request with `EngineDeadError`.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from ridgeline.errors import EngineDeadError, RankError, RequestError
from ridgeline.logs import logger
from ridgeline.request import RequestOutput
from ridgeline.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ridgeline.engine.engine import LLMEngine, Prompt


class _Stream:
    """The newest outputs of one call, by prompt index. Owner: the event loop; only it calls the methods."""

    __slots__ = ("_arrived", "_error", "_newest", "every_step")

    def __init__(self, *, every_step: bool) -> None:
        self.every_step = every_step
        self._newest: dict[int, RequestOutput] = {}
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    def put(self, index: int, output: RequestOutput) -> None:
        self._newest[index] = output
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._arrived.set()

    async def take(self) -> dict[int, RequestOutput]:
        """Wait for outputs, then all that are new. When there are no more, raises what `fail` was given."""
        await self._arrived.wait()
        newest, self._newest = self._newest, {}
        if self._error is None:
            self._arrived.clear()
        elif not newest:
            raise self._error
        return newest


class AsyncEngine:
    """Owns an LLMEngine and the thread that runs it: `async with AsyncEngine(engine): ...`.

    Its methods belong to the event loop that called `start`. Invariant: after `start`, only the engine
    thread touches the LLMEngine, except for its tokenizer and its settings, which never change.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._condition = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._stopped: str | None = "it was not started; call start()"
        """Why no order is taken any more; None while the thread runs. Guarded by the condition."""
        self._open: set[_Stream] = set()
        """Streams that somebody waits on. Owner: the event loop."""
        self._routes: dict[str, tuple[_Stream, int, str | None]] = {}
        """Request id -> stream, prompt index, prompt text. Owner: the engine thread."""
        self._request_ids = (f"req-{i}" for i in itertools.count())

    def start(self) -> None:
        """Start the thread; outputs go to the running event loop."""
        assert self._thread is None, "an AsyncEngine is started once"
        self._loop = asyncio.get_running_loop()
        self._stopped = None
        self._thread = threading.Thread(target=self._run, name="ridgeline-engine", daemon=True)
        self._thread.start()

    async def shutdown(self) -> None:
        """End what is running with EngineDeadError, join the thread, close the LLMEngine. Idempotent."""
        self._stop("it was shut down")
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._fail_open()
        self.engine.close()

    async def __aenter__(self) -> AsyncEngine:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    def check_health(self) -> None:
        """Raises EngineDeadError, with the reason, when no request can be served."""
        if self._stopped is not None:
            raise EngineDeadError(f"the engine is not running: {self._stopped}")

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, made beside the engine thread so that a long one does not stall decoding."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise RequestError(
                "this model has no tokenizer; give token ids ({'prompt_token_ids': [...]}) instead of text"
            )
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the cumulative output whenever it grew. Closing the iterator aborts the request.

        Raises RequestError for a prompt that cannot be served, EngineDeadError when the engine stops.
        """
        outputs = self.generate_all(
            [prompt], params, request_ids=[request_id] if request_id else None, priority=priority
        )
        async with aclosing(outputs):
            async for _, output in outputs:
                yield output

    async def generate_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        priority: int = 0,
        every_step: bool = True,
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """The same for several prompts that arrive together: yields (prompt index, cumulative output).

        They are served all or none: one that is refused aborts the others. With every_step=False each
        output comes once, finished, and the event loop sleeps until then.
        """
        self.check_health()
        arrival = time.monotonic()
        ids = list(request_ids) if request_ids else [next(self._request_ids) for _ in prompts]
        tokenized = [await self._tokenized(prompt) for prompt in prompts]
        stream = _Stream(every_step=every_step)
        self._open.add(stream)
        num_unfinished = len(prompts)
        try:
            self._order(partial(self._add, stream, ids, tokenized, params, priority, arrival))
            while num_unfinished:
                for index, output in (await stream.take()).items():
                    num_unfinished -= output.finished
                    yield index, output
        finally:
            self._open.discard(stream)
            if num_unfinished:
                with suppress(EngineDeadError):
                    self._order(partial(self._abandon, stream, ids))

    def abort(self, request_id: str) -> None:
        """Stop a request; whoever iterates over it gets a last output with finish_reason "abort"."""
        self._order(partial(self._abort, request_id))

    async def _tokenized(self, prompt: Prompt) -> Prompt:
        """A prompt with its token ids; anything malformed is left to `LLMEngine.add_request` to refuse."""
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        if not isinstance(text, str) or (isinstance(prompt, Mapping) and "prompt_token_ids" in prompt):
            return prompt
        return {"prompt": text, "prompt_token_ids": await self.encode(text)}

    def _order(self, order: Callable[[], None]) -> None:
        """Have the engine thread call `order` before its next step."""
        with self._condition:
            self.check_health()
            self._inbox.append(order)
            self._condition.notify()

    def _stop(self, reason: str) -> None:
        with self._condition:
            self._stopped = self._stopped or reason
            self._condition.notify()

    def _fail_open(self) -> None:
        """On the event loop: end every stream that still waits."""
        for stream in self._open:
            stream.fail(EngineDeadError(f"the engine is not running: {self._stopped}"))

    # Everything below runs on the engine thread.

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while (orders := self._wait_for_work()) is not None:
                for order in orders:
                    order()
                if self.engine.has_unfinished:
                    self._deliver(self.engine.step())
            for request_id in list(self._routes):
                self.engine.abort(request_id)
        except BaseException as error:
            logger.exception("the engine stopped after an internal error")
            self._stop(f"{type(error).__name__}: {error}")
            self._loop.call_soon_threadsafe(self._fail_open)

    def _wait_for_work(self) -> list[Callable[[], None]] | None:
        """Sleep until there is an order or a request to advance -> the orders; None once stopped."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._inbox or self._stopped is not None or self.engine.has_unfinished
            )
            orders, self._inbox = self._inbox, []
            return orders if self._stopped is None else None

    def _add(
        self,
        stream: _Stream,
        request_ids: list[str],
        prompts: list[Prompt],
        params: SamplingParams | None,
        priority: int,
        arrival: float,
    ) -> None:
        assert self._loop is not None
        added: list[str] = []
        try:
            for index, (request_id, prompt) in enumerate(zip(request_ids, prompts, strict=True)):
                self.engine.add_request(
                    prompt, params, request_id=request_id, priority=priority, arrival_time=arrival
                )
                added.append(request_id)
                text = prompt.get("prompt") if isinstance(prompt, Mapping) else None
                self._routes[request_id] = (stream, index, text)
        except Exception as error:
            self._abandon(stream, added)
            self._loop.call_soon_threadsafe(stream.fail, error)

    def _abandon(self, stream: _Stream, request_ids: list[str]) -> None:
        """Abort those of the requests that are still this stream's."""
        for request_id in request_ids:
            if request_id in self._routes and self._routes[request_id][0] is stream:
                del self._routes[request_id]
                self.engine.abort(request_id)

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        if output is not None:
            self._deliver([output])

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Hand a step's outputs to their streams, in one wakeup of the event loop."""
        assert self._loop is not None
        batch: list[tuple[_Stream, int, RequestOutput]] = []
        for output in outputs:
            if output.request_id not in self._routes:
                continue
            stream, index, output.prompt = self._routes[output.request_id]
            if output.finished:
                del self._routes[output.request_id]
            if output.error is not None:
                self._loop.call_soon_threadsafe(stream.fail, RankError(output.error))
            elif output.finished or stream.every_step:
                batch.append((stream, index, _snapshot(output)))
        if batch:
            self._loop.call_soon_threadsafe(_hand_over, batch)


def _hand_over(batch: list[tuple[_Stream, int, RequestOutput]]) -> None:
    for stream, index, output in batch:
        stream.put(index, output)


def _snapshot(output: RequestOutput) -> RequestOutput:
    """A copy that the engine does not change any more: it appends to lists and replaces everything else."""
    if output.finished:
        return output
    return replace(
        output,
        outputs=[
            replace(
                choice,
                token_ids=choice.token_ids.copy(),
                logprobs=None if choice.logprobs is None else choice.logprobs.copy(),
            )
            for choice in output.outputs
        ],
        metrics=replace(output.metrics),
        prompt_logprobs=None if output.prompt_logprobs is None else output.prompt_logprobs.copy(),
    )
