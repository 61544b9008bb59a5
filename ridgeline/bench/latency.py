"""One request at a time: prefill and decode speed, as llama-bench measures them.

Prompts are random token ids, fresh for every repetition so that the prefix cache never hits; answers are
greedy and go on after end-of-sequence. Prefill is the time to the first token, decode the time after it, so a
decode of n tokens needs an `output_len` of n + 1. Tokenization is left out, sampling is not.

    python -m ridgeline.bench.latency model.gguf --prompt-len 512 --output-len 1 --json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass

from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError, RidgelineError
from ridgeline.sampling_params import SamplingParams

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Latency:
    """Every sample, in tokens per second and in the order of the repetitions."""

    prompt_len: int
    output_len: int
    prefill_tok_s: tuple[float, ...]
    decode_tok_s: tuple[float, ...]
    """Empty where output_len is 1."""


def measure_latency(llm: LLMEngine, *, prompt_len: int, output_len: int, reps: int, seed: int) -> Latency:
    """Run `reps` requests one after the other, after a short one that is not counted."""
    for name, value in (("prompt_len", prompt_len), ("output_len", output_len), ("reps", reps)):
        if value < 1:
            raise ConfigError(f"{name}={value}: expected at least 1")
    rng = random.Random(seed)
    vocab_size = llm.model.config.vocab_size
    prefill, decode = [], []
    for rep in range(-1, reps):
        prompt = [rng.randrange(vocab_size) for _ in range(prompt_len)]
        num_output = output_len if rep >= 0 else min(output_len, _WARM_UP_TOKENS)
        prefill_s, decode_s = _time_request(llm, prompt, num_output)
        if rep >= 0:
            prefill.append(prompt_len / prefill_s)
            if output_len > 1:
                decode.append((output_len - 1) / decode_s)
    return Latency(prompt_len, output_len, tuple(prefill), tuple(decode))


def _time_request(llm: LLMEngine, prompt: list[int], num_output: int) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)
    started = time.perf_counter()
    llm.add_request({"prompt_token_ids": prompt}, params)
    first = None
    while llm.has_unfinished:
        outputs = llm.step()
        if first is None and outputs:
            first = time.perf_counter()
    assert first is not None
    return first - started, time.perf_counter() - first


def main() -> None:
    """Measure in this process and print: a fresh process for each round keeps a comparison fair."""
    parser = argparse.ArgumentParser(prog="python -m ridgeline.bench.latency", description=__doc__)
    parser.add_argument("model", help="a .gguf file, a Hugging Face directory or an alias")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--reps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of two lines of text")
    args = parser.parse_args()
    length = args.prompt_len + args.output_len
    try:
        llm = LLMEngine.from_config(
            EngineConfig.from_options(
                args.model,
                num_threads=args.num_threads,
                max_num_seqs=1,
                max_model_len=length,
                kv_cache_tokens=2 * length + 64,
            )
        )
        result = measure_latency(
            llm, prompt_len=args.prompt_len, output_len=args.output_len, reps=args.reps, seed=args.seed
        )
        llm.close()
    except RidgelineError as error:
        sys.exit(f"error: {error}")
    if args.json:
        print(json.dumps(asdict(result)))
        return
    for name, samples in (("prefill", result.prefill_tok_s), ("decode", result.decode_tok_s)):
        if samples:
            print(f"{name:8} {statistics.median(samples):10,.1f} tok/s, median of {len(samples)}")


if __name__ == "__main__":
    main()
