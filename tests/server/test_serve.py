"""`ridgeline serve` as a command."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from ridgeline.cli.main import main
from ridgeline.models.synth import synthesize

COMMAND = [sys.executable, "-c", "from ridgeline.cli.main import main; main()", "serve"]
OPTIONS = ["--executor", "eager", "--max-model-len", "128", "--kv-cache-tokens", "1024"]


def test_it_says_when_it_is_ready_serves_and_stops(tmp_path):
    model_path = str(synthesize("tiny-llama", "F32", path=tmp_path / "tiny.gguf"))
    environment = os.environ | {"RIDGELINE_API_KEY": "s3cret"}
    process = subprocess.Popen(
        [*COMMAND, "-m", model_path, *OPTIONS, "--port", "0", "--served-model-name", "mine"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A background job, as CI may be, inherits an ignored SIGINT; a terminal's Ctrl-C is what is tested.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        ready = process.stdout.readline()
        assert "serves mine (eager), KV cache 1,024 tokens" in ready
        url = ready.split()[0]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        key = {"authorization": "Bearer s3cret"}
        [card] = httpx.get(f"{url}/v1/models", headers=key).json()["data"]
        assert (card["id"], card["max_model_len"]) == ("mine", 128)
        body = {"model": "mine", "prompt": "a", "max_tokens": 3, "ignore_eos": True}
        got = httpx.post(f"{url}/v1/completions", headers=key, json=body, timeout=60).json()
        assert got["usage"]["completion_tokens"] == 3
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (130, "", "")


def test_a_taken_port_is_known_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1 port {port}.*--port"):
            main(["serve", "-m", "no-such-model", "--port", port])


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_extra_says_what_to_install(monkeypatch, missing):
    for name in [name for name in sys.modules if name.startswith("ridgeline.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing}.*pip install 'ridgeline\[serve\]'"):
        main(["serve", "-m", "no-such-model"])
