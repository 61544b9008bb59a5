"""Workloads: the same seed gives the same work, another seed other words, and descriptions come back whole."""

from __future__ import annotations

import json
import random

import pytest

from ridgeline.bench.workload import (
    NAMED,
    PLAIN_WORDS,
    AtOnce,
    Fixed,
    FixedRate,
    Gamma,
    Listed,
    LogNormal,
    Times,
    Uniform,
    Workload,
    continue_with,
    workload_named,
)
from ridgeline.errors import ConfigError


def make(**fields):
    defaults = {"name": "w", "num_requests": 6, "prompt_lens": Fixed(5), "output_lens": Fixed(3)}
    return Workload(**(defaults | fields))


def shape(requests):
    return [(len(r.prompt_token_ids), r.max_tokens, r.arrival_s) for r in requests]


def test_w3_has_the_lengths_of_the_peers():
    rng = random.Random(31337)
    expected = [(rng.randint(16, 256), rng.randint(16, 192), 0.0) for _ in range(32)]
    assert shape(NAMED["w3"].requests(vocab_size=100, seed=1)) == expected


@pytest.mark.parametrize(("name", "rate"), [("w5", 2.0), ("w5l", 0.5)])
def test_w5_has_the_arrivals_of_the_peers(name, rate):
    rng = random.Random(5150)
    expected, at = [], rng.expovariate(rate)
    while at < 30:
        expected.append((rng.randint(16, 256), rng.randint(16, 192), at))
        at += rng.expovariate(rate)
    assert shape(NAMED[name].requests(vocab_size=100, seed=1)) == expected


@pytest.mark.parametrize("name", sorted(NAMED))
def test_another_seed_gives_other_words_for_the_same_work(name):
    one, two, again = (NAMED[name].requests(vocab_size=49152, seed=seed) for seed in (0, 1, 0))
    assert one == again and shape(one) == shape(two)
    for a, b in zip(one, two, strict=True):
        assert a.prompt_token_ids[:16] != b.prompt_token_ids[:16]
    assert all(0 <= i < 49152 for r in one for i in r.prompt_token_ids)


def test_prefixes_are_shared_in_turn_and_nothing_else_is():
    requests = make(shared_prefix_len=64, num_prefixes=2, prompt_lens=Fixed(16)).requests(
        vocab_size=50_000, seed=0
    )
    heads = [r.prompt_token_ids[:64] for r in requests]
    assert heads[0] == heads[2] == heads[4] and heads[1] == heads[3] and heads[0] != heads[1]
    assert len({r.prompt_token_ids[64:] for r in requests}) == 6
    assert {len(r.prompt_token_ids) for r in requests} == {80}


def test_a_later_turn_holds_the_history_and_takes_the_real_answer():
    requests = make(turns=3).requests(vocab_size=1000, seed=0)
    assert [(r.conversation, r.turn) for r in requests] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [len(r.prompt_token_ids) for r in requests[:3]] == [5, 13, 21]
    first, second, third = requests[:3]
    assert second.prompt_token_ids[:5] == first.prompt_token_ids
    second = continue_with(second, first, (7, 7, 7))
    assert second.prompt_token_ids[5:8] == (7, 7, 7) and len(second.prompt_token_ids) == 13
    short = continue_with(third, second, (9,))
    assert short.prompt_token_ids == (*second.prompt_token_ids, 9, *third.prompt_token_ids[-5:])
    # Also after an answer that was itself shorter than planned.
    shorter = continue_with(third, continue_with(requests[1], first, (7,)), (9,))
    own = [r.prompt_token_ids[-5:] for r in requests[:3]]
    assert shorter.prompt_token_ids == (*own[0], 7, *own[1], 9, *own[2])


def test_a_later_turn_as_text_takes_the_answer_as_text():
    first, second, _ = make(turns=3).requests(vocab_size=9, seed=0, words=PLAIN_WORDS)[:3]
    assert len(first.texts) == 1 and len(second.texts) == 3 and second.texts[0] == first.texts[0]
    assert len(second.text.split()) == len(second.prompt_token_ids) == 13
    real = continue_with(second, first, (1, 1), text=" Yes, I do.")
    assert real.texts == (first.text, " Yes, I do.", second.texts[-1])
    assert real.text == f"{first.text} Yes, I do.{second.texts[-1]}"


