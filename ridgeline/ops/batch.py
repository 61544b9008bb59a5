"""The step as arrays: which tokens, where they sit, where their K and V go.

Letters: T tokens of the step (padding included), S sequences, B blocks per table, L rows with logits.
Made once per step and passed down as an argument; kernels read positions and tables from here and never
assume that slots are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


class BatchRow(Protocol):
    """The part of `engine.scheduler.PlanRow` that a batch is made of."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def start(self) -> int: ...
    @property
    def block_ids(self) -> Sequence[int]: ...
    @property
    def num_logits(self) -> int: ...
    @property
    def num_padding(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Row:
    """A row without a request behind it: for measurements, evaluation and tests."""

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    num_logits: int
    num_padding: int = 0


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Inputs of one forward pass besides the weights. All arrays int32."""

    token_ids: IntArray
    """[T]"""
    positions: IntArray
    """[T] place of the token in its text; a query sees the keys at positions up to its own"""
    slot_mapping: IntArray
    """[T] block_id * block_size + offset; -1: padding, K and V are not stored"""
    query_start_loc: IntArray
    """[S+1] prefix sums of the tokens of each sequence, its padding included"""
    seq_lens: IntArray
    """[S] tokens in the cache after this step"""
    block_tables: IntArray
    """[S, B] block ids in token order; -1: no block (past the end, or freed behind a window)"""
    logit_rows: IntArray
    """[L] rows of T whose logits are wanted, ascending"""
    max_query_len: int
    max_seq_len: int

    @classmethod
    def from_rows(cls, rows: Sequence[BatchRow], *, block_size: int) -> ForwardBatch:
        """Lay out the rows of a plan one after the other, each followed by its padding.

        Padding repeats the row's last position, is really computed, and is stored nowhere.
        """
        token_ids: list[int] = []
        logit_rows: list[int] = []
        query_start_loc = [0]
        block_tables = np.full((len(rows), max((len(r.block_ids) for r in rows), default=0)), -1, np.int32)
        for i, row in enumerate(rows):
            block_tables[i, : len(row.block_ids)] = row.block_ids
            token_ids += row.token_ids
            logit_rows += range(len(token_ids) - row.num_logits, len(token_ids))
            token_ids += [0] * row.num_padding
            query_start_loc.append(len(token_ids))
        first = np.array([row.start for row in rows], np.int32)
        num_tokens = np.array([len(row.token_ids) for row in rows], np.int32)
        seq_lens = first + num_tokens
        starts = np.array(query_start_loc, np.int32)
        counts = np.diff(starts)
        of_row = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(token_ids), dtype=np.int32) + (first - starts[:-1])[of_row]
        is_padding = positions >= seq_lens[of_row]
        if has_padding := bool(is_padding.any()):
            positions = np.where(is_padding, np.maximum(seq_lens - 1, 0)[of_row], positions)
        slots = block_tables[of_row, positions // block_size] * block_size + positions % block_size
        if has_padding:
            slots[is_padding] = -1
        return cls(
            token_ids=np.array(token_ids, np.int32),
            positions=positions,
            slot_mapping=slots,
            query_start_loc=starts,
            seq_lens=seq_lens,
            block_tables=block_tables,
            logit_rows=np.array(logit_rows, np.int32),
            max_query_len=int(counts.max(initial=0)),
            max_seq_len=int(seq_lens.max(initial=0)),
        )
