"""What the OpenAI API says: the bodies of its requests, checked, and what they mean to the engine.

Fields that choose tokens have the names of `SamplingParams`, so one method turns every kind of body into one.
A null is a field left out. A wrong type or value is a RequestError that names the field; so is a field
that would change the answer and that we do not have. Other unknown fields are logged once and ignored.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ridgeline.errors import RequestError
from ridgeline.logs import logger
from ridgeline.sampling_params import SamplingParams

SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
}
"""Fields that would change the answer and that we do not have -> the values that ask for nothing."""

IGNORED_FIELDS = frozenset(
    {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
)
"""Fields about the account, not about the answer."""

_logged_fields: set[str] = set()

Body = TypeVar("Body", bound="GenerationBody")
AnyBody = TypeVar("AnyBody", bound=BaseModel)
Prompts = list[str] | list[list[int]]


class FieldError(RequestError):
    """A RequestError that knows which field of the body it is about."""

    def __init__(self, message: str, *, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class GenerationBody(BaseModel):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None

    n: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    def sampling_params(self) -> SamplingParams:
        """Raises RequestError for a value out of range."""
        given = {
            name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name, None) is not None
        }
        try:
            return SamplingParams(**(given | self._own_sampling()))
        except FieldError:
            raise
        except RequestError as error:
            field, _, _ = str(error).partition(":")
            raise FieldError(str(error), param=field if field in SAMPLING_FIELDS else None) from None

    def _own_sampling(self) -> dict[str, Any]:
        """Sampling fields whose meaning differs between the two endpoints."""
        return {}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    def prompts(self) -> Prompts:
        """The prompts, as strings or as lists of token ids. Raises RequestError."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(item, str) for item in prompt):
                return prompt
            if all(type(item) is int for item in prompt):
                return [prompt]
            if all(isinstance(item, list) for item in prompt):
                return prompt
        raise FieldError(
            "prompt: expected a string, a list of token ids, or a list of strings or of such lists; "
            f"given {_shortened(prompt)}",
            param="prompt",
        )

    @property
    def only_scores(self) -> bool:
        """echo with max_tokens=0 asks for the prompt's logprobs and no new token."""
        return bool(self.echo) and self.max_tokens == 0

    def _own_sampling(self) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if self.echo and self.logprobs is not None:
            own["prompt_logprobs"] = self.logprobs
        if self.only_scores:
            own["max_tokens"] = 1
        return own


class ContentPart(BaseModel):
    """A piece of a message; only text can be served."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message; fields of its own (name, ...) are passed on to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[ContentPart] | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise FieldError(
                        f"messages: a content part of type {part.type!r} was given; this server takes only "
                        '{"type": "text", "text": "..."}',
                        param="messages",
                    )
            content = "\n".join(part.text or "" for part in content)
        return {"role": self.role, "content": content or "", **(self.model_extra or {})}


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def _own_sampling(self) -> dict[str, Any]:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError(
                f"top_logprobs={self.top_logprobs} was given without logprobs; set logprobs to true",
                param="top_logprobs",
            )
        limits = (self.max_completion_tokens, self.max_tokens)
        return {
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "max_tokens": next((limit for limit in limits if limit is not None), None),
        }


class TokenizeBody(BaseModel):
    """Body of POST /tokenize: a text, or messages for the chat template."""

    model_config = ConfigDict(strict=True)

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(strict=True)

    tokens: list[int]


def checked(kind: type[AnyBody], content: bytes) -> AnyBody:
    """The body with the types it should have. Raises FieldError for the first field that has another."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _field_error(error) from None


def parse_body(kind: type[Body], content: bytes) -> Body:
    """The checked body of a request. Raises RequestError (FieldError where one field is to blame)."""
    body = checked(kind, content)
    for name, value in (body.model_extra or {}).items():
        if value is None or name in IGNORED_FIELDS:
            continue
        if name in NEUTRAL_VALUES:
            if value not in NEUTRAL_VALUES[name]:
                raise FieldError(f"{name}={_shortened(value)} is not supported; leave it out", param=name)
        elif name not in _logged_fields:
            _logged_fields.add(name)
            logger.warning("unknown field %r in a request is ignored", name)
    if body.stream_options is not None and not body.stream:
        raise FieldError(
            "stream_options was given without stream; set stream to true", param="stream_options"
        )
    return body


def _field_error(error: ValidationError) -> FieldError:
    """The first field that is wrong; the alternatives of a union are several errors of one field."""
    errors = error.errors(include_url=False)
    param = str(errors[0]["loc"][0]) if errors[0]["loc"] else None
    if param is None:
        return FieldError(f"the body of the request is not what was expected: {errors[0]['msg']}", param=None)
    messages = dict.fromkeys(e["msg"] for e in errors if e["loc"][0] == param)
    where = ".".join(map(str, errors[0]["loc"])) if len(messages) == 1 else param
    return FieldError(
        f"{where}: {' or '.join(messages)}; given {_shortened(errors[0]['input'])}", param=param
    )


def _shortened(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
