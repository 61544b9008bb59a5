"""Rank processes on other hosts, under torchrun: an agent on each of its processes starts and kills one.

torchrun starts the same command for every rank. The one of RANK 0 is the driver: it has the engine and starts
rank 0 itself. Every other becomes an agent (`run_agent`): it connects to the driver at MASTER_ADDR, on the
port after MASTER_PORT, and does what it is told until the driver closes. Both say every HEARTBEAT_S that they
live. An agent that hears nothing for SILENCE_S kills its rank and connects again: nothing keeps running on
the far side of a cut cable, and a new generation of ranks can be started when the network is back.
"""

from __future__ import annotations

import hashlib
import select
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from ridgeline.distributed.channel import Channel, Listener, connect
from ridgeline.distributed.launch import LOST_STATUS, LocalProcess, RankProcess
from ridgeline.distributed.ranks import HEARTBEAT_S, SILENCE_S, Seat
from ridgeline.errors import ConfigError, RankError

TOKEN_VARIABLE = "RIDGELINE_TOKEN"
"""A secret that all hosts share. Without it the token follows from the job: that keeps out accidents only."""
_TICK_S = 0.1
_CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Torchrun:
    """What torchrun tells each process, in its environment."""

    rank: int
    world_size: int
    host: str
    """MASTER_ADDR: an address of the host of rank 0."""
    port: int
    local_rank: int
    local_world_size: int
    token: bytes

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Torchrun | None:
        """None when this process was not started by torchrun, or by something that says the same."""
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(environment.get(name) for name in names):
            return None
        rank, world_size, host, port = (environment[name] for name in names)
        secret = environment.get(TOKEN_VARIABLE)
        if secret is None:
            secret = repr((environment.get("TORCHELASTIC_RUN_ID"), host, port))
        return cls(
            int(rank),
            int(world_size),
            host,
            int(port) + 1,
            int(environment.get("LOCAL_RANK", "0")),
            int(environment.get("LOCAL_WORLD_SIZE", "1")),
            hashlib.sha256(secret.encode()).digest(),
        )

    def check(self, world_size: int) -> None:
        """Raises ConfigError unless as many processes were started as there are ranks."""
        if self.world_size != world_size:
            raise ConfigError(
                f"torchrun started {self.world_size} processes (WORLD_SIZE), but tp_size * pp_size is "
                f"{world_size}; start so many, or leave torchrun out: the ranks are then started on this host"
            )

    def start(self, module: str, seat: Seat, *, num_threads: int | None) -> LocalProcess:
        """Start this process's rank, which gets its part of the host."""
        own = {"local_rank": self.local_rank, "num_local_ranks": self.local_world_size}
        return LocalProcess(module, seat.here(**own, num_threads=num_threads).environment())


@dataclass(frozen=True, slots=True)
class _Start:
    module: str
    seat: Seat
    num_threads: int | None


@dataclass(frozen=True, slots=True)
class _Exited:
    generation: int | None
    """Port of the seat that it had; None: all of them are lost."""
    status: int
    words: str


class _RemoteProcess:
    """A rank process at the other end of an agent's channel."""

    def __init__(self, agent: _Agent, order: _Start) -> None:
        self._agent = agent
        self._generation = order.seat.port
        try:
            agent.channel.send(order)
        except ConnectionError as error:
            raise RankError(f"rank {order.seat.rank}: its host cannot be reached: {error}") from error

    def status(self) -> int | None:
        exited = self._exited
        return None if exited is None else exited.status

    def kill(self) -> None:
        with suppress(ConnectionError):
            self._agent.channel.send("kill")

    def last_words(self) -> str:
        exited = self._exited
        return "" if exited is None else exited.words

    @property
    def _exited(self) -> _Exited | None:
        exited = self._agent.exited
        return exited if exited is not None and exited.generation in (None, self._generation) else None


@dataclass(slots=True)
class _Agent:
    channel: Channel
    heard: float
    exited: _Exited | None = None

    def lose(self) -> None:
        self.channel.close()
        self.exited = _Exited(None, LOST_STATUS, "")


