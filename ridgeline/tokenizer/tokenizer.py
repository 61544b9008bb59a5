"""`Tokenizer`: text to token ids, token ids to text, messages to a prompt.

Splitting text is the work of the `tokenizers` library. Around it are three rules of our own: we put the
tokens that begin and end a prompt (and never twice, where a chat template wrote them already), decoding is
joining bytes (`pieces`), and what stands in the text as a special token is one, unless asked otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

from tokenizers import Tokenizer as Backend

from ridgeline.errors import TokenizerError
from ridgeline.tokenizer.chat_template import compile_template
from ridgeline.tokenizer.pieces import piece_decoder


class Tokenizer:
    """The vocabulary of one model. Safe to use from several threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, int],
        eos_token_ids: Iterable[int] = (),
        prefix_ids: Sequence[int] = (),
        suffix_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        """`special_tokens`: "bos", "eos", "unk", "pad" -> id, what a chat template may ask for.

        `prefix_ids` and `suffix_ids` are put around a prompt. Raises TokenizerError for a decoder that is not
        made of bytes.
        """
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._lock = Lock()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self.special_tokens = dict(special_tokens)
        self.pieces = piece_decoder(backend)
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=False), 1 + max(added, default=-1))
        self.bos_token_id = special_tokens.get("bos")
        self.eos_token_ids = tuple(eos_token_ids)
        self.prefix_ids = list(prefix_ids)
        self.suffix_ids = list(suffix_ids)
        self.chat_template = chat_template

    def to_json(self) -> str:
        """As the tokenizers library stores it (tokenizer.json)."""
        return self._backend.to_str()

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens` puts BOS in front where the model wants it and the text has none. With
        `parse_special=False` the text of a special token is only text.
        """
        text = _without_surrogates(text)
        # The switch belongs to the library's tokenizer, not to its call.
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            ids = self._backend.encode(text, add_special_tokens=False).ids
        if not add_special_tokens:
            return ids
        prefix = [] if ids[: len(self.prefix_ids)] == self.prefix_ids else self.prefix_ids
        return [*prefix, *ids, *self.suffix_ids]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; U+FFFD for bytes that are no text, nothing for ids outside the vocabulary."""
        pieces = (self.token_bytes(i, skip_special_tokens=skip_special_tokens) for i in ids)
        text = b"".join(pieces).decode(errors=self.pieces.errors)
        return text.removeprefix(" ") if self.pieces.strip_left else text

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """What a token adds to the text, which may be half a character."""
        if skip_special_tokens and token_id in self._special_ids:
            return b""
        found = self._bytes.get(token_id)
        if found is None:
            known = 0 <= token_id < self.vocab_size
            piece = self._backend.id_to_token(token_id) if known else None
            found = self._bytes[token_id] = b"" if piece is None else self.pieces.decode(piece)
        return found

    def token_text(self, token_id: int) -> str:
        """A token as the vocabulary spells it: "Ġthe". Raises TokenizerError for an unknown id."""
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            raise TokenizerError(
                f"token id {token_id}: expected an id of the vocabulary, 0 to {self.vocab_size - 1}"
            )
        return piece

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the prompt text that the model was trained on.

        `variables` are further names the template may use (`documents`, `enable_thinking`). Raises
        TokenizerError without a usable template, RequestError if it refuses the messages.
        """
        names = {f"{name}_token": self.token_text(i) for name, i in self.special_tokens.items()}
        return self._template(
            names
            | {
                "messages": messages,
                "add_generation_prompt": add_generation_prompt,
                "tools": tools,
                "documents": None,
            }
            | variables
        )

    @functools.cached_property
    def _template(self) -> Callable[[Mapping[str, Any]], str]:
        if self.chat_template is None:
            raise TokenizerError(
                "this model has no chat template, so it was probably not trained to chat; write the prompt "
                "as plain text (`generate`, /v1/completions), or use an instruction-tuned model"
            )
        return compile_template(self.chat_template)


def _without_surrogates(text: str) -> str:
    """Surrogates as JSON escapes can bring them: a pair becomes its character, a lone one U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
