"""Ranks as threads of one process: collectives made of barriers and numpy, in the order of the ranks.

What they count is counted here by hand, from the arrays that were really exchanged.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ridgeline.config import ParallelConfig
from ridgeline.distributed.groups import RankPlace

TIMEOUT_S = 60


class Ranks:
    """All ranks of one model; `run` calls a function for each of them at the same time."""

    def __init__(self, tp_size: int, pp_size: int) -> None:
        parallel = ParallelConfig(tp_size=tp_size, pp_size=pp_size)
        self.places = [RankPlace.of(rank, parallel) for rank in range(parallel.world_size)]
        self._barriers = [threading.Barrier(tp_size) for _ in range(pp_size)]
        self._parts = [[None] * tp_size for _ in range(pp_size)]
        self._links = {place.rank: queue.Queue() for place in self.places}
        self.collectives = [ThreadCollectives(self, place) for place in self.places]

    def run(self, function, *arguments):
        """function(rank, *its argument of each list) -> results by rank; the first error, if there is one."""

        def one(rank):
            try:
                return function(rank, *(a[rank] for a in arguments))
            except BaseException:
                for barrier in self._barriers:
                    barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.places)) as pool:
            futures = [pool.submit(one, place.rank) for place in self.places]
        errors = [f.exception() for f in futures if f.exception() is not None]
        real = [e for e in errors if not isinstance(e, (threading.BrokenBarrierError, queue.Empty))]
        if errors:
            raise (real or errors)[0]
        return [f.result() for f in futures]

    def exchange(self, place, part):
        """Everyone's part, by tp rank."""
        barrier, parts = self._barriers[place.pp_rank], self._parts[place.pp_rank]
        parts[place.tp_rank] = part
        barrier.wait(TIMEOUT_S)
        everyone = list(parts)
        barrier.wait(TIMEOUT_S)  # before anyone writes the next
        return everyone

    def link(self, place, *, offset: int):
        return self._links[place.rank + offset * place.tp_size]


class ThreadCollectives:
    """`Collectives` of one rank."""

    def __init__(self, ranks: Ranks, place: RankPlace) -> None:
        self.place = place
        self._ranks = ranks
        self.num_bytes = Counter()

    def all_reduce(self, x):
        parts = self._ranks.exchange(self.place, x.copy())
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        self.num_bytes["all_reduce"] += total.nbytes
        return total

    def all_gather(self, x, *, columns):
        out = np.concatenate(self._ranks.exchange(self.place, x.copy()), axis=1)
        assert out.shape == (len(x), columns)
        self.num_bytes["all_gather"] += out.nbytes
        return out

    def send(self, x):
        self.num_bytes["send"] += x.nbytes
        self._ranks.link(self.place, offset=0).put(x.copy())

    def receive(self, rows, columns, dtype=np.float32):
        x = self._ranks.link(self.place, offset=-1).get(timeout=TIMEOUT_S)
        x = x.reshape(rows, columns)  # native sends a flat message
        assert x.dtype == dtype
        self.num_bytes["receive"] += x.nbytes
        return x

    def counters(self):
        raise NotImplementedError("tests read num_bytes")

    def close(self):
        pass
