"""Messages between the processes of a parallel engine: pickles with their length before them, over TCP.

Before the first pickle is read both ends prove that they know the same token, by an HMAC of the other's
random challenge: a stranger on the port gets nothing and can send nothing. What is sent later is neither
hidden nor signed, as it is between ranks in torch.distributed: over several hosts, use a network you trust.
A `receive` that times out has lost no bytes; the next one goes on where it stopped.
"""

from __future__ import annotations

import hmac
import pickle
import secrets
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Any

_LENGTH = struct.Struct("<Q")
_CHALLENGE_BYTES = 32
_HANDSHAKE_S = 1.0
"""For each of its four messages, at the side that listens: a stranger holds it up no longer."""
_CONNECT_S = 5.0


class Channel:
    """One connection. One thread receives; several may send. A lost connection is a ConnectionError."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._unread = bytearray()
        self._sending = threading.Lock()
        self.local_host: str = connection.getsockname()[0]
        self.peer_host: str = connection.getpeername()[0]

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: object) -> None:
        self.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def send_bytes(self, pickled: bytes) -> None:
        """Send a message that is pickled already, for when many get the same."""
        with self._sending:
            try:
                self._socket.sendall(_LENGTH.pack(len(pickled)) + pickled)
            except OSError as error:
                raise ConnectionError(f"connection to {self.peer_host} lost: {error}") from error

    def receive(self, timeout: float | None = None) -> Any:
        return pickle.loads(self.receive_bytes(timeout))

    def receive_bytes(self, timeout: float | None = None) -> bytes:
        """The next message, pickled. Raises TimeoutError when it is not whole in `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if len(self._unread) >= _LENGTH.size:
                end = _LENGTH.size + _LENGTH.unpack_from(self._unread)[0]
                if len(self._unread) >= end:
                    message = bytes(memoryview(self._unread)[_LENGTH.size : end])
                    del self._unread[:end]
                    return message
            self._read_more(deadline)

    def _read_more(self, deadline: float | None) -> None:
        try:
            ready = True
            if deadline is not None:
                poll = select.poll()
                poll.register(self._socket, select.POLLIN)
                ready = bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1e3))
            received = self._socket.recv(1 << 18) if ready else b""
        except (OSError, ValueError) as error:  # ValueError: closed by another thread
            raise ConnectionError(f"connection to {self.peer_host} lost: {error}") from error
        if not ready:
            raise TimeoutError
        if not received:
            raise ConnectionError(f"{self.peer_host} closed the connection")
        self._unread += received

    def shutdown(self) -> None:
        """End the connection and wake whoever waits on it, on both sides."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shutdown()
        self._socket.close()


class Listener:
    """A port where the holders of a token connect."""

    def __init__(self, host: str, port: int, *, token: bytes) -> None:
        self._token = token
        self._socket = socket.create_server((host, port))
        self.host, self.port = self._socket.getsockname()[:2]

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self, timeout: float) -> Channel | None:
        """The next one who knows the token; None when nobody came, or a stranger."""
        self._socket.settimeout(timeout)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        try:
            connection.settimeout(_HANDSHAKE_S)
            _prove(connection, self._token, listens=True)
            return Channel(connection)
        except OSError:
            connection.close()
            return None

    def close(self) -> None:
        self._socket.close()


def connect(host: str, port: int, *, token: bytes, timeout: float = _CONNECT_S) -> Channel:
    """Raises ConnectionError: nobody listens there, or who does knows another token."""
    connection: socket.socket | None = None
    try:
        connection = socket.create_connection((host, port), timeout=timeout)
        _prove(connection, token, listens=False)
        return Channel(connection)
    except OSError as error:
        if connection is not None:
            connection.close()
        raise ConnectionError(f"no connection to {host}:{port}: {error}") from error


def _prove(connection: socket.socket, token: bytes, *, listens: bool) -> None:
    """Each side answers the other's challenge; the roles are signed too: no answer can be sent back."""
    roles = (b"listens", b"connects") if listens else (b"connects", b"listens")
    mine = secrets.token_bytes(_CHALLENGE_BYTES)
    connection.sendall(mine)
    theirs = _read_exactly(connection, _CHALLENGE_BYTES)
    connection.sendall(hmac.digest(token, roles[0] + theirs + mine, "sha256"))
    expected = hmac.digest(token, roles[1] + mine + theirs, "sha256")
    if not hmac.compare_digest(_read_exactly(connection, len(expected)), expected):
        raise ConnectionError("the other side has another token")


def _read_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    received = b""
    while len(received) < num_bytes:
        part = connection.recv(num_bytes - len(received))
        if not part:
            raise ConnectionError("closed during the handshake; the tokens of the two sides may differ")
        received += part
    return received
