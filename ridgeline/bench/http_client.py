"""One streamed request to an OpenAI-compatible server, and when each of its tokens arrived.

The one idea: during a run nothing is done but to note the time and cut the bytes into events. A method of an
`asyncio.Protocol` is called right after the read returns, so the time is that of the bytes' arrival, and the
JSON inside is parsed after the run (`Exchange.answer`): with many streams in one thread, work on one event
delays the reading of the next. A connection is made before it is needed and serves one request.

HTTP/1.1 (RFC 9112: chunked, Content-Length, until the connection closes) and server-sent events (HTML
standard, section 9.2) are read as far as such servers need them.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ridgeline.errors import ConfigError, RidgelineError

clock = time.perf_counter
"""Seconds; on Linux the same clock in every process of the machine."""

_DEFAULT_PORTS = {"http": 80, "https": 443}
_CONNECT_TIMEOUT_S = 10.0
_DONE = b"[DONE]"
_DONE_GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: a server, the path in front of its endpoints, and the key it wants."""

    host: str
    port: int
    prefix: str = ""
    tls: bool = False
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def from_url(cls, url: str, *, api_key: str | None = None) -> Target:
        """Raises ConfigError for what is not an http(s) URL. A final /v1 belongs to the endpoints."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or port == 0:
            raise ConfigError(f"--base-url {url!r}: expected an address such as http://127.0.0.1:8000")
        return cls(
            host=parts.hostname,
            port=port or _DEFAULT_PORTS[parts.scheme],
            prefix=parts.path.rstrip("/").removesuffix("/v1"),
            tls=parts.scheme == "https",
            api_key=api_key,
        )

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"


class ResponseParser:
    """Bytes of one HTTP response in, data of its server-sent events out; any other body is kept.

    Invariant: how the bytes are cut into reads does not matter.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.complete = False
        """The framing says that the body has ended."""
        self._raw = bytearray()
        self._text = bytearray()
        self._data: list[bytes] = []
        self._left: int | None = None
        """Bytes still to come of the chunk, or of the body; None: unknown."""

    def feed(self, received: bytes) -> list[bytes]:
        """The data of each event that these bytes complete. Raises ValueError where it is not HTTP."""
        self._raw += received
        if self.status is None and not self._read_head():
            return []
        content = self._read_chunks() if self._chunked else self._read_plain()
        if self._is_stream:
            return self._read_events(content)
        self.body += content
        return []

    def end(self) -> None:
        """The connection has closed: the end of a body that has no other."""
        if self.status is not None and not self._chunked and self._left is None:
            self.complete = True

    def _read_head(self) -> bool:
        while (end := self._raw.find(b"\r\n\r\n")) >= 0:
            first, *lines = bytes(self._raw[:end]).decode("latin-1").split("\r\n")
            del self._raw[: end + 4]
            version, _, rest = first.partition(" ")
            if not version.startswith("HTTP/1."):
                raise ValueError(f"not an HTTP/1 response: {first[:80]!r}")
            status = int(rest[:3])
            if status < 200:
                continue  # 100 Continue and the like: the response follows
            self.headers = {
                k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)
            }
            self._chunked = self.headers.get("transfer-encoding", "").lower().endswith("chunked")
            self._is_stream = self.headers.get("content-type", "").startswith("text/event-stream")
            if not self._chunked and "content-length" in self.headers:
                self._left = int(self.headers["content-length"])
                self.complete = self._left == 0
            self.status = status
            return True
        return False

    def _read_plain(self) -> bytes:
        content = bytes(self._raw[: self._left])
        del self._raw[: len(content)]
        if self._left is not None:
            self._left -= len(content)
            self.complete = self._left == 0
        return content

    def _read_chunks(self) -> bytes:
        content = b""
        while not self.complete:
            if self._left:
                piece = bytes(self._raw[: self._left])
                del self._raw[: len(piece)]
                self._left -= len(piece)
                content += piece
                if self._left:
                    break
            end = self._raw.find(b"\r\n")
            if end < 0:
                break
            line = bytes(self._raw[:end])
            del self._raw[: end + 2]
            if not line and self._left == 0:
                self._left = None  # the line end that closes a chunk
                continue
            self._left = int(line.partition(b";")[0], 16)
            self.complete = self._left == 0  # trailers do not matter: the connection is not used again
        return content

    def _read_events(self, content: bytes) -> list[bytes]:
        self._text += content
        *lines, rest = self._text.split(b"\n")
        self._text = rest
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(bytes(line[5:]).removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back of one request. Times are of `clock`, in seconds."""

    sent: float
    """Just before the request was written."""
    token_times: tuple[float, ...]
    """Arrival of each event that had text."""
    end: float
    """The last token's arrival, or when the request failed."""
    text: str
    token_ids: tuple[int, ...] | None
    """None: the server did not say them (`return_token_ids`)."""
    num_prompt_tokens: int | None
    """Of `usage`, as the next two; None: the server did not say."""
    num_output_tokens: int | None
    num_cached_tokens: int | None
    finish_reason: str | None
    error: str | None


class Exchange(asyncio.Protocol):
    """One connection: its request, and what arrives, with the times."""

    def __init__(self) -> None:
        self.sent = clock()
        self.end = self.sent
        self.events: list[tuple[float, bytes]] = []
        self.parser = ResponseParser()
        self.failure: str | None = None
        self._done = False
        self._loop = asyncio.get_running_loop()
        self._finished = self._loop.create_future()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, received: bytes) -> None:
        now = clock()
        try:
            for event in self.parser.feed(received):
                if event == _DONE:
                    # The end of the body follows at once; a client that leaves before it looks like one lost.
                    self._loop.call_later(_DONE_GRACE_S, self._finish)
                    self._done = True
                else:
                    self.events.append((now, event))
        except ValueError as error:
            self._finish(f"the response cannot be read: {error}")
        self.end = now
        if self.parser.complete:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self.parser.end()
        ended = self._done or self.parser.complete
        self._finish(None if ended else f"the connection closed early ({error or 'no error'})")

    def _finish(self, failure: str | None = None) -> None:
        if not self._finished.done():
            self.failure = failure
            self._finished.set_result(None)

    async def send(self, request: bytes, *, timeout_s: float) -> None:
        """Write the request and wait until the answer has ended or failed; never raises for the server."""
        assert self._transport is not None
        self.sent = clock()
        self._transport.write(request)
        try:
            await asyncio.wait_for(self._finished, timeout_s)
        except TimeoutError:
            self.failure = f"no end of the answer within {timeout_s:g} s"
            self.end = clock()
        finally:
            self._transport.abort()

    def answer(self) -> Answer:
        """The events decoded; done after a run, not during it."""
        token_times: list[float] = []
        pieces: list[str] = []
        token_ids: list[int] = []
        usage: Mapping[str, Any] = {}
        finish_reason = None
        error = self.failure
        for arrived, event in self.events:
            try:
                chunk = json.loads(event)
            except ValueError:
                error = error or f"an event is not JSON: {_shortened(event)}"
                continue
            if chunk.get("error"):
                error = error or f"the stream ended with an error: {_shortened(json.dumps(chunk['error']))}"
                continue
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or ():
                finish_reason = choice.get("finish_reason") or finish_reason
                token_ids += choice.get("token_ids") or ()
                if text := _choice_text(choice):
                    token_times.append(arrived)
                    pieces.append(text)
        if self.parser.status not in (200, None):
            error = f"HTTP status {self.parser.status}: {_shortened(self.parser.body)}"
        elif error is None and not token_times:
            error = f"the answer has no token event ({_shortened(self.parser.body) or 'empty'})"
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            sent=self.sent,
            token_times=tuple(token_times),
            end=token_times[-1] if token_times and error is None else self.end,
            text="".join(pieces),
            token_ids=tuple(token_ids) or None,
            num_prompt_tokens=usage.get("prompt_tokens"),
            num_output_tokens=usage.get("completion_tokens"),
            num_cached_tokens=details.get("cached_tokens"),
            finish_reason=finish_reason,
            error=error,
        )


