"""Tokenizers from small vocabularies: GGUF of both kinds, Hugging Face directories, chat templates."""

from __future__ import annotations

import itertools
import json
import string
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ridgeline.errors import RequestError, TokenizerError
from ridgeline.tokenizer import gguf_vocab, load_tokenizer
from ridgeline.tokenizer.gguf_vocab import PRE_TOKENIZERS, derive_merges

CONTROL = ["<bos>", "<eos>"]
NORMAL, CONTROL_TYPE, USER_DEFINED, BYTE = 1, 3, 4, 6


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ridgeline" / "tokenizers"


def byte_level(merges=("a b",), *, pre="smollm", **metadata):
    """GGUF metadata: <bos> <eos> <think>, the 256 bytes, then what `merges` make."""
    tokens = [*CONTROL, "<think>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [m.replace(" ", "") for m in merges]
    types = [CONTROL_TYPE, CONTROL_TYPE, USER_DEFINED] + [NORMAL] * (len(tokens) - 3)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | {f"tokenizer.{key.replace('__', '.')}": value for key, value in metadata.items()}


def sentencepiece(pieces, *, spaces=("  ", "   "), **metadata):
    """GGUF metadata: <bos> <eos> <unk>, user-defined runs of spaces, the 256 bytes, then piece -> score."""
    tokens = [*CONTROL, "<unk>", *spaces, *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [CONTROL_TYPE] * 3 + [USER_DEFINED] * len(spaces) + [BYTE] * 256 + [NORMAL] * len(pieces)
    scores = [-1000.0] * (3 + len(spaces)) + [0.0] * 256 + list(pieces.values())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    } | {f"tokenizer.{key.replace('__', '.')}": value for key, value in metadata.items()}


def load(metadata):
    return load_tokenizer(SimpleNamespace(kind="gguf", path=Path("model.gguf"), metadata=metadata))


def spelled(tokenizer, text, **options):
    return [tokenizer.token_text(i) for i in tokenizer.encode(text, **options)]


LETTERS = {"\u2581": -1.0} | {c: -2.0 - i for i, c in enumerate(string.ascii_lowercase)}
DIGIT_MERGES = ["1 2", "12 3", "123 4", "' T"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


class TestByteLevel:
    @pytest.mark.parametrize(
        ("pre", "expected"),
        [
            ("gpt-2", ["1234", "a", "'", "T"]),
            ("default", ["1234", "a", "'", "T"]),
            ("smollm", ["1", "2", "3", "4", "a", "'", "T"]),
            ("llama-bpe", ["123", "4", "a", "'T"]),
            ("qwen2", ["1", "2", "3", "4", "a", "'T"]),
        ],
    )
    def test_text_is_cut_as_the_name_says(self, pre, expected):
        tokenizer = load(byte_level(DIGIT_MERGES, pre=pre))
        assert spelled(tokenizer, "1234a'T", add_special_tokens=False) == expected

    def test_llama_takes_a_whole_piece_whatever_its_merges_say(self):
        # "b c" comes first, so "abc" is not reachable by merging.
        merges = ["b c", "a b", "ab c"]
        assert spelled(load(byte_level(merges, pre="gpt-2")), "abc") == ["a", "bc"]
        assert spelled(load(byte_level(merges, pre="llama-bpe")), "abc") == ["<bos>", "abc"]

    def test_qwen_composes_characters(self):
        composed, decomposed = "\u00e9", "e\u0301"
        tokenizer = load(byte_level(pre="qwen2"))
        assert tokenizer.encode(decomposed) == tokenizer.encode(composed)
        tokenizer = load(byte_level(pre="smollm"))
        assert tokenizer.encode(decomposed) != tokenizer.encode(composed)

    def test_an_unknown_way_of_cutting_is_refused_with_the_known_ones(self):
        with pytest.raises(TokenizerError, match=r"model.gguf: .*'tekken'.*smollm, llama-bpe, qwen2"):
            load(byte_level(pre="tekken"))

    @pytest.mark.parametrize("pre", PRE_TOKENIZERS)
    @given(text=st.text())
    def test_any_text_comes_back(self, pre, text):
        tokenizer = load(byte_level(["a b", "Ġ a"], pre=pre))
        if not PRE_TOKENIZERS[pre].nfc:
            assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


class TestSentencePiece:
    def test_spaces_bytes_and_merges(self):
        tokenizer = load(sentencepiece(LETTERS | {"he": -30.0, "\u2581he": -31.0, "el": -29.0}))
        assert spelled(tokenizer, "he", add_special_tokens=False) == ["he"]
        assert spelled(tokenizer, " he el", add_special_tokens=False) == ["\u2581he", "\u2581", "el"]
        # "el" is better than "he".
        assert spelled(tokenizer, "hel", add_special_tokens=False) == ["h", "el"]
        assert spelled(tokenizer, "\u00e9", add_special_tokens=False) == ["<0xC3>", "<0xA9>"]
        assert tokenizer.decode(tokenizer.encode("a   \u00e9 he  ")) == "a   \u00e9 he  "

    def test_runs_of_spaces_come_before_every_other_merge(self):
        tokenizer = load(sentencepiece(LETTERS | {"\u2581t": -0.5}))
        assert spelled(tokenizer, "   t", add_special_tokens=False) == ["\u2581" * 3, "t"]
        assert spelled(tokenizer, " t", add_special_tokens=False) == ["\u2581t"]

    def test_bytes_and_control_tokens_are_not_made_by_merging(self):
        pieces = {c: -float(i) for i, c in enumerate("<0xA>bos")} | {"<0": -20.0, "x0": -21.0, "xA": -22.0}
        tokenizer = load(sentencepiece(pieces | {"A>": -23.0, "<0x0": -24.0}))
        assert "<0x0A>" not in spelled(tokenizer, "<0x0A>")

    def test_a_space_is_put_in_front_where_the_file_wants_it_and_taken_away(self):
        metadata = sentencepiece(LETTERS | {"\u2581h": -30.0}, ggml__add_space_prefix=True)
        tokenizer = load(metadata)
        assert spelled(tokenizer, "hi") == ["<bos>", "\u2581h", "i"]
        for text in ("hi", " hi", "  hi ", "h i"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        # That is the default of this kind of vocabulary.
        del metadata["tokenizer.ggml.add_space_prefix"]
        assert spelled(load(metadata), "hi") == ["<bos>", "\u2581h", "i"]

    @given(
        pieces=st.lists(st.text("abc", min_size=2, max_size=5), max_size=15, unique=True),
        text=st.text("abc", max_size=20),
        seed=st.integers(0, 99),
    )
    def test_derived_merges_are_sentencepiece(self, pieces, text, seed):
        vocabulary = [*"abc", *pieces]
        scores = np.random.default_rng(seed).permutation(len(vocabulary)).astype(np.float32)
        types = np.full(len(vocabulary), NORMAL, np.int32)
        pairs = derive_merges(vocabulary, types, scores).tolist()
        bpe = models.BPE(
            vocab={piece: i for i, piece in enumerate(vocabulary)},
            merges=[(vocabulary[left], vocabulary[right]) for left, right in pairs],
        )
        score = dict(zip(vocabulary, scores.tolist(), strict=True))
        assert [t.value for t in bpe.tokenize(text)] == merged_by_score(text, score)

    def test_merges_are_derived_once(self, cache, monkeypatch):
        metadata = sentencepiece(LETTERS | {"he": -30.0})
        ids = load(metadata).encode("he  llo")
        (file,) = cache.iterdir()

        def not_again(*_):
            raise AssertionError("derived again")

        with monkeypatch.context() as patch:
            patch.setattr(gguf_vocab, "derive_merges", not_again)
            assert load(metadata).encode("he  llo") == ids
            # Another score is another vocabulary.
            with pytest.raises(TokenizerError, match="derived again"):
                load(sentencepiece(LETTERS | {"he": -31.0}))
        whole = file.read_bytes()
        for damaged in (b"", whole[:-4], whole[:40] + b"\xff" + whole[41:], b"\0" * len(whole)):
            file.write_bytes(damaged)
            assert load(metadata).encode("he  llo") == ids
            assert file.read_bytes() == whole

    def test_without_a_cache_directory_it_only_takes_longer(self, cache, caplog):
        cache.parent.mkdir(parents=True)
        cache.write_text("a file where the directory should be")
        assert spelled(load(sentencepiece(LETTERS | {"he": -30.0})), "he") == ["<bos>", "he"]
        assert "not kept" in caplog.text


def merged_by_score(text, score):
    """The definition: merge the neighbours that make the best piece, leftmost of equals, until none do."""
    parts = list(text)
    while True:
        joined = [(score.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        best = max((j for j in joined if j[0] is not None), default=None)
        if best is None:
            return parts
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


class TestSpecialTokens:
    def test_inside_text_they_are_tokens_unless_asked_otherwise(self):
        tokenizer = load(byte_level())
        assert tokenizer.encode("<eos><think>x<bos>")[:2] == [1, 2]
        plain = tokenizer.encode("<eos><think>x", parse_special=False)
        # User-defined tokens are text of their own, not special.
        assert 1 not in plain and 2 in plain
        assert tokenizer.decode(plain) == "<eos><think>x"

    def test_only_control_tokens_are_skipped(self):
        tokenizer = load(byte_level())
        ids = tokenizer.encode("<eos><think>x<bos>")
        assert tokenizer.decode(ids) == "<think>x"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "<eos><think>x<bos>"

    @pytest.mark.parametrize(
        ("metadata", "adds_bos"),
        [
            (byte_level(), False),
            (byte_level(pre="llama-bpe"), True),
            (byte_level(pre="llama-bpe", ggml__add_bos_token=False), False),
            (byte_level(ggml__add_bos_token=True), True),
            (sentencepiece(LETTERS), True),
            (sentencepiece(LETTERS, ggml__add_bos_token=False), False),
        ],
    )
    def test_bos_is_added_where_the_model_wants_it_and_never_twice(self, metadata, adds_bos):
        tokenizer = load(metadata)
        assert (tokenizer.encode("x")[0] == 0) is adds_bos
        assert (tokenizer.encode("") == [0]) is adds_bos
        assert tokenizer.encode("<bos>x").count(0) == 1
        assert 0 not in tokenizer.encode("x", add_special_tokens=False)

    def test_eos_is_added_where_the_file_says_so(self):
        assert load(byte_level(ggml__add_eos_token=True)).encode("")[-1:] == [1]

    def test_ids_of_the_file(self):
        tokenizer = load(byte_level(ggml__eot_token_id=2, ggml__padding_token_id=0xFFFFFFFF))
        assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, (1, 2))
        assert tokenizer.vocab_size == 3 + 256 + 1
        assert tokenizer.token_text(1) == "<eos>"
        for unknown in (-1, 3 + 256 + 1, 2**40):
            with pytest.raises(TokenizerError, match="0 to 259"):
                tokenizer.token_text(unknown)
            assert tokenizer.decode([unknown]) == ""

    def test_threads_do_not_see_each_others_options(self):
        tokenizer = load(byte_level())
        expected = {True: tokenizer.encode("<eos>x"), False: tokenizer.encode("<eos>x", parse_special=False)}
        assert expected[True] != expected[False]

        class Slow:
            """Gives way to other threads between the switch and the call."""

            def __init__(self, backend):
                vars(self)["backend"] = backend

            def __setattr__(self, name, value):
                setattr(self.backend, name, value)

            def encode(self, *args, **options):
                time.sleep(1e-4)
                return self.backend.encode(*args, **options)

        tokenizer._backend = Slow(tokenizer._backend)

        def check(i):
            return tokenizer.encode("<eos>x", parse_special=bool(i % 2)) == expected[bool(i % 2)]

        with ThreadPoolExecutor(4) as pool:
            assert all([*pool.map(check, range(100))])

    def test_surrogates_of_json_escapes(self):
        tokenizer = load(byte_level())
        assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b\ud83dc")) == "a\U0001f600b\ufffdc"


class TestUnusable:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": "t5"}, "'t5'; supported: gpt2, llama"),
            ({"tokens": None}, "tokens: expected an array of strings, found nothing"),
            ({"tokens": np.arange(3)}, "expected an array of strings, found ndarray"),
            ({"tokens": "abc"}, "expected an array of strings, found str"),
            ({"tokens": ["a", "\udcff"]}, "entry 1 is not UTF-8"),
            ({"merges": None}, "merges: expected an array of strings"),
            ({"merges": ["a b", "no"]}, "inconsistent"),
            ({"merges": ["a unknown"]}, "inconsistent"),
            ({"token_type": np.array([1], np.int32)}, "token_type: expected 260 numbers"),
            ({"token_type": ["x"] * 260}, "token_type: expected 260 numbers"),
        ],
    )
    def test_a_damaged_vocabulary_is_one_clear_error(self, change, message):
        metadata = byte_level() | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
        with pytest.raises(TokenizerError, match=message):
            load(metadata)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scores": None}, "scores is missing"),
            ({"scores": np.zeros(3)}, "scores: expected"),
        ],
    )
    def test_scores(self, change, message):
        metadata = sentencepiece(LETTERS) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
        with pytest.raises(TokenizerError, match=message):
            load(metadata)

    def test_an_absurd_piece_does_not_hang(self):
        with pytest.raises(TokenizerError, match="1000000 characters"):
            load(sentencepiece(LETTERS | {"a" * 1_000_000: -50.0}))

    def test_a_file_without_a_vocabulary_has_no_tokenizer(self):
        assert load({"general.architecture": "llama"}) is None
        assert load({"tokenizer.ggml.model": "none"}) is None


