"""/v1/chat/completions through the OpenAI client."""

from __future__ import annotations

import pytest

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
RENDERED = "<system>Be brief.<user>Why is the sky blue?<assistant>"
GREEDY = dict(model="tiny", temperature=0.0)


def expected(oracle, **params):
    return oracle(RENDERED, temperature=0.0, **params)


def test_an_answer(client, oracle):
    want = expected(oracle, max_tokens=10)
    got = client.chat.completions.create(messages=MESSAGES, max_tokens=10, **GREEDY)
    assert got.object == "chat.completion" and got.id.startswith("chatcmpl-")
    [choice] = got.choices
    assert (choice.message.role, choice.message.content) == ("assistant", want.outputs[0].text)
    assert choice.finish_reason == want.outputs[0].finish_reason
    assert got.usage.prompt_tokens == len(want.prompt_token_ids)


def test_content_parts_are_joined(client):
    parts = [{"type": "text", "text": "Why is"}, {"type": "text", "text": "the sky blue?"}]
    got = [
        client.chat.completions.create(
            messages=[{"role": "user", "content": content}], max_tokens=5, **GREEDY
        ).usage.prompt_tokens
        for content in (parts, "Why is\nthe sky blue?")
    ]
    assert got[0] == got[1]


def test_max_tokens_is_what_fits(client):
    got = client.chat.completions.create(messages=MESSAGES, extra_body={"ignore_eos": True}, **GREEDY)
    assert got.usage.total_tokens == 256 and got.choices[0].finish_reason == "length"
    newer = client.chat.completions.create(
        messages=MESSAGES, max_completion_tokens=3, max_tokens=5, extra_body={"ignore_eos": True}, **GREEDY
    )
    assert newer.usage.completion_tokens == 3


def test_a_stream_begins_with_the_role(client, oracle):
    want = expected(oracle, max_tokens=10)
    first, *rest, last = client.chat.completions.create(
        messages=MESSAGES, max_tokens=10, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert first.object == "chat.completion.chunk"
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(c.choices[0].delta.role is None for c in rest)
    assert "".join(c.choices[0].delta.content or "" for c in rest) == want.outputs[0].text
    assert [c.choices[0].finish_reason for c in rest] == [None] * (len(rest) - 1) + [
        want.outputs[0].finish_reason
    ]
    assert last.choices == [] and last.usage.completion_tokens == len(want.outputs[0].token_ids)


def test_n_streams_open_each_choice_once(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=3, seed=1, max_tokens=4, stream=True
        )
    )
    openings = [c.choices[0].index for c in chunks if c.choices[0].delta.role]
    endings = [c.choices[0].index for c in chunks if c.choices[0].finish_reason]
    assert sorted(openings) == sorted(endings) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, oracle, stream):
    want = expected(oracle, max_tokens=5, logprobs=2).outputs[0]
    got = client.chat.completions.create(
        messages=MESSAGES, max_tokens=5, logprobs=True, top_logprobs=2, stream=stream, **GREEDY
    )
    pieces = [p.choices[0].logprobs for p in got] if stream else [got.choices[0].logprobs]
    records = [record for piece in pieces if piece is not None for record in piece.content]
    assert [r.logprob for r in records] == pytest.approx(
        [entries[i].logprob for i, entries in zip(want.token_ids, want.logprobs, strict=True)], abs=1e-9
    )
    assert all(len(r.top_logprobs) == 2 and r.top_logprobs[0].logprob == r.logprob for r in records)
    assert all(bytes(r.bytes).decode() == r.token for r in records)


def test_no_alternatives_unless_asked_for(client):
    for seed in range(5):
        got = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=1, seed=seed
        )
        assert all(len(record.top_logprobs) == 1 for record in got.choices[0].logprobs.content)
    got = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2, logprobs=True)
    assert [record.top_logprobs for record in got.choices[0].logprobs.content] == [[], []]


def test_several_turns_reuse_the_prefix(client):
    long = [{"role": "user", "content": "word " * 20}]
    first = client.chat.completions.create(messages=long, max_tokens=4, **GREEDY)
    turns = [*long, {"role": "assistant", "content": first.choices[0].message.content}]
    turns.append({"role": "user", "content": "And then?"})
    second = client.chat.completions.create(messages=turns, max_tokens=4, **GREEDY)
    assert second.usage.prompt_tokens_details.cached_tokens >= 32
