"""`ridgeline serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ridgeline.config import EngineConfig
from ridgeline.engine.async_engine import AsyncEngine
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout


def serve(
    *,
    engine: EngineConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str | None = None,
    api_key: Annotated[str | None, Parameter(env_var="RIDGELINE_API_KEY")] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.

    Also /health, /version and /metrics (Prometheus). Ctrl-C stops it.

    Examples:

        ridgeline serve -m smollm2 --max-num-seqs 16

        ridgeline serve -m model.gguf --host 0.0.0.0 --port 9000 --served-model-name mine

        curl localhost:8000/v1/completions -d '{"prompt": "The capital of France is", "temperature": 0}'

    Parameters
    ----------
    host
        Address to listen on; 0.0.0.0 is every one of this machine.
    port
        Port to listen on; 0 takes a free one.
    served_model_name
        What clients call the model; the default is what -m says, of a path only the last part.
    api_key
        Clients must send it as "Authorization: Bearer KEY"; better given in the environment.
    """
    try:
        from ridgeline.server.app import create_app, run_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ridgeline serve needs the package {error.name}, which is not installed; "
            "pip install 'ridgeline[serve]'"
        ) from None
    with _bind(host, port) as sock:
        llm = LLMEngine.from_config(engine)
        name = served_model_name or Path(engine.model).absolute().name
        layout = llm.layout
        cache_bytes = layout.num_slots * CacheLayout.bytes_per_token(llm.model.config, layout.dtype)
        address, actual_port = sock.getsockname()[:2]
        run_server(
            create_app(AsyncEngine(llm), model_name=name, api_key=api_key),
            sock,
            ready=f"http://{f'[{address}]' if ':' in address else address}:{actual_port} serves {name} "
            f"({llm.config.executor}), KV cache {layout.num_slots:,} tokens, {cache_bytes / 2**20:,.1f} MiB",
        )


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a taken port is known before the model is loaded."""
    sock = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        if sock is not None:
            sock.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error}; choose another --host or --port"
        ) from None
    return sock
