"""Measurements on one machine take turns, iteration by iteration.

Two processes that measure at the same time would measure each other; two that measure one after the other see
two different machines, because a shared machine changes within seconds. So each iteration holds a lock of
this user on this machine, and measurements that run side by side are interleaved: A B A B. Start together
what is to be compared. Two locks make it fair: who waits for the turn already holds the place behind it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from ridgeline.checkpoint.checkpoint import cache_directory


@contextmanager
def turn() -> Iterator[None]:
    """Wait for this process's turn, and have the machine for the length of the block."""
    folder = cache_directory()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "bench.next").open("w") as place, (folder / "bench.turn").open("w") as running:
        with _held(place):
            fcntl.flock(running, fcntl.LOCK_EX)
        yield  # closing the file gives the turn back


@contextmanager
def _held(file: IO[str]) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
