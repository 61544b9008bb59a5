"""Rank processes without a model: every way in which one can fail is noticed in time, named, and cleaned up."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ridgeline.distributed.channel import Listener, connect
from ridgeline.distributed.launch import LocalProcess, RankGroup
from ridgeline.distributed.ranks import Seat
from ridgeline.errors import ConfigError, RankError

STUB = "tests.stub_rank"
NOTICED_S = 5.0


def make_group(world_size: int = 2, *, module: str = STUB, abort=lambda: None) -> RankGroup:
    token = os.urandom(32)
    listener = Listener("127.0.0.1", 0, token=token)

    def starter(rank: int):
        seat = Seat(rank, listener.host, listener.port, token.hex())
        own = seat.here(local_rank=rank, num_local_ranks=world_size, num_threads=1)
        return lambda: LocalProcess(module, own.environment())

    labels = [f"rank {r}" for r in range(world_size)]
    return RankGroup([starter(r) for r in range(world_size)], listener, labels=labels, abort=abort)


@contextmanager
def started(world_size: int = 2, **options):
    group = make_group(world_size, **options)
    try:
        group.start()
        group.ready()
        yield group
    finally:
        group.close()


def tell(group: RankGroup, rank: int, *message) -> None:
    group.send(rank, pickle.dumps(message))


def is_running(pid: int) -> bool:
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids, limit_s: float = NOTICED_S) -> None:
    deadline = time.monotonic() + limit_s
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"still there: {[p for p in pids if is_running(p)]}"
        time.sleep(0.02)


def test_messages_in_order_whole_and_both_ways():
    with started(3) as group:
        payloads = [os.urandom(n) for n in (0, 1, 70_000, 3_000_000)]
        for payload in payloads:
            for rank in range(3):
                tell(group, rank, "echo", payload)
            for rank in (2, 0, 1):
                assert group.receive(rank) == (rank, payload)
        assert len(set(group.pids)) == 3


def test_a_message_that_times_out_is_received_later():
    token = os.urandom(32)
    listener = Listener("127.0.0.1", 0, token=token)
    ends = []
    thread = threading.Thread(target=lambda: ends.append(listener.accept(timeout=5)))
    thread.start()
    near = connect(listener.host, listener.port, token=token)
    thread.join()
    (far,) = ends
    pickled = pickle.dumps("x" * 1000)
    framed = len(pickled).to_bytes(8, "little") + pickled
    try:
        far._socket.sendall(framed[:500])
        with pytest.raises(TimeoutError):
            near.receive(timeout=0.05)
        far._socket.sendall(framed[500:])
        assert near.receive(timeout=5) == "x" * 1000
        far.close()
        with pytest.raises(ConnectionError):
            near.receive(timeout=5)
    finally:
        near.close()
        listener.close()


def test_a_stranger_learns_nothing_and_is_not_unpickled():
    listener = Listener("127.0.0.1", 0, token=b"right")
    accepted = []
    thread = threading.Thread(target=lambda: accepted.extend(listener.accept(timeout=5) for _ in range(2)))
    thread.start()
    with pytest.raises(ConnectionError, match="token"):
        connect(listener.host, listener.port, token=b"wrong")
    with socket.create_connection((listener.host, listener.port)) as plain:
        bomb = pickle.dumps("never read")
        plain.sendall(len(bomb).to_bytes(8, "little") + bomb.ljust(128, b"."))
        thread.join()
    assert accepted == [None, None]
    listener.close()


@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "no sign of life")]
)
def test_a_rank_that_is_killed_or_stopped_ends_all_within_seconds(number, says):
    aborted = threading.Event()
    with started(3, abort=aborted.set) as group:
        pids = group.pids
        aborted.clear()
        os.kill(pids[1], number)
        begun = time.monotonic()
        with pytest.raises(RankError, match=f"rank 1.*pid {pids[1]}.*{says}"):
            group.receive(0)
        assert time.monotonic() - begun < NOTICED_S
        assert aborted.is_set()
        wait_until_gone(pids)
        with pytest.raises(RankError, match="rank 1"):  # and every call from now on
            tell(group, 2, "echo")


def test_a_long_step_is_no_failure():
    with started() as group:
        tell(group, 0, "sleep", 4.5)
        assert group.receive(0) == "slept"


def test_an_error_of_a_rank_comes_with_its_last_words():
    with started() as group:
        tell(group, 1, "raise", "RuntimeError", "the cable is blue")
        with pytest.raises(
            RankError, match=r"(?s)rank 1.*RuntimeError: the cable is blue.*Traceback.*stub_rank"
        ):
            group.receive(0)


def test_the_cause_is_who_failed_first_not_who_complained():
    with started(3) as group:
        tell(group, 0, "raise", "RankError", "a peer is gone")
        tell(group, 2, "raise", "RankError", "a peer is gone")
        os.kill(group.pids[1], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 1.*SIGKILL"):
            group.receive(0)


def test_a_mistake_of_the_user_keeps_its_type():
    with started() as group:
        tell(group, 1, "raise", "ConfigError", "no such thing")
        with pytest.raises(ConfigError, match="rank 1: no such thing"):
            group.receive(1)


def test_a_rank_that_leaves():
    with started() as group:
        tell(group, 0, "exit", 7)
        with pytest.raises(RankError, match=r"(?s)rank 0.*exited with status 7.*leaving early"):
            group.receive(0)


def test_a_rank_that_cannot_start_says_why():
    group = make_group(module="tests.no_such_module")
    try:
        with pytest.raises(RankError, match="No module named tests.no_such_module"):
            group.start()
    finally:
        group.close()


def test_ranks_outlive_the_thread_that_started_them():
    """PR_SET_PDEATHSIG is sent when a *thread* ends."""
    group = make_group()
    try:
        thread = threading.Thread(target=group.start)
        thread.start()
        thread.join()
        group.ready()
        time.sleep(0.3)
        tell(group, 0, "echo")
        assert group.receive(0) == (0,)
    finally:
        group.close()


def test_close_leaves_no_process_no_port_and_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    with started() as group:
        pids, port = group.pids, group._listener.port
    assert not any(map(is_running, pids))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    with pytest.raises(RankError, match="closed"):
        group.receive(0)
    del group
    assert len(os.listdir("/proc/self/fd")) == before


DRIVER = """
import os, sys, time
from tests.unit.test_launch import make_group
group = make_group()
group.start()
print(*group.pids, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_end_with_their_driver_even_when_stopped(stopped):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_running, pids))
        if stopped:
            os.kill(pids[1], signal.SIGSTOP)
    finally:
        driver.kill()
        driver.communicate()
    wait_until_gone(pids)
