"""The blocks of the KV cache: who holds them, which are free, and which can be found again by content.

A block is free (nobody holds it; it may still carry published content), or referenced by one or more
tables. Full blocks are published under a chain hash of their tokens and all tokens before them, and are
immutable from then on. A hash is believed only after the tokens and the parent are compared. Free blocks are
reused least recently freed first, empty ones before all others, so published content lives as long as there
is room.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

NO_BLOCK = -1
"""Entry of a block table whose block was freed behind a sliding window."""

HashFunction = Callable[[bytes, Sequence[int]], bytes]


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a block: of its parent's hash and its tokens. Stable across processes."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16, key=parent).digest()


@dataclass(slots=True)
class Block:
    """One block. Owner: BlockPool. `content` is set when it is published."""

    block_id: int
    ref_count: int = 0
    content: Content | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What a published block holds: its tokens, and its place in a chain of blocks. Compared by identity."""

    hash: bytes
    token_ids: tuple[int, ...]
    parent: Content | None = field(repr=False)


@dataclass(slots=True)
class PoolStats:
    """Counters since the pool was made; the hit rate is hits over queries, in tokens."""

    num_queried_tokens: int = 0
    """Tokens of requests that looked for a prefix when they were first admitted."""
    num_hit_tokens: int = 0
    num_evicted_blocks: int = 0


class BlockPool:
    """Owns all blocks. Invariant: every block is either free or has a positive ref_count."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool,
        hash_function: HashFunction = chain_hash,
    ) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = PoolStats()
        self.hash = hash_function
        self._blocks = [Block(i) for i in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._published: dict[bytes, int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with ref_count 1, or None if there are not as many free. Evicts old content."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            block = self._blocks[block_id]
            if block.content is not None:
                self._unpublish(block)
                self.stats.num_evicted_blocks += 1
            block.ref_count = 1
            taken.append(block_id)
        return taken

    def lookup(self, hash_value: bytes, token_ids: Sequence[int], parent: Content | None) -> Content | None:
        """The published content with this hash, these tokens and this parent; None otherwise."""
        block_id = self._published.get(hash_value)
        content = None if block_id is None else self._blocks[block_id].content
        if content is None or content.parent is not parent or content.token_ids != tuple(token_ids):
            return None
        return content

    def block_of(self, content: Content) -> int:
        """The block that holds content which `lookup` has just returned."""
        return self._published[content.hash]

    def content_of(self, block_id: int) -> Content | None:
        """What a block holds, if it is published."""
        return self._blocks[block_id].content

    def is_free(self, block_id: int) -> bool:
        return block_id in self._free

    def share(self, block_id: int) -> None:
        """One more table holds a published block."""
        block = self._blocks[block_id]
        assert block.content is not None
        if block.ref_count == 0:
            del self._free[block_id]
        block.ref_count += 1

    def publish(
        self, block_id: int, token_ids: Sequence[int], parent: Content | None, hash_value: bytes
    ) -> Content:
        """Make a full block findable -> its content.

        Equal content that is already published stays the one that is found, and both blocks live on: tables
        only ever grow. Other content under the same hash (a collision, or a chain whose parent was evicted)
        gives way.
        """
        block = self._blocks[block_id]
        assert block.ref_count > 0 and block.content is None
        existing = self.lookup(hash_value, token_ids, parent)
        if existing is not None:
            return existing
        if hash_value in self._published:
            self._blocks[self._published[hash_value]].content = None
        block.content = Content(hash_value, tuple(token_ids), parent)
        self._published[hash_value] = block_id
        return block.content

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one reference of each. Of those nobody holds then, the ones without content are reused before
        any others, and published ones in the order given here."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.ref_count > 0
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.content is None:
                    self._free.move_to_end(block_id, last=False)

    def forget_content(self) -> None:
        """Nothing is published any more: the memory behind the blocks is gone."""
        for block_id in list(self._published.values()):
            self._unpublish(self._blocks[block_id])

    def _unpublish(self, block: Block) -> None:
        assert block.content is not None
        del self._published[block.content.hash]
        block.content = None

    def counts(self) -> dict[str, int]:
        """Blocks that are free and empty, cached (free with content) and referenced; they add up to all."""
        cached = sum(1 for i in self._free if self._blocks[i].content is not None)
        return {
            "free": len(self._free) - cached,
            "cached": cached,
            "referenced": len(self._blocks) - len(self._free),
        }

    def check_invariants(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that reference counts are what the tables say, and that the index points at its content."""
        held: dict[int, int] = {}
        for table in tables:
            for block_id in table:
                if block_id != NO_BLOCK:
                    held[block_id] = held.get(block_id, 0) + 1
        for block in self._blocks:
            assert block.ref_count == held.get(block.block_id, 0), (block, held.get(block.block_id, 0))
            assert (block.block_id in self._free) == (block.ref_count == 0), block
            if block.content is not None:
                assert self._published[block.content.hash] == block.block_id
                assert len(block.content.token_ids) == self.block_size
        assert len(self._published) == sum(1 for b in self._blocks if b.content is not None)
