"""One generation of rank processes: started together, watched, and killed together when one fails.

A thread starts the processes, waits for their connections (`distributed.ranks`) and then listens to them. A
process that ends is noticed at once, one that is silent for SILENCE_S then: it was stopped, or its network is
gone. What one rank computes is useless without the others, so the first failure is the end of all: the abort
flag of the collectives is set, every rank is killed, and whoever waits on a rank gets a RankError that names
the first cause. A new generation is a new `RankGroup`.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from ridgeline import errors
from ridgeline.distributed.channel import Channel, Listener
from ridgeline.distributed.ranks import SILENCE_S, Failed, Hello
from ridgeline.errors import RankError, RidgelineError

CONNECT_S = 60.0
"""From starting a process to its connection: an interpreter and its imports on a busy machine."""
START_SILENCE_S = 60.0
"""Allowed while a rank builds its executor: loading libraries may hold the GIL for seconds."""
LOST_STATUS = 256
"""Instead of an exit status, which is less: the host of a process does not answer."""
_GRACE_S = 0.3
"""After the first sign of a failure: the time that its cause may take to show."""
_WORDS_CHARACTERS = 2000


class RankProcess(Protocol):
    """A process on this host or, through an agent, on another."""

    def status(self) -> int | None:
        """Its exit status, minus the signal that ended it, or LOST_STATUS; None while it runs."""
        ...

    def kill(self) -> None:
        """SIGKILL, and forget its output. Idempotent; does not wait for a host that does not answer."""
        ...

    def last_words(self) -> str:
        """The end of what it wrote to stdout and stderr."""
        ...


Starter = Callable[[], RankProcess]


class LocalProcess:
    """`python -m module` in a session of its own, so that Ctrl-C reaches the driver only.

    Its output goes to a file without a name: nothing is left of it, whatever happens.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def status(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # its group: compilers that torch started go too
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()

    def last_words(self) -> str:
        if self._output.closed:
            return ""
        size = os.fstat(self._output.fileno()).st_size
        end = os.pread(self._output.fileno(), _WORDS_CHARACTERS, max(0, size - _WORDS_CHARACTERS))
        return end.decode(errors="replace").strip()


@dataclass(slots=True)
class _Member:
    """One rank as the watching thread sees it."""

    label: str
    process: RankProcess | None = None
    channels: dict[str, Channel] = field(default_factory=dict)
    pid: int = 0
    heard: float = 0.0
    report: Failed | None = None
    problem: str | None = None
    """What was seen of a failure: a lost connection, silence."""


class RankGroup:
    """Owns the processes and connections of all ranks from `start` to `close`, or to the first failure."""

    def __init__(
        self,
        starters: Sequence[Starter],
        listener: Listener,
        *,
        labels: Sequence[str],
        abort: Callable[[], None],
    ) -> None:
        """`starters` start rank 0, 1, ... with a seat at `listener`; `abort` ends waits in collectives."""
        self._starters = starters
        self._listener = listener
        self._abort = abort
        self._members = [_Member(label) for label in labels]
        self._limit_s = START_SILENCE_S
        self._connected = threading.Event()
        self._ended = threading.Event()
        self._ending = threading.Lock()
        self._closing = False
        self._error: RidgelineError | None = None
        # The kernel ties a child to the *thread* that starts it (PR_SET_PDEATHSIG): it is one that stays.
        self._watcher = threading.Thread(target=self._run, name="ridgeline-ranks", daemon=True)

    def start(self) -> None:
        """Start all processes and wait for their connections. Raises RankError."""
        self._watcher.start()
        self._connected.wait()
        self._check()

    def ready(self) -> None:
        """All ranks have built what they need: from now on, silence counts after SILENCE_S."""
        for member in self._members:
            member.heard = time.monotonic()
        self._limit_s = SILENCE_S

    @property
    def pids(self) -> list[int]:
        """Of the rank processes, each as its own host numbers them."""
        return [member.pid for member in self._members]

    def send(self, rank: int, pickled: bytes) -> None:
        """Raises the error that ended the group."""
        self._check()
        try:
            self._members[rank].channels["steps"].send_bytes(pickled)
        except ConnectionError as error:
            raise self._cause() from error
        except BaseException:
            self._fail(RankError("interrupted while a plan was being sent; the ranks are out of step"))
            raise

    def receive(self, rank: int) -> Any:
        """The next message of a rank. Raises the error that ended the group."""
        self._check()
        try:
            return self._members[rank].channels["steps"].receive()
        except ConnectionError as error:
            raise self._cause() from error

    def close(self) -> None:
        """Kill and forget all ranks. Idempotent."""
        self._closing = True
        self._end()
        if self._watcher.is_alive() and self._watcher is not threading.current_thread():
            self._watcher.join()
        self._listener.close()
        for member in self._members:
            for channel in member.channels.values():
                channel.close()

    def _check(self) -> None:
        if self._error is not None:
            raise _again(self._error)
        if self._ended.is_set():
            raise RankError("the ranks were closed; nothing more can be computed on them")

    def _cause(self) -> RidgelineError:
        """Why a connection was lost: the watching thread knows, or will in a moment."""
        self._ended.wait(SILENCE_S + 2)
        return _again(self._error) if self._error is not None else RankError("the ranks were closed")

    def _run(self) -> None:
        try:
            self._connect_all()
            self._connected.set()
            self._watch()
        except RidgelineError as error:
            self._fail(error)
        except Exception as error:
            self._fail(RankError(f"the driver lost its ranks: {type(error).__name__}: {error}"))
        finally:
            self._end()
            self._connected.set()

    def _connect_all(self) -> None:
        for member, starter in zip(self._members, self._starters, strict=True):
            if self._closing:
                return
            member.process = starter()
        deadline = time.monotonic() + CONNECT_S
        while not self._closing and any(len(member.channels) < 2 for member in self._members):
            channel = self._listener.accept(timeout=0.1)
            if channel is not None:
                try:
                    hello: Hello = channel.receive(timeout=1.0)
                except OSError:
                    channel.close()
                    continue
                self._members[hello.rank].channels[hello.purpose] = channel
                self._members[hello.rank].pid = hello.pid
                continue
            missing = [m for m in self._members if len(m.channels) < 2]
            if any(m.process is not None and m.process.status() is not None for m in missing):
                raise self._explain()
            if missing and time.monotonic() > deadline:
                missing[0].problem = f"did not connect within {CONNECT_S:.0f} s"
                raise self._explain()

    def _watch(self) -> None:
        if any(len(member.channels) < 2 for member in self._members):
            return  # closed meanwhile
        poll = select.poll()
        members = {member.channels["pulse"].fileno(): member for member in self._members}
        for descriptor in members:
            poll.register(descriptor, select.POLLIN)
        last = time.monotonic()
        for member in self._members:
            member.heard = last
        while not self._closing:
            ready = poll.poll(250)
            now = time.monotonic()
            if now - last > 1:  # this process was stopped itself, and could hear nobody
                for member in self._members:
                    member.heard = now
            last = now
            for descriptor, _ in ready:
                _listen(members[descriptor], now)
            for member in self._members:
                if member.process is not None and member.process.status() is not None:
                    member.problem = member.problem or "ended"
                if member.problem is None and now - member.heard > self._limit_s:
                    silent = f"gave no sign of life for {self._limit_s:.0f} s"
                    member.problem = f"{silent}: it was stopped, or its network is gone"
            if any(member.problem or member.report for member in self._members) and not self._closing:
                time.sleep(_GRACE_S)
                for member in self._members:
                    _listen(member, time.monotonic())
                raise self._explain()

    def _explain(self) -> RidgelineError:
        """The first cause: what ended by itself before who complained about a peer, silence last."""

        def weight(member: _Member) -> int:
            status = member.process.status() if member.process is not None else None
            if status is not None and status < 0:
                return 0
            if member.report is not None:
                return 3 if member.report.error == RankError.__name__ else 1
            return 2 if status is not None else 4 if member.problem is not None else 5

        return _error_of(min(self._members, key=weight))

    def _fail(self, error: RidgelineError) -> None:
        if self._error is None and not self._closing:
            self._error = error
        self._end()

    def _end(self) -> None:
        """Abort, kill, hang up: whoever waits wakes, in this process and in the ranks."""
        with self._ending:
            self._abort()
            for member in self._members:
                if member.process is not None:
                    member.process.kill()
                for channel in list(member.channels.values()):
                    channel.shutdown()
            self._ended.set()


def _listen(member: _Member, now: float) -> None:
    """Take in what a rank has sent on its pulse."""
    try:
        while True:
            message = member.channels["pulse"].receive(timeout=0)
            member.heard = now
            if isinstance(message, Failed):
                member.report = message
    except TimeoutError:
        pass
    except (ConnectionError, KeyError):
        member.problem = member.problem or "closed its connection"


def _error_of(member: _Member) -> RidgelineError:
    """What happened to this rank, in one message; an error of the user's keeps its type."""
    process, report = member.process, member.report
    status = process.status() if process is not None else None
    if status is not None and status < 0:
        happened = f"was killed by signal {-status} ({signal.Signals(-status).name})"
    elif report is not None:
        kind = getattr(errors, report.error, None)
        if isinstance(kind, type) and issubclass(kind, RidgelineError) and kind is not RankError:
            return kind(f"{member.label}: {report.message}")
        happened = f"failed: {report.error}: {report.message}"
    elif status == LOST_STATUS:
        happened = "is lost: its host does not answer, or its network is gone"
    elif member.problem is not None and status is None:
        happened = member.problem
    else:
        happened = f"exited with status {status}"
    words = process.last_words() if process is not None else ""
    return RankError(
        f"{member.label} (pid {member.pid}) {happened}" + (f". Its last words:\n{words}" if words else "")
    )


def _again(error: RidgelineError) -> RidgelineError:
    """The same error anew: an exception that is raised twice collects both tracebacks."""
    return type(error)(*error.args)