class Agents:
    """The driver's side: all agents, from the first to the last generation of ranks."""

    def __init__(self, torchrun: Torchrun) -> None:
        self._torchrun = torchrun
        try:
            self._listener = Listener(torchrun.host, torchrun.port, token=torchrun.token)
        except OSError as error:
            raise ConfigError(
                f"the driver cannot listen on MASTER_ADDR {torchrun.host}, port {torchrun.port}, the one "
                f"after MASTER_PORT ({error.strerror}); choose another MASTER_PORT (torchrun --master-port)"
            ) from error
        self._agents: dict[int, _Agent] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ridgeline-agents", daemon=True)
        self._thread.start()

    def wait(self, timeout: float) -> None:
        """Until every host is there. Raises RankError that says which ones are not."""
        wanted = set(range(1, self._torchrun.world_size))
        with self._changed:
            if not self._changed.wait_for(lambda: wanted <= set(self._agents), timeout):
                missing = ", ".join(map(str, sorted(wanted - set(self._agents))))
                raise RankError(
                    f"no connection from the process of rank {missing} within {timeout:.0f} s: it did not "
                    f"start, or its host cannot reach {self._torchrun.host}:{self._torchrun.port}"
                )

    @property
    def is_one_host(self) -> bool:
        """Whether all agents have the address of this host."""
        return all(
            agent.channel.peer_host == agent.channel.local_host for agent in list(self._agents.values())
        )

    def start(self, module: str, seat: Seat, *, num_threads: int | None) -> RankProcess:
        """Raises RankError if the host of this rank was lost."""
        agent = self._agents.get(seat.rank)
        if agent is None:
            raise RankError(f"rank {seat.rank}: the connection to its host was lost")
        return _RemoteProcess(agent, _Start(module, seat, num_threads))

    def close(self) -> None:
        """Let all agents end. Idempotent."""
        self._closing = True
        self._thread.join()
        self._listener.close()
        for agent in self._agents.values():
            with suppress(ConnectionError):
                agent.channel.send("end")
            agent.channel.close()
        self._agents.clear()

    def _run(self) -> None:
        spoken = 0.0
        while not self._closing:
            poll = select.poll()
            descriptors = [agent.channel.fileno() for agent in self._agents.values()]
            for descriptor in (self._listener.fileno(), *descriptors):
                poll.register(descriptor, select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll(_TICK_S * 1e3)}
            now = time.monotonic()
            if self._listener.fileno() in ready:
                self._admit()
            for rank, agent in list(self._agents.items()):
                try:
                    if now - spoken > HEARTBEAT_S:
                        agent.channel.send(None)
                    if agent.channel.fileno() in ready:
                        self._listen(agent, now)
                    elif now - agent.heard > SILENCE_S:
                        raise ConnectionError("silent")
                except ConnectionError:
                    agent.lose()
                    with self._changed:
                        del self._agents[rank]
            if now - spoken > HEARTBEAT_S:
                spoken = now

    def _admit(self) -> None:
        channel = self._listener.accept(timeout=_TICK_S)
        if channel is None:
            return
        try:
            rank = channel.receive(timeout=1.0)
        except OSError:
            channel.close()
            return
        with self._changed:
            if rank in self._agents:
                self._agents[rank].lose()
            self._agents[rank] = _Agent(channel, time.monotonic())
            self._changed.notify_all()

    def _listen(self, agent: _Agent, now: float) -> None:
        with suppress(TimeoutError):
            while True:
                message = agent.channel.receive(timeout=0)
                agent.heard = now
                if isinstance(message, _Exited):
                    agent.exited = message


def run_agent(torchrun: Torchrun, *, first_connect_s: float = 600.0, reconnect_s: float = 120.0) -> None:
    """Serve the driver until it closes. Raises RankError when it cannot be reached, or not any more."""
    channel = _reach_driver(torchrun, first_connect_s)
    while True:
        try:
            _obey(channel, torchrun)
            return
        except ConnectionError:
            pass
        finally:
            channel.close()
        channel = _reach_driver(torchrun, reconnect_s)


def _reach_driver(torchrun: Torchrun, limit_s: float) -> Channel:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return connect(torchrun.host, torchrun.port, token=torchrun.token, timeout=_CONNECT_S)
        except ConnectionError as error:
            if time.monotonic() > deadline:
                raise RankError(
                    f"rank {torchrun.rank} has no driver: {error} for {limit_s:.0f} s; check that the "
                    f"process of RANK 0 runs and that {TOKEN_VARIABLE} is the same on all hosts"
                ) from error
            time.sleep(_TICK_S)


def _obey(channel: Channel, torchrun: Torchrun) -> None:
    """One connection to the driver; whatever ends it, the rank process ends too."""
    process: LocalProcess | None = None
    generation = 0
    channel.send(torchrun.rank)
    heard = spoken = time.monotonic()
    try:
        while True:
            order = None
            with suppress(TimeoutError):
                order = channel.receive(timeout=_TICK_S)
                heard = time.monotonic()
            now = time.monotonic()
            if now - heard > SILENCE_S:
                raise ConnectionError("the driver is silent")
            if now - spoken > HEARTBEAT_S:
                channel.send(None)
                spoken = now
            if order == "end":
                return
            if order is not None and process is not None:  # "kill", and before a new start
                process.kill()
                process = None
            if isinstance(order, _Start):
                process = torchrun.start(order.module, order.seat, num_threads=order.num_threads)
                generation = order.seat.port
            if process is not None and process.status() is not None:
                channel.send(_Exited(generation, process.status() or 0, process.last_words()))
                process.kill()
                process = None
    finally:
        if process is not None:
            process.kill()
