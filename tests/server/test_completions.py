"""/v1/completions through the OpenAI client: each answer is what `LLM.generate` gives for the same request."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

PROMPT = "The sky over the harbour"
GREEDY = dict(model="tiny", temperature=0.0)


def test_a_completion(client, oracle):
    want = oracle(PROMPT, temperature=0.0, max_tokens=12)
    got = client.completions.create(prompt=PROMPT, max_tokens=12, **GREEDY)
    assert got.object == "text_completion" and got.model == "tiny" and got.id.startswith("cmpl-")
    [choice] = got.choices
    assert choice.text == want.outputs[0].text != ""
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, want.outputs[0].finish_reason, None)
    assert got.usage.prompt_tokens == len(want.prompt_token_ids)
    assert got.usage.completion_tokens == len(want.outputs[0].token_ids)
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_defaults_are_openais(client):
    got = client.completions.create(model="tiny", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert got.usage.completion_tokens == 16
    texts = {client.completions.create(model="tiny", prompt=PROMPT).choices[0].text for _ in range(4)}
    assert len(texts) > 1, "the default temperature is 1"


def test_nulls_are_fields_left_out(server, client):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4, "stop": None, "seed": None, "stream": None}
    got = server.post("/v1/completions", json=body | {"logit_bias": None, "suffix": None, "n": None}).json()
    want = client.completions.create(prompt=PROMPT, max_tokens=4, **GREEDY)
    assert got["choices"][0]["text"] == want.choices[0].text


def test_prompt_forms(client, server):
    ids = server.llm.tokenizer.encode(PROMPT)
    text = client.completions.create(prompt=PROMPT, max_tokens=8, **GREEDY).choices[0].text
    other = client.completions.create(prompt="Night", max_tokens=8, **GREEDY).choices[0].text
    assert text != other
    for prompt, texts in (
        (ids, [text]),
        ([PROMPT, "Night"], [text, other]),
        ([ids, server.llm.tokenizer.encode("Night")], [text, other]),
    ):
        got = client.completions.create(prompt=prompt, max_tokens=8, **GREEDY)
        assert [c.text for c in got.choices] == texts
        assert [c.index for c in got.choices] == list(range(len(texts)))


def test_streaming_says_the_same_in_pieces(client):
    whole = client.completions.create(prompt=PROMPT, max_tokens=20, **GREEDY)
    chunks = list(client.completions.create(prompt=PROMPT, max_tokens=20, stream=True, **GREEDY))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [
        whole.choices[0].finish_reason
    ]
    assert len(chunks) > 5
    assert all(c.choices[0].text for c in chunks[:-1]), "a chunk without text says nothing"
    assert {c.usage for c in chunks} == {None} and len({c.id for c in chunks}) == 1


def test_usage_in_a_stream_is_a_last_chunk_of_its_own(client):
    whole = client.completions.create(prompt=PROMPT, max_tokens=6, **GREEDY)
    *chunks, last = client.completions.create(
        prompt=PROMPT, max_tokens=6, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(c.usage is None and len(c.choices) == 1 for c in chunks)


def test_the_wire_format_of_a_stream(server):
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    reply = server.post("/v1/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.isascii() and reply.text.endswith("}\n\ndata: [DONE]\n\n")
    events = reply.text.split("\n\n")[:-2]
    assert all(e.startswith("data: {") and "\n" not in e for e in events)
    assert ['"usage":{' in e for e in events] == [False] * (len(events) - 1) + [True]
    assert all(json.dumps(json.loads(e[6:]), separators=(",", ":")) == e[6:] for e in events)


def test_n_choices_and_several_prompts(client, oracle):
    params = dict(temperature=0.9, seed=7, max_tokens=6)
    want = [output.text for prompt in (PROMPT, "Night") for output in oracle(prompt, n=2, **params).outputs]
    assert len(set(want)) == 4
    got = client.completions.create(model="tiny", prompt=[PROMPT, "Night"], n=2, **params)
    assert [c.text for c in got.choices] == want
    assert [c.index for c in got.choices] == [0, 1, 2, 3]
    streamed = ["", "", "", ""]
    finished = []
    for chunk in client.completions.create(
        model="tiny", prompt=[PROMPT, "Night"], n=2, stream=True, **params
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
        finished += [chunk.choices[0].index] if chunk.choices[0].finish_reason else []
    assert streamed == want
    assert sorted(finished) == [0, 1, 2, 3]


def test_a_seed_repeats_and_another_differs(client):
    def text(seed):
        got = client.completions.create(model="tiny", prompt=PROMPT, seed=seed, max_tokens=12)
        return got.choices[0].text

    assert text(1) == text(1) != text(2)


def test_stop_strings_and_token_ids(client, oracle):
    want = oracle(PROMPT, temperature=0.0, max_tokens=20, ignore_eos=True).outputs[0]
    stop = want.text[5:8]
    ignore = {"ignore_eos": True}
    for stream in (False, True):
        got = client.completions.create(
            prompt=PROMPT, max_tokens=20, stop=stop, stream=stream, extra_body=ignore, **GREEDY
        )
        pieces = list(got) if stream else [got]
        assert "".join(p.choices[0].text for p in pieces) == want.text[: want.text.index(stop)]
        assert pieces[-1].choices[0].finish_reason == "stop"
    kept = client.completions.create(
        prompt=PROMPT,
        max_tokens=20,
        stop=[stop],
        extra_body=ignore | {"include_stop_str_in_output": True},
        **GREEDY,
    )
    assert kept.choices[0].text == want.text[: want.text.index(stop) + len(stop)]
    token = want.token_ids[3]
    by_token = client.completions.create(
        prompt=PROMPT, max_tokens=20, extra_body=ignore | {"stop_token_ids": [token]}, **GREEDY
    )
    assert by_token.choices[0].finish_reason == "stop"
    assert by_token.usage.completion_tokens == want.token_ids.index(token) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, oracle, stream):
    want = oracle(PROMPT, temperature=0.0, max_tokens=6, logprobs=3).outputs[0]
    got = client.completions.create(prompt=PROMPT, max_tokens=6, logprobs=3, stream=stream, **GREEDY)
    pieces = [p.choices[0].logprobs for p in got] if stream else [got.choices[0].logprobs]
    assert sum((p.token_logprobs for p in pieces), []) == pytest.approx(
        [entries[i].logprob for i, entries in zip(want.token_ids, want.logprobs, strict=True)], abs=1e-9
    )
    tokens = sum((p.tokens for p in pieces), [])
    assert tokens == [e[i].decoded_token for i, e in zip(want.token_ids, want.logprobs, strict=True)]
    assert [max(top.values()) for p in pieces for top in p.top_logprobs] == pytest.approx(
        [max(e.logprob for e in entries.values()) for entries in want.logprobs], abs=1e-9
    )
    offsets = sum((p.text_offset for p in pieces), [])
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_puts_the_prompt_and_its_logprobs_first(client, server, oracle, as_ids, stream):
    ids = server.llm.tokenizer.encode(PROMPT)
    want = oracle(PROMPT, temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=2)
    got = client.completions.create(
        prompt=ids if as_ids else PROMPT, max_tokens=4, logprobs=2, echo=True, stream=stream, **GREEDY
    )
    pieces = [p.choices[0] for p in got] if stream else [got.choices[0]]
    assert "".join(p.text for p in pieces) == PROMPT + want.outputs[0].text
    scores = sum((p.logprobs.token_logprobs for p in pieces), [])
    assert scores[0] is None and len(scores) == len(ids) + 4
    assert scores[1 : len(ids)] == pytest.approx(
        [e[i].logprob for i, e in zip(ids[1:], want.prompt_logprobs[1:], strict=True)], abs=1e-9
    )


def test_echo_of_a_prompt_longer_than_a_chunk(server):
    ids = [i % 90 for i in range(150)]
    llm = server.llm
    assert llm.config.scheduler.max_num_batched_tokens >= 8
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    got = server.post("/v1/completions", json=body).json()
    assert len(got["choices"][0]["logprobs"]["token_logprobs"]) == 150
    assert got["choices"][0]["text"] == llm.tokenizer.decode(ids, skip_special_tokens=False)
    assert got["usage"] == {
        "prompt_tokens": 150,
        "completion_tokens": 0,
        "total_tokens": 150,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompt_logprobs_in_the_form_of_vllm(server):
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 1, "temperature": 0}
    [first, *rest] = server.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
    assert first is None
    for token_id, entries in zip((6, 7), rest, strict=True):
        assert set(entries[str(token_id)]) == {"logprob", "rank", "decoded_token"}


def test_logit_bias_and_min_tokens(client, server):
    got = client.completions.create(prompt=PROMPT, max_tokens=5, logit_bias={"70": 100}, **GREEDY)
    assert got.choices[0].text == server.llm.tokenizer.decode([70] * 5)
    eos = server.llm.tokenizer.eos_token_ids[0]
    for min_tokens, num_tokens in ((0, 1), (3, 4)):
        got = client.completions.create(
            prompt=PROMPT,
            max_tokens=9,
            logit_bias={str(eos): 100},
            extra_body={"min_tokens": min_tokens},
            **GREEDY,
        )
        assert got.usage.completion_tokens == num_tokens and got.choices[0].finish_reason == "stop"


def test_twenty_at_once_are_the_same_as_alone(client):
    def ask(i):
        got = client.completions.create(
            model="tiny",
            prompt=f"Story number {i} about the harbour",
            seed=i,
            temperature=0.0 if i % 2 else 0.8,
            max_tokens=8 + i,
            extra_body={"ignore_eos": True},
        )
        return got.choices[0].text, got.usage.completion_tokens

    alone = [ask(i) for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(20))) == alone
    assert [n for _, n in alone] == [8 + i for i in range(20)]


def test_cached_tokens_are_reported(client):
    prompt = [i % 95 for i in range(40, 140)]
    first, second = (
        client.completions.create(
            prompt=prompt, max_tokens=1, **GREEDY
        ).usage.prompt_tokens_details.cached_tokens
        for _ in range(2)
    )
    assert (first, second) == (0, 96)


def test_a_stream_never_splits_a_character(serve, synthetic_llm):
    """A byte-level vocabulary and random weights: most answers are broken UTF-8, some letters have two bytes."""
    with serve(synthetic_llm) as server, server.client() as client:
        for seed in range(6):
            params = dict(
                model="tiny", prompt="Привет", max_tokens=24, seed=seed, extra_body={"ignore_eos": True}
            )
            params["logit_bias"] = {str(i): 12 for i in server.llm.tokenizer.encode("Привет мир")}
            whole = client.completions.create(**params).choices[0].text
            pieces = [c.choices[0].text for c in client.completions.create(stream=True, **params)]
            assert "".join(pieces) == whole and not whole.isascii()
            assert 1 < len(pieces) < 24, "some tokens complete no character, and say nothing"


def test_a_model_without_tokenizer_takes_and_gives_no_text(serve, bare_llm):
    with serve(bare_llm) as server:
        got = server.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 4, "logprobs": 1}).json()
        assert got["choices"][0]["text"] == "" and got["usage"]["completion_tokens"] == 4
        for path, body in (
            ("/v1/completions", {"prompt": "text"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ):
            reply = server.post(path, json=body)
            assert reply.status_code == 400 and "no tokenizer" in reply.json()["error"]["message"]