class TestDirectory:
    @pytest.fixture
    def directory(self, tmp_path):
        """A tokenizer.json of bytes that puts <bos> before a text and <eos> after it."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken("<bos>"), AddedToken("<eos>")])
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 256), ("<eos>", 257)]
        )
        backend.enable_truncation(4)
        backend.save(str(tmp_path / "tokenizer.json"))
        self.write(tmp_path, bos_token="<bos>", eos_token={"content": "<eos>", "lstrip": False})
        return tmp_path

    @staticmethod
    def write(directory, **config):
        (directory / "tokenizer_config.json").write_text(json.dumps(config))

    @staticmethod
    def load(directory):
        return load_tokenizer(SimpleNamespace(kind="hf", path=directory, metadata={}))

    def test_text_and_special_tokens(self, directory):
        tokenizer = self.load(directory)
        ids = tokenizer.encode("caf\u00e9 \U0001f600!")
        # Nothing is cut off: truncation is the engine's to decide.
        assert tokenizer.decode(ids) == "caf\u00e9 \U0001f600!"
        assert (ids[0], ids[-1]) == (256, 257)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (256, (257,), 258)

    @pytest.mark.parametrize(("add_bos_token", "first"), [(True, [256]), (False, []), (None, [256])])
    def test_add_bos_token_decides(self, directory, add_bos_token, first):
        self.write(directory, bos_token="<bos>", add_bos_token=add_bos_token)
        assert self.load(directory).encode("") == [*first, 257]

    def test_templates(self, directory):
        messages = [{"role": "user", "content": "hi"}]
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        self.write(directory, chat_template=named)
        assert self.load(directory).apply_chat_template(messages) == "<user>hi"
        (directory / "chat_template.jinja").write_text("from a file")
        assert self.load(directory).apply_chat_template(messages) == "from a file"

    def test_what_cannot_be_used(self, directory):
        (directory / "tokenizer_config.json").write_text("[")
        with pytest.raises(TokenizerError, match="tokenizer_config.json is not readable"):
            self.load(directory)
        (directory / "tokenizer.json").write_text("{}")
        with pytest.raises(TokenizerError, match="tokenizer.json is not readable"):
            self.load(directory)
        (directory / "tokenizer.json").rename(directory / "tokenizer.model")
        with pytest.raises(TokenizerError, match="older kind"):
            self.load(directory)
        (directory / "tokenizer.model").unlink()
        assert self.load(directory) is None

    def test_a_decoder_that_is_not_made_of_bytes(self, directory):
        backend = Backend.from_file(str(directory / "tokenizer.json"))
        backend.decoder = decoders.WordPiece()
        backend.save(str(directory / "tokenizer.json"))
        with pytest.raises(TokenizerError, match="decoder WordPiece; expected ByteLevel"):
            self.load(directory)


class TestChatTemplate:
    MESSAGES = ({"role": "user", "content": "a<b>\u00e9"},)

    def render(self, template, **variables):
        tokenizer = load(byte_level(chat_template=template))
        return tokenizer.apply_chat_template(list(self.MESSAGES), **variables)

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<bos>a<b>\u00e9<eos>"),
            ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a<b>\u00e9"}'),
            ("{{ tools is none and documents is none and add_generation_prompt }}", "True"),
            ("{{ missing is defined }}", "False"),
            ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
            ("{% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
            ("a{% generation %}{% set a = 1 %}b{% endgeneration %}c", "abc"),
            ("{{ strftime_now('%%') }}", "%"),
            (
                "{% set ns = namespace(n=0) %}{% for m in [1] %}{% set ns.n = 3 %}{% endfor %}{{ ns.n }}",
                "3",
            ),
        ],
    )
    def test_the_environment_templates_are_written_for(self, template, expected):
        assert self.render(template) == expected

    def test_options_are_variables(self):
        template = "{{ tools | length }}{{ enable_thinking }}{{ add_generation_prompt }}"
        assert self.render(template, tools=[{}], enable_thinking=1, add_generation_prompt=False) == "11False"

    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.__class__ }}{{ messages.__init__.__globals__ }}",
            "{{ raise_exception.__globals__['json'] }}",
            "{{ messages.append(1) }}",
            "{{ '{0.__class__.__mro__}'.format(messages) }}",
            "{{ ('' | attr('__class__')).x }}",
            "{{ ''['__class__']['__mro__'] }}",
        ],
    )
    def test_the_sandbox_refuses(self, template):
        with pytest.raises((TokenizerError, RequestError)) as caught:
            self.render(template)
        assert "sandbox forbids" in str(caught.value) or "undefined" in str(caught.value)

    def test_messages_that_the_template_refuses(self):
        with pytest.raises(RequestError, match="roles must alternate"):
            self.render("{{ raise_exception('roles must alternate') }}")
        with pytest.raises(RequestError, match="does not accept these messages"):
            self.render("{{ messages[0].content + 1 }}")

    def test_a_template_that_is_none(self):
        with pytest.raises(TokenizerError, match="not valid jinja2"):
            self.render("{% for %}")
        with pytest.raises(TokenizerError, match="no chat template"):
            load(byte_level()).apply_chat_template(list(self.MESSAGES))

    def test_a_template_that_writes_bos_does_not_get_another(self):
        metadata = byte_level(chat_template="{{ bos_token }}" + TEMPLATE, ggml__add_bos_token=True)
        tokenizer = load(metadata)
        text = tokenizer.apply_chat_template(list(self.MESSAGES))
        assert tokenizer.encode(text).count(0) == 1
        assert tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)
