"""One rank as a process: `python -m ridgeline.engine.executors.rank`, started by `ParallelExecutor`.

It loads its part of the model, builds the ordinary executor on it, and runs plans in the order in which they
come. It never decides anything: what it cannot do is told to the driver, and ends the process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pickle
import sys
import traceback
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ridgeline.config import ParallelConfig
from ridgeline.distributed.channel import Channel
from ridgeline.distributed.collectives import SharedMemory, Traffic
from ridgeline.distributed.ranks import Seat
from ridgeline.engine.executors import FACTORIES, ModelExecutor, sample_batch
from ridgeline.engine.executors.parallel import (
    CHECKSUM,
    COMMUNICATION,
    MEMORY,
    READY,
    Answer,
    Setup,
)
from ridgeline.engine.scheduler import StepPlan
from ridgeline.models.locate import locate_model
from ridgeline.models.shard import load_shard
from ridgeline.ops.batch import ForwardBatch

Message = tuple[bytes, Any, ForwardBatch | None]
"""As it came, unpickled, and the batch that it is or asks for."""


class _Counted(Protocol):
    def counters(self) -> dict[str, Traffic]: ...


def main() -> None:
    """Never returns: the process ends with the driver, or with the first error."""
    faulthandler.enable()
    steps, pulse = Seat.from_environment(os.environ).take()
    try:
        _serve(steps)
    except ConnectionError:
        os._exit(0)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        pulse.fail(error)


def _serve(steps: Channel) -> None:
    setup: Setup = steps.receive()
    seat = Seat.from_environment(os.environ)
    executor, collectives = _build(setup, seat, steps)
    steps.send(READY)
    samples = setup.place.samples
    checksum = 0
    for number, (pickled, message, batch) in enumerate(_messages(steps, setup.layout.block_size)):
        value: Any = None
        if isinstance(message, StepPlan):
            assert batch is not None
            value = sample_batch(executor, message, batch, samples=samples)
            checksum = zlib.crc32(pickled, checksum)
        elif batch is not None:
            value = executor.forward(batch)
        elif message == COMMUNICATION:
            value = collectives.counters()
        elif message == MEMORY:
            value = memory_of_process()
        elif message == CHECKSUM:
            value = checksum
        if isinstance(message, str) or samples:
            steps.send(Answer(number, value))


def _messages(steps: Channel, block_size: int) -> Iterator[Message]:
    """What the driver sends, plans with their batch. Raises ConnectionError at the end."""
    while True:
        pickled = steps.receive_bytes()
        message = pickle.loads(pickled)
        if isinstance(message, StepPlan):
            yield pickled, message, ForwardBatch.from_rows(message.rows, block_size=block_size)
        else:
            yield pickled, message, message if isinstance(message, ForwardBatch) else None


def _build(setup: Setup, seat: Seat, steps: Channel) -> tuple[ModelExecutor, _Counted]:
    collectives = _join(setup, seat, steps)
    config = replace(setup.config, num_threads=seat.num_threads, parallel=ParallelConfig())
    path = Path(setup.model_path)
    model = load_shard(path if path.exists() else locate_model(config.model), config.load, setup.place)
    layout = replace(setup.layout, num_layers=model.config.num_layers, num_kv_heads=model.config.num_kv_heads)
    assert config.executor is not None
    module, _, name = FACTORIES[config.executor].partition(":")
    factory = getattr(importlib.import_module(module), name)
    executor: ModelExecutor = factory(config, model, layout, collectives)
    with suppress(AttributeError):  # pieces cut from matrices were freed, and glibc would keep their memory
        ctypes.CDLL(None).malloc_trim(0)
    return executor, collectives


def _join(setup: Setup, seat: Seat, steps: Channel) -> Any:
    if setup.collectives == "shared":
        return SharedMemory(setup.address, setup.place)
    from ridgeline.distributed.torch_collectives import TorchCollectives, choose_device, make_store

    if setup.collectives == "nccl":
        choose_device(seat.local_rank)
    store = make_store(setup.address, setup.port, world_size=setup.place.world_size)
    if setup.port is None:
        steps.send(store.port)
    return TorchCollectives(store, setup.place, backend=setup.collectives, local_host=steps.local_host)


def memory_of_process() -> dict[str, int]:
    """From Linux's own accounts, in bytes."""
    with open("/proc/self/status") as status, open("/proc/self/smaps_rollup") as rollup:
        lines = [line.split() for line in (*status, *rollup)]
    kilobytes = {line[0]: int(line[1]) for line in lines if len(line) == 3 and line[2] == "kB"}
    return {
        "peak_rss_bytes": kilobytes["VmHWM:"] * 1024,
        "rss_bytes": kilobytes["VmRSS:"] * 1024,
        "pss_bytes": kilobytes["Pss:"] * 1024,
    }


if __name__ == "__main__":
    main()
