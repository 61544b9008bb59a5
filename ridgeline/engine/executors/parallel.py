"""Several ranks behind the interface of one executor: the driver's side, which computes nothing itself.

Every plan goes to all ranks as one message; they lay it out alike, so their block tables agree without a
word. The rank that samples answers each plan in turn, and several plans may be under way. When a rank fails,
all are killed and whatever is under way raises a RankError; `restart` brings new ones with empty caches.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import secrets
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ridgeline.config import EngineConfig
from ridgeline.distributed.agents import Agents, Torchrun, run_agent
from ridgeline.distributed.channel import Listener
from ridgeline.distributed.collectives import SharedRegion, Traffic
from ridgeline.distributed.groups import RankPlace
from ridgeline.distributed.launch import LocalProcess, RankGroup, RankProcess
from ridgeline.distributed.ranks import Seat
from ridgeline.engine.executors import FinishedStep, StepHandle, unavailable_executors
from ridgeline.engine.scheduler import StepPlan, largest_plan
from ridgeline.errors import ConfigError, RankError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.logs import logger
from ridgeline.models.load import LoadedModel
from ridgeline.models.shard import plan_cuts
from ridgeline.ops.batch import ForwardBatch
from ridgeline.pickles import pickled_by_position
from ridgeline.request import Sampled

CollectivesKind = Literal["shared", "gloo", "nccl"]
COLLECTIVES_VARIABLE = "RIDGELINE_COLLECTIVES"
"""Environment variable: "gloo" where "shared" would be chosen, for tests and ranks in containers."""
RANK_MODULE = "ridgeline.engine.executors.rank"
READY, COMMUNICATION, MEMORY, CHECKSUM = "ready", "communication", "memory", "checksum"
"""What ranks are asked for by name."""
FIRST_WAIT_S, RESTART_WAIT_S = 600.0, 5.0
"""For the processes of other hosts."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message to a rank: all it needs to become one."""

    config: EngineConfig
    model_path: str
    layout: CacheLayout
    """of the whole model; a rank's own has its layers and KV heads, and as many blocks"""
    place: RankPlace
    collectives: CollectivesKind
    address: str
    """Of the shared memory, or of the host of rank 0."""
    port: int | None = None
    """Where rank 0 keeps the store of torch.distributed; None: this is rank 0, which says it."""


@pickled_by_position
@dataclass(frozen=True, slots=True)
class Answer:
    """To message `number` of this generation."""

    number: int
    value: Any


class _Conversation:
    """Messages to the ranks of one generation, numbered from 0, and the answers to them."""

    def __init__(self, group: RankGroup, world_size: int, sampler: int) -> None:
        self.group = group
        self._world_size = world_size
        self._sampler = sampler
        self._num_posted = 0
        self._early: dict[int, Any] = {}

    def post(self, message: object) -> _Posted:
        """Send to all ranks; the sampler will answer."""
        pickled = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        for rank in range(self._world_size):
            self.group.send(rank, pickled)
        self._num_posted += 1
        return _Posted(self, self._num_posted - 1)

    def take(self, number: int, rank: int) -> Any:
        """The answer of a rank; earlier ones of the sampler are kept for who asks later."""
        if rank == self._sampler and number in self._early:
            return self._early.pop(number)
        while True:
            answer = self.group.receive(rank)
            assert isinstance(answer, Answer)
            if answer.number == number:
                return answer.value
            if answer.number > number:
                raise RankError("the answer of a rank was lost when this thread was interrupted")
            if rank == self._sampler:
                self._early[answer.number] = answer.value

    def ask(self, question: str) -> list[Any]:
        """The answer of every rank."""
        number = self.post(question).number
        return [self.take(number, rank) for rank in range(self._world_size)]

    def result(self, number: int) -> Any:
        value = self.take(number, self._sampler)
        for unwanted in [n for n in self._early if n < number]:  # results are collected in order
            del self._early[unwanted]
        return value


@dataclass(frozen=True, slots=True)
class _Posted:
    """A plan under way."""

    conversation: _Conversation
    number: int

    def result(self) -> Mapping[str, Sampled]:
        """Raises RankError when a rank was lost meanwhile."""
        sampled: Mapping[str, Sampled] = self.conversation.result(self.number)
        return sampled


