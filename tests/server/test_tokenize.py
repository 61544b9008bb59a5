"""/tokenize, /detokenize, /tokenizer_info in the form of vLLM, and token ids in answers."""

from __future__ import annotations

import json

import httpx
import pytest

PROMPT = "The sky over the harbour"


def test_tokens_are_the_tokenizers_own(server):
    tokenizer = server.llm.tokenizer
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    got = server.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert got["tokens"] == tokenizer.encode(PROMPT) and got["count"] == len(got["tokens"])
    assert got["max_model_len"] == 256
    assert got["token_strs"] == [tokenizer.token_text(i) for i in got["tokens"]]
    plain = server.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()
    assert plain["tokens"] == ids and "token_strs" not in plain
    assert server.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}
    assert server.post("/detokenize", json={"tokens": [96]}).json() == {"prompt": "<eos>"}


def test_messages_go_through_the_template(server):
    messages = [{"role": "user", "content": "Hi"}]
    tokenizer = server.llm.tokenizer
    for generate in (True, False):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=generate)
        got = server.post("/tokenize", json={"messages": messages, "add_generation_prompt": generate}).json()
        assert got["tokens"] == tokenizer.encode(text, add_special_tokens=False)


def test_tokenizer_info(server):
    got = server.get("/tokenizer_info").json()
    assert (got["bos_token"], got["eos_token"]) == ("<bos>", "<eos>")
    assert got["chat_template"] == server.llm.tokenizer.chat_template and got["vocab_size"] == 97


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "expected one of prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "expected one of prompt"),
        ("/tokenize", {"prompt": 3}, "prompt: "),
        ("/detokenize", {"tokens": "abc"}, "tokens: "),
        ("/detokenize", {}, "tokens: "),
    ],
)
def test_mistakes_are_400(server, path, body, message):
    answer = server.post(path, json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_without_a_tokenizer_and_without_the_key(serve, bare_llm):
    with serve(bare_llm, api_key="secret") as server:
        for method, path in (("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info")):
            assert httpx.request(method, server.url + path, json={"prompt": "a"}).status_code == 401
            headers = {"Authorization": "Bearer secret"}
            body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [1]}
            answer = httpx.request(method, server.url + path, json=body, headers=headers)
            assert answer.status_code == 400 and "has no tokenizer" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_of_an_answer(server, oracle, stream):
    want = oracle(PROMPT, temperature=0.0, max_tokens=9, ignore_eos=True)
    ids = list(want.outputs[0].token_ids)
    for path, ask in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ):
        body = ask | {"max_tokens": 9, "temperature": 0, "ignore_eos": True, "stream": stream}
        answer = server.post(path, json=body | {"return_token_ids": True})
        if stream:
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
            choices = [json.loads(event)["choices"][0] for event in events]
        else:
            choices = answer.json()["choices"]
        got = [i for choice in choices for i in choice.get("token_ids", ())]
        assert len(got) == 9
        if path == "/v1/completions":
            assert got == ids
        assert "token_ids" not in server.post(path, json=body).text


def test_the_requests_of_lm_eval(server, oracle):
    """What its `local-completions` sends for a log-likelihood, and the fields that it reads."""
    prompts = [server.llm.tokenizer.encode(text) for text in (PROMPT, "Night falls")]
    body = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True}  # fmt: skip
    choices = server.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    for ids, choice in zip(prompts, choices, strict=True):
        want = oracle({"prompt_token_ids": ids}, temperature=0.0, max_tokens=1, prompt_logprobs=1)
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(ids) + 1
        for i, token_id in enumerate(ids[1:], 1):
            entries = want.prompt_logprobs[i]
            assert found["token_logprobs"][i] == pytest.approx(entries[token_id].logprob, abs=1e-9)
            # It calls a token greedy where its logprob equals the largest one.
            is_greedy = entries[token_id].rank == 1
            assert (found["token_logprobs"][i] == max(found["top_logprobs"][i].values())) == is_greedy
