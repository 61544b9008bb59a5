"""`ridgeline generate`: one answer, streamed, and what it cost."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from cyclopts import Parameter

from ridgeline.cli.options import GreedyParams, print_json
from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine, Prompt
from ridgeline.errors import RequestError
from ridgeline.request import RequestOutput
from ridgeline.sampling_params import SamplingParams


def generate(
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    *,
    engine: EngineConfig,
    sampling: GreedyParams = GreedyParams(),
    chat: bool = False,
    json: bool = False,
    stats: bool = False,
) -> None:
    """Continue a prompt, or answer it with --chat; tokens appear as they are made.

    Examples:

        ridgeline generate -m smollm2 "The capital of France is" --max-tokens 20

        ridgeline generate -m smollm2 --chat --stats "Why is the sky blue?"

        ridgeline generate -m smollm2 "1, 2, 3," --json | tail -1 | jq .metrics

        ridgeline generate -m model.gguf "Once" --executor eager --dtype bfloat16 --no-kv-cache

    Parameters
    ----------
    prompt
        The text; - reads it from standard input.
    chat
        Put the text through the model's chat template, as a user's message.
    json
        End with one JSON document: outputs and metrics.
    stats
        End with time to first token, speed and memory.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if json and sampling.logprobs is None:
        sampling = replace(sampling, logprobs=0)
    started = time.monotonic()
    llm = LLMEngine.from_config(engine)
    load_s = time.monotonic() - started
    try:
        request = _chat_prompt(llm, text) if chat else text
        final = run(llm, request, sampling, on_text=None if json else _write)
    finally:
        llm.close()
    measured = metrics(final, load_s=load_s)
    if json:
        print_json({"outputs": [_output(o) for o in final.outputs], "metrics": measured})
        return
    sys.stdout.write("\n")
    if stats:
        sys.stdout.write("\n" + summary(measured, executor=str(llm.config.executor)) + "\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _chat_prompt(llm: LLMEngine, text: str) -> Prompt:
    if llm.tokenizer is None:
        raise RequestError("--chat: this model has no tokenizer and no chat template; leave --chat out")
    rendered = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return {"prompt_token_ids": llm.tokenizer.encode(rendered, add_special_tokens=False)}


def run(
    llm: LLMEngine, prompt: Prompt, params: SamplingParams, *, on_text: Callable[[str], None] | None
) -> RequestOutput:
    """Run one request to its end; on_text gets each new piece of the first choice."""
    llm.add_request(prompt, params)
    shown = 0
    while True:
        for output in llm.step():
            text = output.outputs[0].text
            if on_text is not None and len(text) > shown:
                on_text(text[shown:])
                shown = len(text)
            if output.finished:
                return output


def metrics(output: RequestOutput, *, load_s: float) -> dict[str, Any]:
    """Times in seconds, speeds in tokens per second, memory in bytes."""
    times = output.metrics
    num_output = sum(len(choice.token_ids) for choice in output.outputs)
    measured: dict[str, Any] = {
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_output_tokens": num_output,
        "num_cached_tokens": times.num_cached_tokens,
        "load_s": load_s,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "ttft_s": None,
        "e2e_s": None,
        "prompt_tokens_per_s": None,
        "decode_tokens_per_s": None,
    }
    if times.first_token_time is not None and times.finished_time is not None:
        ttft = times.first_token_time - times.arrival_time
        decode = times.finished_time - times.first_token_time
        measured["ttft_s"] = ttft
        measured["e2e_s"] = times.finished_time - times.arrival_time
        measured["prompt_tokens_per_s"] = len(output.prompt_token_ids) / ttft
        if num_output > len(output.outputs) and decode > 0:
            measured["decode_tokens_per_s"] = (num_output - len(output.outputs)) / decode
    return measured


def summary(measured: dict[str, Any], *, executor: str) -> str:
    """The metrics for people."""

    def speed(name: str) -> str:
        value = measured[name]
        return "-" if value is None else f"{value:,.1f} tok/s"

    rows = (
        (
            "time to first token",
            "-" if measured["ttft_s"] is None else f"{1000 * measured['ttft_s']:,.0f} ms",
        ),
        ("prompt", f"{speed('prompt_tokens_per_s')}  ({measured['num_prompt_tokens']} tokens)"),
        ("decode", f"{speed('decode_tokens_per_s')}  ({measured['num_output_tokens']} tokens)"),
        ("model loaded in", f"{measured['load_s']:.2f} s"),
        ("peak memory", f"{measured['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        ("executor", executor),
    )
    return "\n".join(f"{name:>20}  {value}" for name, value in rows)


def _output(choice: Any) -> dict[str, Any]:
    logprobs = choice.logprobs
    return {
        "text": choice.text,
        "token_ids": choice.token_ids,
        "logprobs": None
        if logprobs is None
        else [entry[i].logprob for i, entry in zip(choice.token_ids, logprobs, strict=True)],
        "finish_reason": choice.finish_reason,
    }
