"""What a rank process needs before it is part of a group: to find its driver, to be heard, to die with it.

The driver gives `Seat` through the environment. Two connections lead back: `steps` carries plans and results
and belongs to the main thread; `pulse` carries a sign of life every HEARTBEAT_S from a thread of its own, so
that a long step is no silence (kernels run without the GIL), and the news of a failure.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ridgeline.distributed.channel import Channel, connect

HEARTBEAT_S = 0.5
SILENCE_S = 3.0
"""Who was not heard for so long has stopped, or its network is gone."""
_PREFIX = "RIDGELINE_RANK_"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a rank on each connection."""

    rank: int
    purpose: str
    pid: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The last message of a rank that met an error."""

    error: str
    """Name of the exception."""
    message: str


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank process finds its driver, and how many threads it may use."""

    rank: int
    host: str
    port: int
    token: str
    num_threads: int = 1
    parent: int = 0
    """The process that started it, and whose end is its own."""
    local_rank: int = 0
    """Its number among the ranks of this host: that of its GPU."""

    def here(self, *, local_rank: int, num_local_ranks: int, num_threads: int | None) -> Seat:
        """As the process that starts the rank completes it; num_threads None: its share of the cores."""
        cores = len(os.sched_getaffinity(0))
        threads = num_threads or max(1, cores // num_local_ranks)
        return replace(self, num_threads=threads, parent=os.getpid(), local_rank=local_rank)

    def environment(self) -> dict[str, str]:
        """Variables of a rank process: this seat, and the threads of every numeric library."""
        seat = {_PREFIX + name.upper(): str(getattr(self, name)) for name in self.__slots__}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"))
        return seat | {name: str(self.num_threads) for name in threads}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Seat:
        values: dict[str, Any] = {name: environment[_PREFIX + name.upper()] for name in cls.__slots__}
        numbers = {name: int(value) for name, value in values.items() if name not in ("host", "token")}
        return cls(**values | numbers)

    def take(self) -> tuple[Channel, Pulse]:
        """Connect to the driver -> steps and pulse. From here on, this process ends when its parent does."""
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:  # it ended before the line above
            os._exit(1)
        steps, pulse = (self._connect(purpose) for purpose in ("steps", "pulse"))
        return steps, Pulse(pulse)

    def _connect(self, purpose: str) -> Channel:
        channel = connect(self.host, self.port, token=bytes.fromhex(self.token))
        channel.send(Hello(self.rank, purpose, os.getpid()))
        return channel


class Pulse:
    """Says every HEARTBEAT_S that this process lives, and ends it when the driver is gone."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        threading.Thread(target=self._beat, name="ridgeline-pulse", daemon=True).start()

    def _beat(self) -> None:
        while True:
            try:
                self._channel.receive_bytes(timeout=HEARTBEAT_S)
            except TimeoutError:
                try:
                    self._channel.send(None)
                except ConnectionError:
                    os._exit(1)
            except ConnectionError:
                os._exit(1)

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the driver, and leave without waiting for threads of libraries."""
        try:
            self._channel.send(Failed(type(error).__name__, str(error)))
        finally:
            os._exit(1)
