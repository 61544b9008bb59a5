"""`Tokenizer`: the `tokenizers` library with the few facts around it, and chat templates in sandboxed jinja2."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from ridgeline.errors import RequestError, TokenizerError


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the rest from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Owns a `tokenizers.Tokenizer`; all methods are thread-safe and change nothing."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        chat_template: str | None,
        special_tokens: Mapping[str, str],
    ) -> None:
        """`special_tokens`: names a template may use, such as bos_token, with their text."""
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self._special_tokens = dict(special_tokens)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens inside the text are recognised, as Hugging Face does.

        A lone surrogate, which no UTF-8 text can hold, becomes U+FFFD.
        """
        if any("\ud800" <= c <= "\udfff" for c in text):
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        text = self.backend.id_to_token(token_id)
        if text is None:
            raise TokenizerError(f"token id {token_id} is not in the vocabulary of {self.vocab_size} tokens")
        return str(text)

    @cached_property
    def byte_fallback(self) -> bool:
        """True for the SentencePiece kind: U+2581 for spaces, <0xNN> tokens; False for byte-level BPE."""
        kinds = _decoder_kinds(self.backend)
        if "ByteLevel" in kinds:
            return False
        if "ByteFallback" in kinds:
            return True
        raise TokenizerError(
            f"the tokenizer decodes with {', '.join(kinds) or 'nothing'}; supported: ByteLevel, ByteFallback"
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> str:
        """The conversation as one text. Raises RequestError for messages the template refuses."""
        if self.chat_template is None:
            raise TokenizerError(
                "this model has no chat template; use plain completion (generate, /v1/completions) instead"
            )
        _check_messages(messages)
        from jinja2 import TemplateError

        try:
            rendered: str = self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **options,
            )
        except TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise RequestError(f"the chat template cannot use these messages: {error}") from None
        return rendered

    @cached_property
    def _template(self) -> Any:
        """Compiled once, in jinja2's immutable sandbox: a template is data from a file, not code to trust."""
        from jinja2 import TemplateError, TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, **options)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template or "")
        except TemplateSyntaxError as error:
            raise TokenizerError(f"the chat template is not valid jinja2: {error}") from None


def _decoder_kinds(backend: Any) -> list[str]:
    """Types in the decoder, nested ones included."""
    state = backend.decoder.__getstate__() if backend.decoder is not None else b"{}"
    decoder = json.loads(state)
    inner = decoder.get("decoders", [])
    return [d["type"] for d in [decoder, *inner] if "type" in d]


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, (str, Mapping)) or not messages:
        raise RequestError('messages: expected a list such as [{"role": "user", "content": "..."}]')
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{number}]: expected an object with role and content, given {message!r}")
