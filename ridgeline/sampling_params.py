"""How to choose tokens and when to stop: the names and defaults of vLLM's SamplingParams, validated.

Every field is checked once, when the object is made, and brought to one form (numbers to int or float, lists
to tuples), so that nothing behind it checks again. The defaults leave the model's distribution as it is.
`dataclasses.asdict` gives plain data for JSON, and `SamplingParams(**that)` gives the same object back.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ridgeline.errors import RequestError

_MAX_CHOICES = 16384  # vLLM's VLLM_MAX_N_SEQUENCES: each choice is a request of its own

_NUMBERS: dict[str, tuple[type[int] | type[float], Callable[[Any], bool], str]] = {
    "n": (int, lambda v: 1 <= v <= _MAX_CHOICES, f"a whole number from 1 to {_MAX_CHOICES}"),
    "temperature": (float, lambda v: 0 <= v <= 1e300, "a finite number from 0 (greedy) up"),
    "top_k": (int, lambda v: v >= -1, "a whole number from 1 up, or 0 or -1 for all tokens"),
    "top_p": (float, lambda v: 0 < v <= 1, "a number above 0 and at most 1 (1: all tokens)"),
    "min_p": (float, lambda v: 0 <= v <= 1, "a number from 0 (all tokens) to 1"),
    "typical_p": (float, lambda v: 0 < v <= 1, "a number above 0 and at most 1 (1: all tokens)"),
    # Bounded on both sides: a float32 logit, multiplied or divided by it, stays finite.
    "repetition_penalty": (float, lambda v: 1e-3 <= v <= 1e3, "a number from 0.001 to 1000 (1: none)"),
    "presence_penalty": (float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "frequency_penalty": (float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "seed": (int, lambda v: -(2**63) <= v < 2**64, "a whole number of at most 64 bits, or none"),
    "min_tokens": (int, lambda v: v >= 0, "a whole number from 0 up"),
    "max_tokens": (int, lambda v: v >= 1, "a whole number from 1 up, or none for as many as fit"),
    "logprobs": (int, lambda v: v >= 0, "a whole number from 0 up, or none"),
    "prompt_logprobs": (int, lambda v: v >= 0, "a whole number from 0 up, or none"),
}
"""Field -> its type, what it allows, and that in words. Comparisons are false for NaN."""

_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
_OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Parameters of one request. Raises RequestError naming the field, what it expects and what was given."""

    n: int = 1
    """Answers to generate for the prompt."""
    temperature: float = 1.0
    """Divides the logits: below 1 sharper, above 1 flatter; 0 takes the most probable token (greedy)."""
    top_k: int = 0
    """Keep the k most probable tokens, and those tied with the last of them; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the most probable tokens that together hold this share of the probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this share as probable as the most probable one; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the tokens nearest to the expected surprise that together hold this share; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; above 1 avoids them."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the output, -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it is in the output, -2 to 2."""
    logit_bias: Mapping[int, float] | None = None
    """Token id -> number from -100 to 100 added to its logit."""
    seed: int | None = None
    """The same seed and prompt give the same tokens; none or -1 takes a seed from the engine's."""
    stop: Sequence[str] = ()
    """Texts that end the answer, which they are left out of; one string may be given as it is."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the answer, besides the model's end-of-sequence tokens."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    min_tokens: int = 0
    """End-of-sequence, stop tokens and stop strings have no effect before this many tokens."""
    max_tokens: int | None = 16
    """Tokens to generate at most; none for as many as the model and the cache allow."""
    logprobs: int | None = None
    """Give the log-probability of each token and of this many most probable ones; none gives nothing."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; all of it is then computed, without prefix hits."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        for name, (kind, is_allowed, expected) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            # int compares exactly with any float; what comes from numpy would be cast to a narrow type.
            if not _is_number(value, kind) or not is_allowed(value if type(value) is int else kind(value)):
                raise _wrong(name, expected, value)
            object.__setattr__(self, name, kind(value))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "true or false", getattr(self, name))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", f"at most max_tokens={self.max_tokens}", self.min_tokens)
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        object.__setattr__(self, "seed", None if self.seed == -1 else self.seed)
        object.__setattr__(self, "stop", _texts(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its values, which are not checked again."""
        return _restored, tuple(getattr(self, name) for name in self.__slots__)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """True when choosing a token depends on the tokens before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises RequestError for a token id that the model does not have."""
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise _wrong(name, f"token ids from 0 to {vocab_size - 1} for this model", token_id)


def _restored(*values: Any) -> SamplingParams:
    params = object.__new__(SamplingParams)
    for name, value in zip(SamplingParams.__slots__, values, strict=True):
        object.__setattr__(params, name, value)
    return params


def _wrong(field: str, expected: str, given: object) -> RequestError:
    return RequestError(f"{field}: expected {expected}; given {reprlib.repr(given)}")


def _is_number(value: Any, kind: type[int] | type[float]) -> bool:
    """Also numbers of numpy; True and False are none."""
    return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)


def _is_token_id(value: Any) -> bool:
    return _is_number(value, int) and 0 <= value < 2**31


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _texts(stop: Any) -> tuple[str, ...]:
    texts = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not _is_list(texts) or not all(isinstance(text, str) and text for text in texts):
        raise _wrong("stop", "a string or a list of strings, none of them empty", stop)
    return tuple(texts)


def _token_ids(ids: Any) -> tuple[int, ...]:
    ids = () if ids is None else ids
    if not _is_list(ids) or not all(map(_is_token_id, ids)):
        raise _wrong("stop_token_ids", "a list of token ids (whole numbers from 0 up)", ids)
    return tuple(map(int, ids))


def _biases(biases: Any) -> dict[int, float] | None:
    """Keys that are digits count too: the keys of a JSON object are strings."""
    if biases is None:
        return None
    expected = "a map from token ids (whole numbers from 0 up) to numbers from -100 to 100"
    if not isinstance(biases, Mapping):
        raise _wrong("logit_bias", expected, biases)
    checked: dict[int, float] = {}
    for key, bias in biases.items():
        is_digits = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10
        token_id = int(key) if is_digits else key
        if not (_is_token_id(token_id) and _is_number(bias, float) and -100 <= bias <= 100):
            raise _wrong("logit_bias", expected, {key: bias})
        checked[int(token_id)] = float(bias)
    return checked
