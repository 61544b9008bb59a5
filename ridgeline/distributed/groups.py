"""Places of ranks: passed as arguments, never a global.

Ranks are numbered stage by stage: rank = pp_rank * tp_size + tp_rank. The tp ranks of a stage hold parts of
the same layers and sum what they compute; the stages of a pipeline hold layers that follow each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank among all."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    @classmethod
    def of(cls, rank: int, parallel: ParallelConfig) -> RankPlace:
        pp_rank, tp_rank = divmod(rank, parallel.tp_size)
        return cls(tp_rank, parallel.tp_size, pp_rank, parallel.pp_size)

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def samples(self) -> bool:
        """Whether this rank chooses the tokens: one of all does."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def stage(self) -> tuple[int, ...]:
        """Ranks of this stage, by tp_rank."""
        return tuple(self.pp_rank * self.tp_size + r for r in range(self.tp_size))


ALONE = RankPlace()


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a model a rank has; its numbers of heads, columns and rows are in its `ModelConfig`."""

    place: RankPlace
    layers: range
    """of the whole model"""
    first_vocab_row: int
    vocab_size: int
    """of the whole model"""
