"""A real server on a free port, over a tiny seeded model, and the real OpenAI client."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass

import httpx
import openai
import pytest
import uvicorn

from ridgeline import LLM
from ridgeline.config import EngineConfig
from ridgeline.engine.async_engine import AsyncEngine
from ridgeline.engine.engine import LLMEngine
from ridgeline.models.synth import synthesize
from ridgeline.server.app import create_app

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
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Server(server.servers[0].sockets[0].getsockname()[1], llm)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synthesize("tiny-llama", "F32", seed=0, path=path)
    return str(path)


@pytest.fixture(scope="session")
def make_llm(model_path):
    def make(**changes):
        llm = LLMEngine.from_config(EngineConfig.from_options(model_path, **(OPTIONS | changes)))
        llm.tokenizer.chat_template = TEMPLATE
        return llm

    return make


@pytest.fixture(scope="session")
def server(make_llm):
    with serving(make_llm()) as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def oracle(model_path):
    """The same model without a server; asked one request at a time."""
    with LLM(model_path, **OPTIONS) as llm:
        yield llm
