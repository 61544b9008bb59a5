"""Shared memory between real processes, against numpy: the same bits as a sum in rank order, and no wait for the dead.

Every rank is a process of its own that runs one function of this file; the test is the driver.
"""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import numpy as np
import pytest

from ridgeline.config import ParallelConfig
from ridgeline.distributed import collectives as module
from ridgeline.distributed.collectives import NativePointers, SharedMemory, SharedRegion
from ridgeline.distributed.groups import RankPlace
from ridgeline.errors import ConfigError, RankError

SPAWN = multiprocessing.get_context("spawn")
ABORTED, DISAGREE = "told to stop", "do not agree"


def child(pipe, function, name, place, arguments):
    shared = SharedMemory(name, place)
    pipe.send("joined")
    try:
        pipe.send(function(shared, *arguments))
    except RankError as error:
        pipe.send((time.monotonic(), str(error)))
    shared.close()


class Ranks:
    """One process for each rank of a region."""

    def __init__(
        self, region: SharedRegion, parallel: ParallelConfig, function: Callable, *arguments
    ) -> None:
        self.pipes, self.processes = [], []
        for rank in range(parallel.world_size):
            ours, theirs = SPAWN.Pipe()
            place = RankPlace.of(rank, parallel)
            process = SPAWN.Process(target=child, args=(theirs, function, region.name, place, arguments))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        assert set(self.results()) == {"joined"}

    def result(self, rank: int, timeout: float = 60.0):
        assert self.pipes[rank].poll(timeout), f"rank {rank} says nothing"
        return self.pipes[rank].recv()

    def results(self) -> list:
        return [self.result(rank) for rank in range(len(self.processes))]

    def end(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join(10)
            if process.is_alive():
                process.kill()
            process.join()
            pipe.close()


@contextmanager
def running(function: Callable, *arguments, tp: int = 1, pp: int = 1, max_message_bytes: int = 1 << 16):
    parallel = ParallelConfig(tp_size=tp, pp_size=pp)
    region = SharedRegion(parallel, max_message_bytes=max_message_bytes)
    ranks = Ranks(region, parallel, function, *arguments)
    try:
        yield region, ranks
    finally:
        region.close()
        ranks.end()


def parts_of(seed: int, tp_size: int, *shape: int, dtype: type = np.float32) -> list[np.ndarray]:
    """What each rank brings: of very different magnitudes, so that another order of adding gives other bits."""
    rng = np.random.default_rng(seed)
    magnitudes = 10.0 ** rng.uniform(-4, 4, (tp_size, *shape))
    return list((rng.standard_normal((tp_size, *shape)) * magnitudes).astype(dtype))


def reduce_random(shared: SharedMemory, num_calls: int) -> tuple[int, int, str]:
    """Wrong calls, calls in which another order would show, and a digest of all bits."""
    rng = np.random.default_rng(7)
    num_wrong = num_ordered = num_bytes = 0
    digest = hashlib.sha256()
    for call in range(num_calls):
        count = int(np.exp(rng.uniform(0, np.log(100_000))))
        dtype = (np.float32, np.float64)[call % 2]
        parts = parts_of(call, shared.place.tp_size, 1, count, dtype=dtype)
        given = parts[shared.place.tp_rank].copy()
        total = shared.all_reduce(given)
        assert total.dtype == dtype and np.array_equal(given, parts[shared.place.tp_rank])
        num_wrong += not np.array_equal(total, reduce(np.add, parts))
        num_ordered += not np.array_equal(total, reduce(np.add, parts[::-1]))
        num_bytes += total.nbytes
        digest.update(total.tobytes())
    assert shared.counters()["all_reduce"][:2] == (num_calls, num_bytes)
    return num_wrong, num_ordered, digest.hexdigest()


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_all_reduce_has_the_bits_of_a_sum_in_rank_order(tp):
    with running(reduce_random, 60, tp=tp) as (_, ranks):
        results = ranks.results()
    assert len(set(results)) == 1
    num_wrong, num_ordered, _ = results[0]
    assert num_wrong == 0
    assert num_ordered == 0 if tp == 2 else num_ordered > 30


def reduce_often(shared: SharedMemory, num_calls: int) -> float:
    x = np.full((1, 576), shared.place.tp_rank + 1, np.float32)
    expected = sum(range(1, shared.place.tp_size + 1))
    begin = time.perf_counter()
    for _ in range(num_calls):
        x[0, 0] = shared.place.tp_rank + 1
        assert (shared.all_reduce(x) == expected).all()
    return time.perf_counter() - begin


def test_more_ranks_than_processors_go_on():
    """The counters begin 1000 below their wrap-around, so this passes it too."""
    with running(reduce_often, 1500, tp=2, pp=3) as (_, ranks):
        assert max(ranks.results()) < 30


def add_with_pointers(shared: SharedMemory, seed: int, has_residual: bool) -> bool:
    """As the interpreter calls it, into memory that may be its own input."""
    size = shared.place.tp_size
    *parts, residual = parts_of(seed, size + 1, 40_000)
    x = parts[shared.place.tp_rank].copy()
    pointers = shared.pointers()
    assert isinstance(pointers, NativePointers)
    call = pointers.functions
    added = residual.ctypes.data if has_residual else None
    assert call.all_reduce(call.context, x.ctypes.data, added, x.ctypes.data, x.size) == 0
    total = reduce(np.add, parts)
    return np.array_equal(x, residual + total if has_residual else total)


@pytest.mark.parametrize("has_residual", [True, False])
def test_a_residual_is_added_to_the_finished_sum(has_residual):
    with running(add_with_pointers, 3, has_residual, tp=3) as (_, ranks):
        assert ranks.results() == [True] * 3


def gather(shared: SharedMemory, widths: tuple[int, ...]) -> bool:
    equal = True
    num_bytes = 0
    for call, (rows, dtype) in enumerate(
        ((1, np.float32), (33, np.float64), (0, np.float32), (7, np.float32))
    ):
        parts = [parts_of(call, 1, rows, width, dtype=dtype)[0] for width in widths]
        whole = shared.all_gather(parts[shared.place.tp_rank], columns=sum(widths))
        equal &= np.array_equal(whole, np.concatenate(parts, axis=1)) and whole.dtype == dtype
        num_bytes += whole.nbytes
    assert shared.counters()["all_gather"][:2] == (4, num_bytes)
    return bool(equal)


@pytest.mark.parametrize("widths", [(5, 3), (1, 40_001, 7), (16, 16, 16, 15), (24_576, 24_576)], ids=str)
def test_all_gather_of_uneven_parts(widths):
    with running(gather, widths, tp=len(widths)) as (_, ranks):
        assert ranks.results() == [True] * len(widths)


def pass_on(shared: SharedMemory, num_messages: int) -> int:
    """Stage 0 makes messages, each stage adds its number, the last compares; all sums are exact."""
    place = shared.place
    rng = np.random.default_rng(11)
    num_right = 0
    for message in range(num_messages):
        rows, columns = int(rng.integers(1, 40)), int(rng.integers(1, 3000))
        expected = (message + 100 * place.tp_rank + np.arange(rows * columns) % 977).reshape(rows, columns)
        expected = expected.astype((np.float32, np.float64)[message % 2])
        x = expected if place.is_first_stage else shared.receive(rows, columns, expected.dtype)
        if place.is_last_stage:
            num_right += np.array_equal(x, expected + sum(range(1, place.pp_size - 1)))
        else:
            shared.send(x + place.pp_rank)
            if message % 7 == place.pp_rank:
                time.sleep(0.003)
    return num_right


def test_messages_arrive_in_order_also_those_that_do_not_fit_the_mailbox():
    with running(pass_on, 80, tp=2, pp=3, max_message_bytes=4) as (_, ranks):
        assert ranks.results() == [0, 0, 0, 0, 80, 80]


def wait_alone(shared: SharedMemory, op: str) -> None:
    """Rank 0 begins what no other rank does; it ends with the error that `child` sends."""
    if shared.place.rank > 0:
        return
    x = np.zeros((1, 576), np.float32)
    while True:
        if op == "all_reduce":
            shared.all_reduce(x)
        elif op == "all_gather":
            shared.all_gather(x, columns=1152)
        else:
            shared.send(x)


def receive_alone(shared: SharedMemory) -> None:
    if shared.place.rank == 1:
        shared.receive(1, 576)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "send", "receive"])
