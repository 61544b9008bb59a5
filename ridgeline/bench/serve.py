"""A server under load, seen from its clients: TTFT, TPOT, ITL, E2EL, throughput and goodput over HTTP.

Drives any OpenAI-compatible server, so that engines are compared by one client. The options have the names of
`vllm bench serve`; what the metrics mean is said in `serve_report` and in every result. Each run has words of
its own, and so have the warm-up requests: no prefix cache hits but where the workload shares a prefix.
In a conversation each turn follows the server's real answer, as messages, text or token ids.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ridgeline.bench.http_client import Target, get_json, request_bytes
from ridgeline.bench.load import Progress, Run, reading_delays, run_workload
from ridgeline.bench.result import make_document
from ridgeline.bench.serve_report import details, metrics
from ridgeline.bench.workload import (
    PLAIN_WORDS,
    Fixed,
    Gamma,
    Workload,
    WorkloadRequest,
    workload_named,
)
from ridgeline.errors import ConfigError, RidgelineError

Backend = Literal["openai", "openai-chat"]
PromptFormat = Literal["ids", "text"]
ENDPOINTS: dict[Backend, str] = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}

_LIMITED = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2el": "e2el_ms"}
_WARM_UP_SEED = 1_000_003
_WARM_UP_TOKENS = 16
_ASSUMED_VOCAB_SIZE = 32_000
_MIN_WORDS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What to send, where to and how fast. The fields are the flags of `ridgeline bench serve`."""

    base_url: str | None = None
    """Address of the server, such as http://127.0.0.1:8000; takes the place of --host and --port."""
    host: str = "127.0.0.1"
    """The server's host."""
    port: int = 8000
    """The server's port."""
    endpoint: str | None = None
    """Path of the endpoint; the default is the backend's: /v1/completions or /v1/chat/completions."""
    backend: Backend = "openai"
    """openai is completions, openai-chat is chat completions."""
    model: str | None = None
    """Name the server knows the model by; the default is the first of its GET /v1/models."""
    workload: str | None = None
    """w1 ... w5l, or the path of a description or trace; the default is --input-len and --output-len."""
    num_prompts: int | None = None
    """Requests in a run; the default is the workload's number, or 100."""
    input_len: int = 128
    """Prompt tokens of each request, where no --workload is given."""
    output_len: int = 64
    """Output tokens of each request, where no --workload is given."""
    request_rate: float | None = None
    """Requests per second; the default is the workload's own arrivals, or all at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps with --request-rate: 1 is Poisson, less is burstier."""
    max_concurrency: int | None = None
    """At most this many requests under way; without arrival times, a closed loop. Default: the workload's."""
    num_warmups: int = 1
    """Requests before the first run, with other words; they are not counted."""
    num_runs: int = 1
    """Runs, each with words of its own; latencies are pooled, throughputs have one sample a run."""
    ignore_eos: bool = True
    """Ask the server to go on after end-of-sequence, so that every answer has its full length."""
    prompt_format: PromptFormat = "ids"
    """Prompts of completions as token ids or as text; chat is always text, of words of one token each."""
    vocab_size: int | None = None
    """Token ids are below this; the default is what the server says, or 32,000."""
    seed: int = 0
    """Run k takes its words from seed + k."""
    goodput: tuple[str, ...] = ()
    """Limits in milliseconds, such as ttft:500 tpot:50 e2el:5000."""
    extra_body: str = "{}"
    """JSON object whose fields go into every request."""
    timeout_s: float = 600.0
    """A request without an end by then has failed."""

    def __post_init__(self) -> None:
        positive = ("num_prompts", "input_len", "output_len", "request_rate", "burstiness", "max_concurrency")
        for name in (*positive, "num_runs", "vocab_size", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected more than 0")
        if self.num_warmups < 0:
            raise ConfigError(f"--num-warmups {self.num_warmups}: expected 0 or more")

    @property
    def target(self) -> Target:
        """With the API key of the environment: a command line ends up in results and histories.

        Raises ConfigError for an address that is none.
        """
        host = f"[{self.host}]" if ":" in self.host else self.host
        url = self.base_url or f"http://{host}:{self.port}"
        return Target.from_url(url, api_key=os.environ.get("OPENAI_API_KEY"))

    @property
    def limits_ms(self) -> dict[str, float]:
        """Metric -> its limit, of --goodput. Raises ConfigError."""
        limits = {}
        for given in self.goodput:
            name, _, value = given.partition(":")
            try:
                limits[_LIMITED[name]] = float(value)
            except (KeyError, ValueError):
                raise ConfigError(
                    f"--goodput {given!r}: expected ttft:MS, tpot:MS or e2el:MS, such as ttft:500 tpot:50"
                ) from None
        return limits

    def chosen_workload(self) -> Workload:
        """The workload with what the flags change of it. Raises ConfigError."""
        if self.workload is not None:
            workload = workload_named(self.workload)
        else:
            workload = Workload(
                name="fixed",
                num_requests=self.num_prompts or 100,
                prompt_lens=Fixed(self.input_len),
                output_lens=Fixed(self.output_len),
            )
        changes: dict[str, Any] = {}
        if self.num_prompts is not None:
            changes["num_requests"] = self.num_prompts
        if self.max_concurrency is not None:
            changes["max_concurrency"] = self.max_concurrency
        if self.request_rate is not None:
            changes["arrivals"] = Gamma(self.request_rate, self.burstiness)
        return replace(workload, **changes)

    def fields_of_all_requests(self, model: str) -> dict[str, Any]:
        """The body of a request but for its prompt and length. Raises ConfigError for --extra-body."""
        try:
            extra = json.loads(self.extra_body)
        except ValueError:
            extra = None
        if not isinstance(extra, dict):
            raise ConfigError(
                f"--extra-body {self.extra_body!r}: expected a JSON object such as '{{\"top_k\": 1}}'"
            )
        fields = {"model": model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        return fields | ({"ignore_eos": True} if self.ignore_eos else {}) | extra


def measure_serve(options: ServeOptions, *, progress: Progress | None = None) -> dict[str, Any]:
    """Load the server as the options say; the result document, its metrics over the answered requests.

    Raises RidgelineError: no server, or no request of a run was answered. ConfigError: options.
    """
    return asyncio.run(_measure(options, progress))


async def _measure(options: ServeOptions, progress: Progress | None) -> dict[str, Any]:
    target, limits, workload = options.target, options.limits_ms, options.chosen_workload()
    options.fields_of_all_requests("")
    model, vocab_size = await _served_model(target, options)
    common = options.fields_of_all_requests(model)
    as_text = options.backend == "openai-chat" or options.prompt_format == "text"
    words, prompts = await _words(target) if as_text else (None, f"random token ids below {vocab_size}")
    path = options.endpoint or ENDPOINTS[options.backend]

    def payload(request: WorkloadRequest) -> bytes:
        body = common | {"max_tokens": request.max_tokens, **_prompt(options, request)}
        if not as_text and request.conversation is not None:
            body |= {"return_token_ids": True}  # a vLLM extension; the next turn needs them
        return request_bytes(target, path, body)

    async def run(requests: Sequence[WorkloadRequest], report: Progress | None) -> Run:
        done = await run_workload(
            target,
            requests,
            payload=payload,
            max_concurrency=workload.max_concurrency,
            closed_loop=options.max_concurrency is not None and not any(r.arrival_s for r in requests),
            timeout_s=options.timeout_s,
            progress=report,
        )
        if not done.answered:
            raise RidgelineError(
                f"none of {len(requests)} requests to {target.url}{path} was answered; the first: "
                f"{done.records[0].answer.error}"
            )
        return done

    delays = await reading_delays()
    if options.num_warmups:
        others = workload.requests(vocab_size=vocab_size, seed=options.seed + _WARM_UP_SEED, words=words)
        first = [
            replace(r, arrival_s=0.0, max_tokens=min(r.max_tokens, _WARM_UP_TOKENS))
            for r in others[: options.num_warmups]
        ]
        await run(first, None)
    seeds = [options.seed + k for k in range(options.num_runs)]
    runs = [
        await run(workload.requests(vocab_size=vocab_size, seed=seed, words=words), progress)
        for seed in seeds
    ]
    return make_document(
        "serve",
        metrics=metrics(runs, limits),
        settings=asdict(options) | {"model": model, "goodput": [*options.goodput], "vocab_size": vocab_size},
        workload=workload.describe(),
        seeds=seeds,
        details={"server": target.url, "prompts": prompts, **details(runs, workload, limits, delays)},
    )


async def _served_model(target: Target, options: ServeOptions) -> tuple[str, int]:
    """Its name, and the number of token ids that prompts may use. Raises RidgelineError."""
    card: Mapping[str, Any] = {}
    if options.model is None or options.vocab_size is None:
        try:
            cards = await get_json(target, "/v1/models")
            card = next(c for c in cards["data"] if options.model in (None, c["id"]))
        except (RidgelineError, LookupError, TypeError, StopIteration) as error:
            if options.model is None:
                message = str(error) if isinstance(error, RidgelineError) else f"{target.url} names no model"
                raise RidgelineError(f"{message}; --model gives its name") from None
    listed = (card.get("meta") or {}).get("n_vocab")
    return options.model or card["id"], options.vocab_size or listed or _ASSUMED_VOCAB_SIZE


async def _words(target: Target) -> tuple[Sequence[tuple[int, str]], str]:
    """Words for prompts, and what is known of them: where the server can be asked, each is one token."""

    async def num_tokens(text: str) -> int:
        # "prompt" is vLLM's name and ours, "content" llama.cpp's; neither counts BOS.
        body = {"prompt": text, "content": text, "add_special_tokens": False}
        return len((await get_json(target, "/tokenize", body))["tokens"])

    async def are_one_token(words: Sequence[tuple[int, str]]) -> bool:
        """Said twice, since some tokenizers put a space of their own in front of a text."""
        text = "".join(word for _, word in words)
        return await num_tokens(text + text) - await num_tokens(text) == len(words)

    try:
        words = PLAIN_WORDS
        if not await are_one_token(words):
            words = tuple([word for word in words if await are_one_token((word,))])
            if len(words) < _MIN_WORDS or not await are_one_token(words):
                return PLAIN_WORDS, "plain words, of which most are more than one token to the server"
        return words, f"{len(words)} words, each one token by the server's /tokenize"
    except (RidgelineError, LookupError, TypeError):
        return PLAIN_WORDS, "plain words, taken to be one token each: the server has no /tokenize to ask"


def _prompt(options: ServeOptions, request: WorkloadRequest) -> dict[str, Any]:
    if options.backend == "openai-chat":
        roles = itertools.cycle(("user", "assistant"))
        return {"messages": [{"role": next(roles), "content": text} for text in request.texts]}
    return {"prompt": list(request.prompt_token_ids) if options.prompt_format == "ids" else request.text}
