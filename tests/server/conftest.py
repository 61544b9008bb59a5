"""A real server on a free port, over a tiny seeded model, and the real OpenAI client."""

from __future__ import annotations

import contextlib
import faulthandler
import threading
import time
from dataclasses import dataclass

import httpx
import openai
import pytest
import tokenizers
import uvicorn

from ridgeline.config import EngineConfig
from ridgeline.engine.async_engine import AsyncEngine
from ridgeline.engine.engine import LLMEngine
from ridgeline.models.synth import synthesize
from ridgeline.sampling_params import SamplingParams
from ridgeline.server.app import create_app
from ridgeline.tokenizer import Tokenizer
from tests.tiny import tiny_model

# float64: there the eager executor gives a request the same tokens whatever else is in the batch.
OPTIONS = dict(
    executor="eager", dtype="float64", max_model_len=256, kv_cache_tokens=2048, max_num_seqs=8, num_threads=1
)
NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass
class Server:
    port: int
    llm: LLMEngine

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def client(self, api_key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def post(self, path, **options):
        return httpx.post(self.url + path, timeout=60, **options)

    def get(self, path, **options):
        return httpx.get(self.url + path, timeout=60, **options)

    def metrics(self):
        """Sample name with its labels -> value."""
        lines = [line for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@contextlib.contextmanager
def serving(llm, **options):
    """Run the app in a thread until the block ends."""
    app = create_app(AsyncEngine(llm), model_name=NAME, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Server(server.servers[0].sockets[0].getsockname()[1], llm)
    finally:
        server.should_exit = True
        thread.join(30)
        if thread.is_alive():
            faulthandler.dump_traceback(all_threads=True)
        assert not thread.is_alive(), "the server did not shut down"


def tiny_tokenizer():
    """One token per character: 0 is the space, 1 the newline, then printable ASCII; 96 ends a text."""
    characters = ["\u0120", "\u010a", *map(chr, range(33, 126))]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(characters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    return Tokenizer(
        backend, special_tokens={"bos": 95, "eos": 96}, eos_token_ids=[96], chat_template=TEMPLATE
    )


def make_llm(**changes):
    config = EngineConfig.from_options(NAME, **(OPTIONS | changes))
    return LLMEngine(config, tiny_model("llama"), tiny_tokenizer())


@pytest.fixture
def serve():
    """Run a server of one's own: `with serve(api_key=...) as server`."""
    return lambda llm=None, **options: serving(llm or make_llm(), **options)


@pytest.fixture
def bare_llm():
    """Without a tokenizer."""
    return LLMEngine(EngineConfig.from_options(NAME, **OPTIONS), tiny_model("llama"), None)


@pytest.fixture
def synthetic_llm(tmp_path):
    """With a tokenizer of bytes."""
    path = synthesize("tiny-llama", "F32", path=tmp_path / "tiny.gguf")
    return LLMEngine.from_config(EngineConfig.from_options(str(path), **OPTIONS))


@pytest.fixture(scope="session")
def server():
    with serving(make_llm()) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def oracle():
    """The same model without a server: a prompt and sampling parameters -> its finished output."""
    llm = make_llm()

    def generate(prompt, **params):
        llm.add_request(prompt, SamplingParams(**params))
        while True:
            for output in llm.step():
                if output.finished:
                    return output

    return generate