def test_an_abort_wakes_who_waits(op):
    sizes = {"tp": 2} if op.startswith("all") else {"pp": 2}
    waiting = int(op == "receive")
    call = (receive_alone,) if op == "receive" else (wait_alone, op)
    with running(*call, **sizes) as (region, ranks):
        assert ranks.result(1 - waiting) is None
        assert not ranks.pipes[waiting].poll(0.5), "nothing but the abort may end the wait"
        aborted = time.monotonic()
        region.abort()
        ended, message = ranks.result(waiting, 5)
    assert ended - aborted < 0.1
    assert ABORTED in message and f"rank {waiting}" in message


def reduce_for_ever(shared: SharedMemory) -> None:
    x = np.zeros((1, 50_000), np.float32)
    while True:
        shared.all_reduce(x)


def test_after_a_kill_the_others_end_with_the_abort():
    with running(reduce_for_ever, tp=3) as (region, ranks):
        time.sleep(0.3)
        os.kill(ranks.processes[1].pid, signal.SIGKILL)
        ranks.processes[1].join()
        assert not ranks.pipes[0].poll(0.3)
        aborted = time.monotonic()
        region.abort()
        for rank in (0, 2):
            ended, message = ranks.result(rank, 5)
            assert ended - aborted < 0.1 and ABORTED in message