def _choice_text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""


def _shortened(content: bytes | bytearray | str) -> str:
    text = content if isinstance(content, str) else content.decode(errors="replace")
    return text if len(text) <= 300 else text[:297] + "..."


def request_bytes(target: Target, path: str, body: Mapping[str, Any] | None = None) -> bytes:
    """A whole HTTP request: POST with a JSON body, GET without one."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{'GET' if body is None else 'POST'} {target.prefix}{path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Connection: close",
        *([f"Authorization: Bearer {target.api_key}"] if target.api_key else []),
        *([] if body is None else ["Content-Type: application/json", f"Content-Length: {len(content)}"]),
    ]
    return "\r\n".join((*lines, "", "")).encode() + content


async def connect(target: Target) -> Exchange:
    """A connection that has sent nothing yet. Raises OSError, TimeoutError among them."""
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context() if target.tls else None
    opening = loop.create_connection(Exchange, target.host, target.port, ssl=context)
    _, exchange = await asyncio.wait_for(opening, _CONNECT_TIMEOUT_S)
    return exchange


async def get_json(target: Target, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """One JSON document; with a body by POST. Raises RidgelineError: nobody there, wrong key, not JSON."""
    where = f"{target.url}{path}"
    try:
        exchange = await connect(target)
    except OSError as error:
        raise RidgelineError(
            f"no server answers at {target.url} ({error or 'timed out'}); start one, or give its address "
            "with --base-url, or --host and --port"
        ) from None
    await exchange.send(request_bytes(target, path, body), timeout_s=_CONNECT_TIMEOUT_S)
    parser = exchange.parser
    if parser.status == 401:
        raise RidgelineError(
            f"{where} refuses the API key; give the right one in the environment, as OPENAI_API_KEY"
        )
    if parser.status != 200 or exchange.failure is not None:
        reason = exchange.failure or f"HTTP status {parser.status}: {_shortened(parser.body)}"
        raise RidgelineError(f"{where}: {reason}; expected an OpenAI-compatible server")
    try:
        return json.loads(parser.body)
    except ValueError:
        raise RidgelineError(
            f"{where}: expected JSON, got {_shortened(parser.body)!r}; is this an OpenAI-compatible server?"
        ) from None
