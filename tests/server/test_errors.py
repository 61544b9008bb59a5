"""What a client did wrong, told in OpenAI's form; and what happens when the engine dies."""

from __future__ import annotations

import json

import openai
import pytest

from ridgeline.server.protocol import CompletionBody, parse_body

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]


def refused(reply, status=400):
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (COMPLETIONS, {}, "prompt", "expected a string"),
        (COMPLETIONS, {"prompt": 5}, "prompt", "given 5"),
        (COMPLETIONS, {"prompt": []}, "prompt", "given []"),
        (COMPLETIONS, {"prompt": ["a", 5]}, "prompt", 'given ["a", 5]'),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "5"}, "max_tokens", "integer"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": True}, "max_tokens", "integer"),
        (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream", "boolean"),
        (COMPLETIONS, {"prompt": "a", "stop": 5}, "stop", "string or"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a", 5]}, "stop", "string"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"5": "x"}}, "logit_bias", "number"),
        (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of", "not supported"),
        (COMPLETIONS, {"prompt": "a", "suffix": "x"}, "suffix", "not supported"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {}}, "stream_options", "set stream"),
        (CHAT, {}, "messages", "required"),
        (CHAT, {"messages": [{"role": 5}]}, "messages", "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools", "not supported"),
        (
            CHAT,
            {"messages": USER, "response_format": {"type": "json_object"}},
            "response_format",
            "json_object",
        ),
        (CHAT, {"messages": USER, "top_logprobs": 3}, "top_logprobs", "set logprobs"),
        (CHAT, {"messages": USER, "logprobs": 3}, "logprobs", "boolean"),
    ],
)
def test_a_wrong_field_is_named(server, path, body, param, words):
    error = refused(server.post(path, json=body))
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert words in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"n": 0},
        {"max_tokens": 0},
        {"logprobs": -2},
        {"presence_penalty": 3},
        {"min_tokens": 9, "max_tokens": 8},
        {"stop": ""},
        {"seed": 2**70},
        {"logit_bias": {"x": 1}},
    ],
)
def test_a_value_out_of_range_is_named(server, body):
    for stream in (False, True):
        error = refused(server.post(COMPLETIONS, json={"prompt": "a", "stream": stream, **body}))
        assert next(iter(body)) in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers(server, stream):
    error = refused(server.post(COMPLETIONS, json={"prompt": [5] * 300, "stream": stream}))
    assert "300" in error["message"] and "256" in error["message"]
    refused(server.post(COMPLETIONS, json={"prompt": [[5], [5] * 300], "stream": stream}))


@pytest.mark.parametrize("prompt", [[-1], [10**9], [[5], []]])
def test_token_ids_that_are_none(server, prompt):
    refused(server.post(COMPLETIONS, json={"prompt": prompt, "max_tokens": 1}))


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"prompt": "a",}', b"[]", b"5", b"\xff\xfe", b'{"prompt": "\\ud800"']
)
def test_malformed_json(server, content):
    for path in (COMPLETIONS, CHAT):
        refused(server.post(path, content=content))


def test_an_unknown_model_is_404(client, server):
    with pytest.raises(openai.NotFoundError, match="'gpt-9' is not served here; this server has 'tiny'"):
        client.completions.create(model="gpt-9", prompt="a")
    assert refused(server.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"


def test_unknown_paths_and_methods_keep_the_form(server):
    refused(server.get("/v1/nothing"), 404)
    refused(server.get(COMPLETIONS), 405)


def test_unknown_fields_are_ignored_and_logged_once(caplog):
    content = json.dumps({"prompt": "a", "my_field": 1, "user": "me", "best_of": 1, "tools": []}).encode()
    for _ in range(3):
        parse_body(CompletionBody, content)
    assert caplog.text.count("my_field") == 1
    assert "user" not in caplog.text and "best_of" not in caplog.text


def test_a_key_opens_v1_and_nothing_else_needs_it(serve):
    with serve(api_key="s3cret") as server:
        for api_key in ("wrong", "s3cre", "schlüssel".encode().decode("latin1")):
            reply = server.get("/v1/models", headers={"authorization": f"Bearer {api_key}".encode("latin1")})
            assert refused(reply, 401)["code"] == "invalid_api_key"
        refused(server.post(COMPLETIONS, content=b"{"), 401)
        with server.client("s3cret") as client:
            assert [m.id for m in client.models.list()] == ["tiny"]
            assert (
                client.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens == 1
            )
        assert [server.get(p).status_code for p in ("/health", "/metrics", "/version")] == [200] * 3


def test_when_the_engine_dies_everybody_is_told(serve, monkeypatch, caplog):
    with serve() as server, server.client() as client:
        submit, calls = server.llm.executor.submit, []

        def failing_submit(plan):
            calls.append(plan)
            if len(calls) == 4:
                raise RuntimeError("the executor fell over")
            return submit(plan)

        assert server.get("/health").status_code == 200
        monkeypatch.setattr(server.llm.executor, "submit", failing_submit)
        seen = []
        with pytest.raises(openai.APIError, match="RuntimeError: the executor fell over"):
            for chunk in client.completions.create(
                model="tiny", prompt=[5, 6], max_tokens=50, stream=True, extra_body={"ignore_eos": True}
            ):
                seen.append(chunk)
        assert 1 <= len(seen) <= 3
        for reply in (server.post(COMPLETIONS, json={"prompt": [5]}), server.get("/health")):
            assert refused(reply, 503)["code"] == "engine_dead"
            assert "the executor fell over" in reply.text
        assert server.get("/metrics").status_code == 200
    assert "the executor fell over" in caplog.text


def test_an_internal_error_is_500_in_the_same_form(server, monkeypatch, caplog):
    monkeypatch.setattr(server.llm.tokenizer, "encode", lambda *a, **k: 1 / 0)
    assert "ZeroDivisionError" in refused(server.post(COMPLETIONS, json={"prompt": "a"}), 500)["message"]