def disagree(shared: SharedMemory, what: str) -> None:
    is_first = shared.place.rank == 0
    x = np.zeros((2, 4 if is_first and what == "sizes" else 5), np.float32)
    if what == "ops" and is_first:
        shared.all_gather(x, columns=10)
    elif what == "columns":
        shared.all_gather(x, columns=11)
    elif what == "messages":
        shared.send(x) if is_first else shared.receive(2, 6)
    else:
        shared.all_reduce(x)


@pytest.mark.parametrize("what", ["ops", "sizes", "columns", "messages"])
def test_ranks_that_do_not_agree_fail(what):
    with running(disagree, what, **({"pp": 2} if what == "messages" else {"tp": 2})) as (_, ranks):
        results = ranks.results()
    for rank, result in enumerate(results):
        if (what, rank) != ("messages", 0):
            assert DISAGREE in result[1]


def late(shared: SharedMemory) -> tuple[float, float]:
    if shared.place.rank == 1:
        time.sleep(0.4)
    shared.all_reduce(np.zeros((1, 576)))
    return shared.counters()["all_reduce"][2:]


def test_the_time_in_which_a_rank_waits_is_counted_apart():
    with running(late, tp=2) as (_, ranks):
        (seconds, wait_s), (seconds_of_late, _) = ranks.results()
    assert 0.1 < wait_s <= seconds < wait_s + 0.05
    assert seconds_of_late < 0.1


def open_files() -> set[str]:
    return {os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink() and f.exists()}


def test_nothing_is_left_behind():
    folders = [Path("/dev/shm"), Path(module.tempfile.gettempdir())]
    before = [set(folder.iterdir()) for folder in folders]
    region = SharedRegion(ParallelConfig(tp_size=2, pp_size=2), max_message_bytes=1 << 20)
    ranks = [
        SharedMemory(region.name, RankPlace.of(r, ParallelConfig(tp_size=2, pp_size=2))) for r in range(4)
    ]
    assert "memfd:ridgeline" in Path("/proc/self/maps").read_text()
    assert [set(folder.iterdir()) for folder in folders] == before, "not even while it is used"
    region.close()
    region.close()
    for rank in ranks:
        with pytest.raises(RankError, match=ABORTED):
            rank.all_reduce(np.zeros((1, 2)))
        rank.close()
        rank.close()
        assert rank.counters() == {}
    assert "memfd:ridgeline" not in Path("/proc/self/maps").read_text()
    assert not any("memfd:ridgeline" in name for name in open_files())
    with pytest.raises(RankError, match="driver has ended"):
        SharedMemory(region.name, RankPlace(0, 2, 0, 2))


def test_a_region_is_for_the_ranks_it_was_made_for():
    region = SharedRegion(ParallelConfig(tp_size=2))
    with pytest.raises(RankError, match="not made for 3 x 1"):
        SharedMemory(region.name, RankPlace(0, 3))
    region.close()


def test_a_lack_of_memory_is_an_error_of_the_driver(monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match="No space left.*max_num_batched_tokens"):
        SharedRegion(ParallelConfig(tp_size=2))
    assert not any("memfd:ridgeline" in name for name in open_files())