class ParallelExecutor:
    """Owns the ranks of one engine, in all their generations. The engine's thread alone calls it."""

    reducer = None

    def __init__(self, config: EngineConfig, model: LoadedModel, layout: CacheLayout) -> None:
        """Start all ranks and wait until they are ready.

        Raises ConfigError for what cannot be spread over ranks, RankError for a rank that does not start, and
        SystemExit when the driver is done, in a process that torchrun started for another rank than 0.
        """
        if model.checkpoint is None:
            raise ConfigError(
                f"tp_size={config.parallel.tp_size}, pp_size={config.parallel.pp_size}: every rank opens the "
                "model's file itself, and this model was made in memory; save it and give its path"
            )
        plan_cuts(model, config.parallel)  # what cannot be cut is an error before anything is started
        self._config = config
        self._layout = layout
        self._path = os.path.abspath(model.checkpoint.path)
        self._hidden_size = model.config.hidden_size
        self._places = [RankPlace.of(r, config.parallel) for r in range(config.parallel.world_size)]
        self._torchrun = enter_torchrun(config)
        self._generation, self._owned = ExitStack(), ExitStack()
        self._agents: Agents | None = None
        self._finalizer = weakref.finalize(self, self._owned.close)  # also when the interpreter exits
        self._conversation: _Conversation | None = None
        try:
            if self._torchrun is not None:
                self._agents = Agents(self._torchrun)
                self._owned.callback(self._agents.close)
            self._owned.callback(self._generation.close)
            self._conversation = self._start(FIRST_WAIT_S)
        except BaseException:
            self.close()
            raise

    def submit(self, plan: StepPlan) -> StepHandle:
        """Raises RankError when a rank is lost; `restart` gives new ones."""
        if not plan.rows:
            return FinishedStep({})
        return self._running().post(plan)

    def forward(self, batch: ForwardBatch) -> npt.NDArray[np.floating]:
        conversation = self._running()
        logits: npt.NDArray[np.floating] = conversation.result(conversation.post(batch).number)
        return logits

    def restart(self) -> None:
        """Forget the ranks; the next `submit` starts new ones, with empty caches.

        Not now: what was under way has failed, and who waits for it should not wait for that too.
        """
        self._generation.close()
        self._conversation = None

    def close(self) -> None:
        self._conversation = None
        self._finalizer()

    def communication(self) -> list[dict[str, Traffic]]:
        """Of every rank: what each op of `distributed.collectives` did since the ranks were started."""
        return self._running().ask(COMMUNICATION)

    def memory(self) -> list[dict[str, int]]:
        """Of every rank: peak_rss_bytes, rss_bytes, and pss_bytes (pages that processes share, divided)."""
        return self._running().ask(MEMORY)

    def checksums(self) -> list[int]:
        """Of every rank: over every plan it has run, block tables and all, in their order. They are equal."""
        return self._running().ask(CHECKSUM)

    @property
    def pids(self) -> list[int]:
        """Of the rank processes, each as its own host numbers them."""
        return self._running().group.pids

    def _running(self) -> _Conversation:
        if self._conversation is None:
            if not self._finalizer.alive:
                raise RankError("the engine was closed")
            self._generation.close()  # what is left of a start that failed
            self._conversation = self._start(RESTART_WAIT_S)
            logger.info("the ranks were started again")
        return self._conversation

    def _start(self, wait_s: float) -> _Conversation:
        if self._agents is not None:
            self._agents.wait(wait_s)
        kind = self._collectives_kind()
        host = "127.0.0.1" if self._torchrun is None else self._torchrun.host
        token = secrets.token_bytes(32)
        listener = Listener(host, 0, token=token)
        self._generation.callback(listener.close)
        region = self._make_region() if kind == "shared" else None
        seats = [Seat(place.rank, host, listener.port, token.hex()) for place in self._places]
        group = RankGroup(
            [partial(self._start_process, seat) for seat in seats],
            listener,
            labels=[f"rank {p.rank} (tp {p.tp_rank} of stage {p.pp_rank})" for p in self._places],
            abort=region.abort if region is not None else lambda: None,
        )
        self._generation.callback(group.close)
        group.start()

        def set_up(place: RankPlace, port: int | None) -> None:
            address = host if region is None else region.name
            setup = Setup(self._config, self._path, self._layout, place, kind, address, port)
            group.send(place.rank, pickle.dumps(setup, protocol=pickle.HIGHEST_PROTOCOL))

        set_up(self._places[0], None)
        port: int | None = group.receive(0) if region is None else None
        for place in self._places[1:]:
            set_up(place, port)
        for place in self._places:
            answer = group.receive(place.rank)
            assert answer == READY, answer
        group.ready()
        sampler = next(place.rank for place in self._places if place.samples)
        return _Conversation(group, len(self._places), sampler)

    def _make_region(self) -> SharedRegion:
        tokens = largest_plan(self._config.scheduler, self._config.parallel.pp_size)
        element_bytes = 8 if self._config.dtype == "float64" else 4
        region = SharedRegion(
            self._config.parallel, max_message_bytes=tokens * self._hidden_size * element_bytes
        )
        self._generation.callback(region.close)
        return region

    def _start_process(self, seat: Seat) -> RankProcess:
        num_threads, torchrun = self._config.num_threads, self._torchrun
        if self._agents is not None and seat.rank > 0:
            return self._agents.start(RANK_MODULE, seat, num_threads=num_threads)
        if torchrun is not None:
            return torchrun.start(RANK_MODULE, seat, num_threads=num_threads)
        own = {"local_rank": seat.rank, "num_local_ranks": len(self._places)}
        return LocalProcess(RANK_MODULE, seat.here(**own, num_threads=num_threads).environment())

    def _collectives_kind(self) -> CollectivesKind:
        if self._config.device == "cuda":
            return "nccl"
        wanted = os.environ.get(COLLECTIVES_VARIABLE)
        if wanted not in (None, "shared", "gloo"):
            raise ConfigError(f"{COLLECTIVES_VARIABLE}={wanted!r}: expected 'shared' or 'gloo'")
        is_one_host = self._agents is None or self._agents.is_one_host
        if wanted != "gloo" and is_one_host and "native" not in unavailable_executors():
            return "shared"
        if importlib.util.find_spec("torch") is None:
            raise ConfigError(
                "ranks on several hosts talk through torch.distributed, and torch is not installed: "
                "pip install 'ridgeline[torch]' on all of them"
            )
        return "gloo"


def enter_torchrun(config: EngineConfig) -> Torchrun | None:
    """What torchrun says of this process; None without it. Raises ConfigError if WORLD_SIZE is wrong.

    In the process of another rank than 0 this is where it stays: it serves the driver, then exits.
    """
    torchrun = Torchrun.from_environment(os.environ)
    if torchrun is None:
        return None
    torchrun.check(config.parallel.world_size)
    if torchrun.rank > 0:
        run_agent(torchrun)
        raise SystemExit(0)
    return torchrun
