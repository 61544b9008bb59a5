"""What an exchange between ranks takes: latency and bandwidth of the link, times the crossings of a message.

Data sheets for links that are not here; ranks on this machine exchange through shared memory, which is
measured. A ring passes n pieces around, each rank sending and receiving at the same time (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009); in shared memory every rank
reads the others' parts at once.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np

from ridgeline.config import ParallelConfig
from ridgeline.distributed.collectives import SharedMemory, SharedRegion
from ridgeline.distributed.groups import RankPlace
from ridgeline.errors import ConfigError
from ridgeline.ops.program import Opcode

SHARED_MEMORY = "shared memory"
MAX_MEASURE_S = 60
SMALL, LARGE = 576, 1 << 18
"""Floats of the two sums that are measured: a token's activation, and those of a chunk of a prompt."""


@dataclass(frozen=True, slots=True)
class Link:
    """Between two ranks, one way."""

    name: str
    latency_s: float
    """of a small message, with what software adds to it"""
    gb_s: float
    is_ring: bool = True
    """False: one exchange of the whole, as measured with this number of ranks"""

    def seconds(self, opcode: Opcode, num_bytes: int, num_ranks: int) -> float:
        """Of an exchange whose result is `num_bytes` long; a message is counted where it is sent."""
        if not num_bytes or opcode is Opcode.RECEIVE:
            return 0.0
        if opcode is Opcode.SEND or not self.is_ring:
            return self.latency_s + num_bytes / self.gb_s / 1e9
        num_messages = (num_ranks - 1) * (2 if opcode is Opcode.ALL_REDUCE else 1)
        return num_messages * (self.latency_s + num_bytes / num_ranks / self.gb_s / 1e9)


LINKS: dict[str, Link] = {
    name: Link(title, latency_s, gb_s)
    for name, title, latency_s, gb_s in (
        ("nvlink", "NVLink 4", 4e-6, 450),
        ("nvlink3", "NVLink 3", 4e-6, 300),
        ("pcie5", "PCIe 5.0 x16", 6e-6, 63),
        ("pcie4", "PCIe 4.0 x16", 6e-6, 31.5),
        ("ethernet100", "Ethernet, 100 Gbit/s", 20e-6, 12.5),
        ("ethernet10", "Ethernet, 10 Gbit/s", 30e-6, 1.25),
        ("ethernet1", "Ethernet, 1 Gbit/s", 50e-6, 0.125),
    )
}
"""Bandwidths of data sheets, one way; the latencies of small messages are assumed, not measured here."""
DEFAULT_LINKS = {"h200": "nvlink", "h100": "nvlink", "a100": "nvlink3", "l40s": "pcie4", "l4": "pcie4"}
"""By device; PCIe 4.0 for others."""


def describe_link(name: str) -> Link:
    """The data sheet of a link. Raises ConfigError for an unknown one."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in LINKS:
        raise ConfigError(f"--link {name}: no data sheet; known: {', '.join(LINKS)}")
    return LINKS[key]


def measure_link(tp_size: int) -> Link:
    """Sums over `tp_size` processes of this machine, small and large; messages are taken to be like them.

    Raises RankError when a process does not take part.
    """
    num_ranks = max(tp_size, 2)
    region = SharedRegion(ParallelConfig(tp_size=num_ranks), max_message_bytes=4 * LARGE)
    impatience = threading.Timer(MAX_MEASURE_S, region.abort)
    impatience.start()
    try:
        command = [sys.executable, "-m", "ridgeline.profiling.links", region.name, str(num_ranks)]
        others = [
            subprocess.Popen([*command, str(r)], stdout=subprocess.DEVNULL) for r in range(1, num_ranks)
        ]
        try:
            small, large = _time_sums(region.name, num_ranks, 0)
            for process in others:
                process.wait()  # they leave the last sum a moment later; an abort now would be their error
        finally:
            region.abort()
            for process in others:
                process.wait()
    finally:
        impatience.cancel()
        region.close()
    gb_s = 4 * (LARGE - SMALL) / max(large - small, 1e-9) / 1e9
    return Link(SHARED_MEMORY, max(small - 4 * SMALL / gb_s / 1e9, 0.0), gb_s, is_ring=False)


def _time_sums(name: str, num_ranks: int, rank: int) -> tuple[float, float]:
    """Median seconds of the two sizes; every rank makes the same calls."""
    collectives = SharedMemory(name, RankPlace(rank, num_ranks, 0, 1))
    try:
        return _median(collectives, SMALL, 2000), _median(collectives, LARGE, 100)
    finally:
        collectives.close()


def _median(collectives: SharedMemory, count: int, repeats: int) -> float:
    x = np.ones((1, count), np.float32)
    collectives.all_reduce(x)  # all are here
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        collectives.all_reduce(x)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


if __name__ == "__main__":
    _time_sums(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