@pytest.mark.parametrize(
    ("arrivals", "spread"), [(Gamma(4.0), 1.0), (Gamma(4.0, 0.25), 2.0), (Gamma(4.0, 4.0), 0.5)]
)
def test_gaps_have_the_stated_rate_and_burstiness(arrivals, spread):
    times = [r.arrival_s for r in make(num_requests=20_000, arrivals=arrivals).requests(vocab_size=9, seed=0)]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.25, rel=0.06)
    assert deviation / mean == pytest.approx(spread, rel=0.06)


def test_a_fixed_rate_is_a_clock():
    requests = make(arrivals=FixedRate(2.0)).requests(vocab_size=9, seed=0)
    assert [r.arrival_s for r in requests] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_log_normal_lengths_have_their_median_and_bounds():
    lengths = LogNormal(100, 1.0, 4, 4000)
    rng = random.Random(0)
    drawn = sorted(lengths.draw(rng, i) for i in range(5001))
    assert drawn[2500] == pytest.approx(100, rel=0.1)
    assert drawn[0] >= 4 and drawn[-1] <= 4000 and drawn[-1] > 1000


def test_words_give_the_text_of_the_same_tokens():
    words = [(4, " stone"), (9, " river")]
    request = make().requests(vocab_size=100, seed=0, words=words)[0]
    assert request.text == "".join({4: " stone", 9: " river"}[i] for i in request.prompt_token_ids)
    assert len(make().requests(vocab_size=100, seed=0, words=PLAIN_WORDS)[0].text.split()) == 5


@pytest.mark.parametrize(
    "workload",
    [
        *NAMED.values(),
        make(arrivals=Times((0.0, 1.0, 2.0, 3.0, 4.0, 5.5)), prompt_lens=Listed((1, 2, 3))),
        make(prompt_lens=LogNormal(10, 0.5), arrivals=FixedRate(3.0), max_concurrency=2, turns=2),
        make(arrivals=AtOnce(), output_lens=Uniform(2, 4)),
    ],
)
def test_a_description_comes_back(workload, tmp_path):
    path = tmp_path / "described.json"
    path.write_text(json.dumps(workload.describe(), indent=1))
    assert workload_named(str(path)) == workload
    path.write_text(json.dumps(workload.describe()))
    assert workload_named(str(path)) == workload


def test_a_trace_is_read_line_by_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"prompt_len": 7, "output_len": 2, "arrival_s": 0.5}\n{"prompt_len": 3, "output_len": 1, "arrival_s": 0.25}\n'
    )
    requests = workload_named(str(path)).requests(vocab_size=100, seed=0)
    assert shape(requests) == [(3, 1, 0.25), (7, 2, 0.5)]
    path.write_text('{"prompt_len": 7, "output_len": 2}')
    assert shape(workload_named(str(path)).requests(vocab_size=100, seed=0)) == [(7, 2, 0.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither JSON nor JSON lines"),
        ("[1]", "expected an object"),
        ('{"num_requests": 3, "colour": 1}', "unknown colour"),
        ('{"num_requests": 3}', "missing"),
        ('{"num_requests": 3, "prompt_lens": {"kind": "odd"}, "output_lens": 4}', "kind in fixed"),
        (
            '{"num_requests": 3, "prompt_lens": {"kind": "uniform", "low": 9, "high": 2}, "output_lens": 4}',
            "low <= high",
        ),
        ('{"num_requests": 3, "prompt_lens": 0, "output_lens": 4}', "at least 1 token"),
        ('{"num_requests": 3, "prompt_lens": 1, "output_lens": 4, "turns": 2}', "no whole number of conv"),
        (
            '{"num_requests": 3, "prompt_lens": 1, "output_lens": 4, "arrivals": {"kind": "gamma", "rate": 0}}',
            "rate=0",
        ),
        (
            '{"num_requests": 3, "prompt_lens": 1, "output_lens": 4, "arrivals": {"kind": "times", "values": []}}',
            "0 arrival times",
        ),
        ('{"prompt_len": 3, "output_len": "x"}', "every line needs the numbers"),
        (
            '{"prompt_len": 3, "output_len": 1, "arrival_s": 0}\n{"prompt_len": 3, "output_len": 1}',
            "all or none",
        ),
    ],
)
def test_a_bad_file_is_explained(text, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        workload_named(str(path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"w9.*names: w1, w2, w2l, w3"):
        workload_named("w9")
