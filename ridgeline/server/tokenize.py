"""The tokenizer over HTTP, in the form of vLLM: /tokenize, /detokenize, /tokenizer_info.

So a client counts tokens, and cuts texts, exactly as the model does, without files of its own: lm-eval
(`tokenizer_backend=remote`) and `ridgeline bench serve` use it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from ridgeline.engine.async_engine import AsyncEngine
from ridgeline.errors import RequestError
from ridgeline.server.protocol import DetokenizeBody, TokenizeBody, checked
from ridgeline.server.stream import json_response
from ridgeline.tokenizer import Tokenizer


def tokenizer_routes(engine: AsyncEngine) -> APIRouter:
    """The three endpoints. Without a tokenizer each is a RequestError."""
    router = APIRouter()

    def tokenizer() -> Tokenizer:
        found = engine.engine.tokenizer
        if found is None:
            raise RequestError("this model has no tokenizer; its prompts are token ids")
        return found

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = checked(TokenizeBody, await request.body())
        text, special = body.prompt, body.add_special_tokens is not False
        if (text is None) == (body.messages is None):
            raise RequestError("expected one of prompt (a text) and messages (a conversation)")
        if body.messages is not None:
            text = await asyncio.to_thread(
                tokenizer().apply_chat_template,
                [message.for_template() for message in body.messages],
                add_generation_prompt=body.add_generation_prompt,
            )
            special = bool(body.add_special_tokens)  # the template has written them
        ids = await asyncio.to_thread(tokenizer().encode, text or "", add_special_tokens=special)
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": engine.engine.config.max_model_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer().token_text(i) for i in ids]
        return json_response(answer)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = checked(DetokenizeBody, await request.body())
        text = await asyncio.to_thread(tokenizer().decode, body.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        known = tokenizer()
        eos = next(iter(known.eos_token_ids), None)
        names = {"bos_token": known.bos_token_id, "eos_token": eos}
        texts = {name: None if i is None else known.token_text(i) for name, i in names.items()}
        return json_response(texts | {"chat_template": known.chat_template, "vocab_size": known.vocab_size})

    return router
