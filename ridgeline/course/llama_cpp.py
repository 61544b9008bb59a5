"""llama.cpp beside us: the same GGUF file, the same threads, the same minutes, in a process of its own.

The `xllamacpp` wheel (extra `course`) is llama.cpp's server without HTTP. It lives in a child, so that its
threads, its log on stderr and a crash are not ours; one JSON line asks, one answers. Where the wheel is not
installed or does not run on this processor there is no peer, and a notebook says so.

As a module it is that child: python -m ridgeline.course.llama_cpp model.gguf 2 8 1024
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from ridgeline.errors import ConfigError

DECODE_TOKENS = 24
VOCAB = 32_000
"""Prompts are token ids below this: every model of the course has as many."""


class LlamaCpp:
    """Owns a child with one loaded model. Raises ConfigError, with the child's reason, where it cannot run.

    with LlamaCpp(locate_model("smollm2"), num_threads=2) as peer:
        peer.decode_s(1, context=128)
    """

    def __init__(
        self, path: str | Path, *, num_threads: int, max_num_seqs: int = 1, max_model_len: int = 1024
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise ConfigError("llama.cpp is not installed: pip install 'ridgeline[course]'")
        sizes = [str(n) for n in (num_threads, max_num_seqs, max_model_len)]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ridgeline.course.llama_cpp", str(path), *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._seed = 0
        try:
            self.version = str(self._answer()["version"])
        except ConfigError:
            self.close()
            raise

    def decode_s(self, batch_size: int, *, context: int = 128, num_tokens: int = DECODE_TOKENS) -> float:
        """Median seconds between two tokens of a sequence, `batch_size` of them decoding together."""
        return self._ask(batch_size, max(context - num_tokens // 2, 1), num_tokens + 2)["decode_s"]

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds of one prompt, as llama.cpp's own timings say."""
        return self._ask(1, num_tokens, 1)["prefill_s"]

    def _ask(self, batch_size: int, prompt_len: int, output_len: int) -> Mapping[str, float]:
        assert self._child.stdin is not None
        self._seed += 1
        try:
            self._child.stdin.write(json.dumps([batch_size, prompt_len, output_len, self._seed]) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise ConfigError("llama.cpp ended; it does not run here") from None
        return self._answer()

    def _answer(self) -> Mapping[str, Any]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise ConfigError(f"llama.cpp ended with status {self._child.wait()}; it does not run here")

    def close(self) -> None:
        """End the child."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        self._child.terminate()
        self._child.wait()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(path: str, num_threads: int, max_num_seqs: int, max_model_len: int) -> None:
    """Answer on stdout what is asked on stdin, until it is closed."""
    import xllamacpp  # type: ignore[import-untyped,import-not-found,unused-ignore]

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel = max_num_seqs
    params.n_ctx = max_num_seqs * max_model_len
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    server = xllamacpp.Server(params)
    _say({"version": xllamacpp.__version__})

    def request(sizes: tuple[int, int, int]) -> dict[str, float]:
        prompt_len, output_len, seed = sizes
        prompt = random.Random(seed).choices(range(1000, VOCAB), k=prompt_len)
        wanted = {"prompt": prompt, "n_predict": output_len, "temperature": 0, "ignore_eos": True}
        timings: dict[str, float] = server.handle_completions(wanted | {"cache_prompt": False})["timings"]
        return timings

    with ThreadPoolExecutor(max_num_seqs) as pool:
        for line in sys.stdin:
            batch_size, prompt_len, output_len, seed = json.loads(line)
            first = seed * max_num_seqs
            every = list(pool.map(request, [(prompt_len, output_len, first + i) for i in range(batch_size)]))
            _say(
                {
                    "decode_s": statistics.median(t["predicted_per_token_ms"] for t in every) / 1e3,
                    "prefill_s": statistics.median(t["prompt_ms"] for t in every) / 1e3,
                }
            )


def _say(answer: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], *map(int, sys.argv[2:5]))
