"""Block tables of requests: prefix match, growth, publication, and what falls behind a window.

Everything about one request's memory is here; the scheduler only asks "is there room". No room is a normal
answer. A table lists block ids in token order; with a sliding window on every layer, blocks that no token
will read again are freed early and their entries become NO_BLOCK, so memory stays flat.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ridgeline.kvcache.block_pool import NO_BLOCK, BlockPool, Content
from ridgeline.request import Request


@dataclass(slots=True)
class Table:
    """Blocks of one request. The first `len(published)` of them are in the prefix index."""

    block_ids: list[int] = field(default_factory=list)
    published: list[Content] = field(default_factory=list)
    num_dropped: int = 0
    """Blocks looked at so far for falling behind the window."""


class BlockManager:
    """Owns the tables. Invariant: a block's ref_count is the number of tables that hold it."""

    def __init__(self, pool: BlockPool, *, window: int | None = None, num_sinks: int = 0) -> None:
        """`window` and `num_sinks`: of models whose layers are all windowed; else None and 0."""
        self.pool = pool
        self.block_size = pool.block_size
        self._window = window
        self._num_sink_blocks = -(-num_sinks // pool.block_size)
        self._tables: dict[str, Table] = {}
        self._hashes: dict[str, list[bytes]] = {}

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def table(self, request: Request) -> list[int]:
        table = self._tables.get(request.request_id)
        return [] if table is None else table.block_ids

    @property
    def num_slots(self) -> int:
        """Tokens that all blocks hold together."""
        return self.pool.num_blocks * self.block_size

    def max_request_tokens(self, max_chunk: int) -> int | None:
        """Longest request that can ever be held; None: any, since the window bounds it.

        max_chunk: tokens of a request computed in one step; with a window, that many and the window itself
        must fit at once.
        """
        if self._window is None:
            return self.num_slots
        needed = self._num_sink_blocks + self.num_blocks_for(self._window + max_chunk) + 1
        return None if needed <= self.pool.num_blocks else self.num_slots

    def may_reuse(self, request: Request) -> bool:
        """False for prompt_logprobs, which need the logits of every token."""
        return self.pool.enable_prefix_caching and request.params.prompt_logprobs is None

    def match_prefix(self, request: Request) -> list[Content]:
        """Published full blocks that begin the request, in order; at least one token is left to compute."""
        matched: list[Content] = []
        if self.may_reuse(request):
            for index in range(self._num_reusable(request)):
                parent = matched[-1] if matched else None
                token_ids = self._block_tokens(request, index)
                found = self.pool.lookup(self._block_hash(request, index), token_ids, parent)
                if found is None:
                    break
                matched.append(found)
        return matched

    def is_same_block(self, request: Request, other: Request, index: int) -> bool:
        """True when full block `index` of both holds the same tokens after the same tokens."""
        return (
            index < self._num_reusable(request)
            and (index + 1) * self.block_size <= other.num_tokens
            and self._block_hash(request, index) == self._block_hash(other, index)
            and self._block_tokens(request, index) == self._block_tokens(other, index)
        )

    def _num_reusable(self, request: Request) -> int:
        """Full blocks before the last token, which is always computed, for its logits."""
        return (request.num_tokens - 1) // self.block_size

    def _block_hash(self, request: Request, index: int) -> bytes:
        """Chain hash of a full block of the request, computed once."""
        hashes = self._hashes.setdefault(request.request_id, [])
        while len(hashes) <= index:
            token_ids = self._block_tokens(request, len(hashes))
            hashes.append(self.pool.hash(hashes[-1] if hashes else b"", token_ids))
        return hashes[index]

    def _block_tokens(self, request: Request, index: int) -> list[int]:
        return request.tokens(index * self.block_size, (index + 1) * self.block_size)

    def adopt(self, request: Request, matched: list[Content]) -> None:
        """Begin the table of a request with matched blocks, shared and not copied."""
        block_ids = [self.pool.block_of(content) for content in matched]
        for block_id in block_ids:
            self.pool.share(block_id)
        self._tables[request.request_id] = Table(block_ids, list(matched))
        request.num_computed_tokens = request.num_planned_tokens = len(matched) * self.block_size
        if request.num_preemptions == 0 and self.may_reuse(request):
            request.num_cached_tokens = request.num_computed_tokens
            self.pool.stats.num_queried_tokens += request.num_tokens
            self.pool.stats.num_hit_tokens += request.num_cached_tokens

    def num_unheld(self, matched: list[Content]) -> int:
        """Of matched blocks, those that nobody holds: adopting them takes them from the free ones."""
        return sum(self.pool.is_free(self.pool.block_of(content)) for content in matched)

    def num_missing(self, request: Request, num_tokens: int) -> int:
        """Blocks that the table lacks to hold the first num_tokens tokens."""
        return max(0, self.num_blocks_for(num_tokens) - len(self.table(request)))

    def allocate(self, request: Request, num_tokens: int) -> bool:
        """Grow the table to hold the first num_tokens tokens; False, and as it was, when there is no room."""
        table = self._tables.setdefault(request.request_id, Table())
        self._drop_behind_window(table, request.num_computed_tokens)
        num_missing = self.num_blocks_for(num_tokens) - len(table.block_ids)
        if num_missing > 0:
            blocks = self.pool.allocate(num_missing)
            if blocks is None:
                return False
            table.block_ids.extend(blocks)
        return True

    def _drop_behind_window(self, table: Table, num_computed: int) -> None:
        """Free blocks that neither the next token, at position num_computed, nor a later one sees."""
        if self._window is None:
            return
        first_seen = max(0, num_computed - self._window + 1) // self.block_size
        dropped = []
        for index in range(max(table.num_dropped, self._num_sink_blocks), first_seen):
            if table.block_ids[index] != NO_BLOCK:
                dropped.append(table.block_ids[index])
                table.block_ids[index] = NO_BLOCK
        table.num_dropped = max(table.num_dropped, first_seen)
        self.pool.free(reversed(dropped))

    def publish(self, request: Request) -> None:
        """Make the blocks findable whose tokens are all computed now."""
        if not self.pool.enable_prefix_caching:
            return
        table = self._tables[request.request_id]
        num_full = request.num_computed_tokens // self.block_size
        while len(table.published) < num_full:
            index = len(table.published)
            parent = table.published[-1] if table.published else None
            content = self.pool.publish(
                table.block_ids[index],
                self._block_tokens(request, index),
                parent,
                self._block_hash(request, index),
            )
            table.published.append(content)

    def free(self, request: Request) -> None:
        """Give back all blocks, the tail first, so that prefixes live longest. Idempotent."""
        table = self._tables.pop(request.request_id, None)
        if table is not None:
            self.pool.free(b for b in reversed(table.block_ids) if b != NO_BLOCK)

    def forget(self, request: Request) -> None:
        """The request is over: give back its blocks and drop what was kept about it."""
        self.free(request)
        self._hashes.pop(request.request_id, None)

    def check_invariants(self) -> None:
        """Assert that pool and tables agree and that nothing is lost."""
        self.pool.check_invariants(table.block_ids for table in self._tables.values())
        counts = self.pool.counts()
        assert sum(counts.values()) == self.pool.num_blocks, counts
