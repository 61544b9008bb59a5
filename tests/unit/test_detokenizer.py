"""Text as it streams: whole characters only, the same as decoding at once; stop strings across tokens."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ridgeline.tokenizer import IncrementalDetokenizer, StopStringFinder, Tokenizer

SPECIAL = ["<end>", "\u00fcnser"]
"""The second is not spelled in the byte alphabet throughout, but each of its characters is in it."""


def byte_level():
    """The 256 bytes, two pieces that cut characters, and added tokens."""
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u00f0\u0141", "\u0120a"]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(vocab)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return with_added_tokens(backend)


def sentencepiece(*, strip_left):
    vocab = [*(f"<0x{b:02X}>" for b in range(256)), "\u2581", "\u2581\u2581", "a", "\u2581\u00e9", "\u65e5"]
    bpe = models.BPE(vocab={piece: i for i, piece in enumerate(vocab)}, merges=[], byte_fallback=True)
    backend = Backend(bpe)
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip_left else steps)
    return with_added_tokens(backend)


def with_added_tokens(backend):
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken("\u6f22 \u5b57", normalized=False)])
    return backend


BACKENDS = {
    "byte level": byte_level(),
    "sentencepiece": sentencepiece(strip_left=False),
    "sentencepiece, prefix": sentencepiece(strip_left=True),
}
TOKENIZERS = {name: Tokenizer(backend, special_tokens={}) for name, backend in BACKENDS.items()}
token_ids = st.lists(
    st.integers(0, 255) | st.integers(256, 270) | st.sampled_from([0xE6, 0x97, 0xA5, 0xF0, 0x9F]), max_size=30
)
with_each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def streamed(tokenizer, ids, *, skip_special_tokens=True):
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def mixes_valid_and_broken(backend, ids):
    """A run of byte tokens in which the library also drops characters that are whole."""
    run = b""
    for token in [*(backend.id_to_token(i) for i in ids), "end"]:
        if token is not None and re.fullmatch("<0x..>", token):
            run += bytes.fromhex(token[3:5])
        elif token is not None:
            whole = run.decode(errors="ignore").encode()
            if whole and whole != run:
                return True
            run = b""
    return False


@with_each_tokenizer
@pytest.mark.parametrize("skip", [True, False])
@given(ids=token_ids)
def test_streaming_gives_what_decoding_gives(name, skip, ids):
    tokenizer = TOKENIZERS[name]
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, ids, skip_special_tokens=skip)) == text


@with_each_tokenizer
@pytest.mark.parametrize("skip", [True, False])
@given(ids=token_ids)
@example(ids=[])
@example(ids=[300, 999])
def test_decoding_gives_what_the_library_gives(name, skip, ids):
    backend = BACKENDS[name]
    shown = [i for i in ids if not (skip and i in TOKENIZERS[name]._special_ids)]
    if not mixes_valid_and_broken(backend, shown):
        assert TOKENIZERS[name].decode(ids, skip_special_tokens=skip) == backend.decode(ids, skip)


@with_each_tokenizer
@given(text=st.text(max_size=40))
@example(text="\u2581a <end>")
@example(text="e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u65e5\u672c \u0627\u0644")
def test_a_character_comes_whole_with_its_last_byte(name, text):
    tokenizer = TOKENIZERS[name]
    if not tokenizer.pieces.byte_level:
        # Written for a space, it is one in the text, too.
        text = text.replace("\u2581", " ")
    if tokenizer.pieces.strip_left:
        text = text.lstrip(" ")
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    consumed = b""
    for i, token_id in enumerate(ids):
        consumed += tokenizer.token_bytes(token_id)
        assert "".join(pieces[: i + 1]) == consumed.decode(errors="ignore")


@with_each_tokenizer
def test_broken_bytes_show_once_they_are_certain(name):
    tokenizer = TOKENIZERS[name]
    byte = {tokenizer.token_bytes(i): i for i in range(256)}
    pieces = streamed(tokenizer, [byte[bytes([b])] for b in b"\xe6\x97\xa5\xff\xe6\x97A\xf0"])
    per_byte = name != "byte level"
    broken = "\ufffd\ufffd" if per_byte else "\ufffd"
    assert pieces == ["", "", "\u65e5", "\ufffd", "", "", broken + "A", "", "\ufffd"]


@with_each_tokenizer
def test_special_tokens_do_not_break_a_character(name):
    tokenizer = TOKENIZERS[name]
    end = tokenizer.encode("<end>", add_special_tokens=False)
    byte = {tokenizer.token_bytes(i): i for i in range(256)}
    ids = [byte[b"\xe6"], *end, byte[b"\x97"], byte[b"\xa5"], *end]
    assert tokenizer.decode(ids) == "\u65e5"
    assert streamed(tokenizer, ids) == ["", "", "", "\u65e5", "", ""]


def first_complete(text, stops):
    """The definition: stop at the character that completes one, with the longest that it completes."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return max(complete, key=len), end
    return None, len(text)


def cut(text, cuts):
    places = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


stop_strings = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4).map(tuple)


@pytest.mark.parametrize("include_stop", [False, True])
@given(text=st.text("abc", max_size=25), cuts=st.lists(st.integers(0, 25), max_size=8), stops=stop_strings)
@example(text="xabcab", cuts=[1, 3], stops=("bcab", "abcab"))
def test_the_first_complete_stop_string_wins_wherever_tokens_end(include_stop, text, cuts, stops):
    finder = StopStringFinder(stops, include_stop=include_stop)
    stop, end = first_complete(text, stops)
    shown = text[: end - (0 if stop is None or include_stop else len(stop))]
    emitted, pushed, found = "", "", None
    for piece in cut(text, cuts):
        new, found = finder.push(piece)
        emitted, pushed = emitted + new, pushed + piece
        if found is None:
            # What is held back could begin a stop string, and it is no more than that.
            held = pushed[len(emitted) :]
            suffixes = [pushed[i:] for i in range(len(pushed) + 1)]
            assert held == max((s for s in suffixes if any(p.startswith(s) for p in stops) or not s), key=len)
    assert found == stop
    assert emitted + finder.flush() == shown


def test_nothing_comes_after_a_stop_string():
    finder = StopStringFinder(("<end>",))
    assert finder.push("yes<en") == ("yes", None)
    assert finder.push("d>no") == ("", "<end>")
    assert finder.push("more") == ("", "<end>")
    assert finder.flush() == ""


def test_text_can_pass_unseen():
    finder = StopStringFinder(("ab",))
    assert finder.push("xa") == ("x", None)
    assert finder.push("b", search=False) == ("ab", None)
    assert finder.push("ab") == ("", "ab")
