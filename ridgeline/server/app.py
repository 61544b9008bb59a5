"""The HTTP face of an engine: OpenAI's completions and chat completions, models, health, metrics.

An endpoint parses a body, turns it into prompts and parameters, and lets a `Reply` tell the outputs. Errors
keep OpenAI's form: what the client can mend is 400, 401 or 404, an engine that has died is 503. A client
that disconnects, streaming or not, aborts its requests.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import ridgeline
from ridgeline.engine.async_engine import AsyncEngine
from ridgeline.errors import EngineDeadError, ModelNotFoundError, RankError, RequestError, RidgelineError
from ridgeline.request import RequestOutput
from ridgeline.sampling_params import SamplingParams
from ridgeline.server.metrics import Metrics
from ridgeline.server.protocol import ChatBody, CompletionBody, GenerationBody, parse_body
from ridgeline.server.stream import (
    COMPLETION,
    EventStream,
    Reply,
    ScoredToken,
    chat_endpoint,
    error_body,
    json_response,
    until_disconnected,
)
from ridgeline.server.tokenize import tokenizer_routes

STATUS: dict[type[Exception], tuple[int, str, str | None]] = {
    ModelNotFoundError: (404, "invalid_request_error", "model_not_found"),
    EngineDeadError: (503, "server_error", "engine_dead"),
    RankError: (503, "server_error", "rank_lost"),
    RidgelineError: (400, "invalid_request_error", None),
}
"""Error -> HTTP status, OpenAI's type and code."""

CLIENT_GONE = 499
"""Status of a reply that nobody will read."""


def create_app(engine: AsyncEngine, *, model_name: str, api_key: str | None = None) -> FastAPI:
    """The application; it starts the engine when the server starts and shuts it down with it.

    `model_name` is what clients call the model. An `api_key` is then needed for
    everything under /v1 and for the tokenizer.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine:
            yield

    app = FastAPI(title="Ridgeline", version=ridgeline.__version__, lifespan=lifespan)
    key_check = [Depends(_key_check(api_key))] if api_key else []
    v1 = APIRouter(prefix="/v1", dependencies=key_check)
    metrics = Metrics(engine.engine.stats.snapshot)
    card = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "ridgeline",
        "max_model_len": engine.engine.config.max_model_len,
        "meta": {"n_vocab": engine.engine.model.config.vocab_size},  # as llama-server says it
    }

    def check_model(name: str | None) -> None:
        if name is not None and name != model_name:
            raise ModelNotFoundError(f"model {name!r} is not served here; this server has {model_name!r}")

    async def reply(
        request: Request, body: GenerationBody, answer: Reply, prompts: list[Any], params: SamplingParams
    ) -> Response:
        outputs = engine.generate_all(
            prompts, params, priority=body.priority or 0, every_step=bool(body.stream)
        )
        if body.stream:
            return EventStream(answer.events(outputs, include_usage=body.include_usage))
        async with aclosing(outputs):
            content = await until_disconnected(request.receive, answer.body(outputs))
        if content is None:
            return Response(status_code=CLIENT_GONE)
        return json_response(content)

    @v1.post("/completions")
    async def completions(request: Request) -> Response:
        body = parse_body(CompletionBody, await request.body())
        check_model(body.model)
        params = body.sampling_params()
        special = body.add_special_tokens is not False
        prompts = [
            {"prompt": prompt, "prompt_token_ids": await engine.encode(prompt, add_special_tokens=special)}
            if isinstance(prompt, str)
            else {"prompt_token_ids": prompt}
            for prompt in body.prompts()
        ]
        answer = Reply(
            COMPLETION,
            model=model_name,
            n=params.n,
            echo=_echo if body.echo else None,
            with_output=not body.only_scores,
            with_prompt_logprobs=body.prompt_logprobs is not None,
            with_token_ids=bool(body.return_token_ids),
        )
        return await reply(request, body, answer, prompts, params)

    def _echo(output: RequestOutput) -> tuple[str, list[ScoredToken]]:
        tokenizer = engine.engine.tokenizer
        text = output.prompt
        if text is None and tokenizer is not None:
            text = tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
        scored = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False)
        return text or "", [
            (i, tokenizer.decode([i], skip_special_tokens=False) if tokenizer else "", entries)
            for i, entries in scored
        ]

    @v1.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse_body(ChatBody, await request.body())
        check_model(body.model)
        params = body.sampling_params()
        tokenizer = engine.engine.tokenizer
        if tokenizer is None:
            raise RequestError(
                "this model has no tokenizer, so no chat template; use /v1/completions with token ids"
            )
        messages = [message.for_template() for message in body.messages]
        text = await asyncio.to_thread(tokenizer.apply_chat_template, messages)
        prompt = {"prompt": text, "prompt_token_ids": await engine.encode(text, add_special_tokens=False)}
        token_bytes = partial(tokenizer.token_bytes, skip_special_tokens=False)
        answer = Reply(
            chat_endpoint(token_bytes, num_top=body.top_logprobs or 0),
            model=model_name,
            n=params.n,
            with_prompt_logprobs=body.prompt_logprobs is not None,
            with_token_ids=bool(body.return_token_ids),
        )
        return await reply(request, body, answer, [prompt], params)

    @v1.get("/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [card]})

    @v1.get("/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(name)
        return json_response(card)

    @app.get("/health")
    async def health() -> Response:
        engine.check_health()
        return json_response({"status": "ok"})

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": ridgeline.__version__})

    @app.get("/metrics")
    async def metrics_page() -> Response:
        return Response(metrics.page(), media_type=metrics.media_type)

    app.include_router(v1)
    app.include_router(tokenizer_routes(engine), dependencies=key_check)
    app.add_exception_handler(RidgelineError, _ridgeline_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _internal_error)
    return app


def _key_check(api_key: str) -> Any:
    expected = f"Bearer {api_key}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, expected):
            raise HTTPException(
                401, "this server needs its API key: send the header Authorization: Bearer KEY"
            )

    return check


async def _ridgeline_error(_: Request, error: Exception) -> Response:
    status, kind, code = next(row for cls, row in STATUS.items() if isinstance(error, cls))
    return json_response(
        error_body(str(error), kind=kind, param=getattr(error, "param", None), code=code), status
    )


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "invalid_api_key" if error.status_code == 401 else None
    return json_response(
        error_body(error.detail, kind="invalid_request_error", code=code), error.status_code, error.headers
    )


async def _client_gone(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _internal_error(_: Request, error: Exception) -> Response:
    return json_response(error_body(f"internal error: {type(error).__name__}", kind="server_error"), 500)


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, *, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        sys.stdout.write(self._ready + "\n")
        sys.stdout.flush()


def run_server(app: FastAPI, sock: socket.socket, *, ready: str) -> None:
    """Serve on a bound socket until a signal; `ready` is printed once requests are taken.

    Answers under way get a few seconds to finish after the first Ctrl-C.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    _Server(config, ready=ready).run(sockets=[sock])
