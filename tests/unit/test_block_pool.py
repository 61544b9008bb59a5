"""Blocks: reference counts, eviction order, and hits that are believed only after comparison."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ridgeline.kvcache.block_pool import BlockPool, chain_hash


def constant_hash(parent, token_ids):
    return b"same"


def make(num_blocks=4, block_size=2, **options):
    return BlockPool(num_blocks, block_size, **({"enable_prefix_caching": True} | options))


def publish_chain(pool, blocks, *texts):
    """Publish blocks one after the other -> their contents."""
    contents = []
    for block_id, tokens in zip(blocks, texts, strict=True):
        parent = contents[-1] if contents else None
        value = pool.hash(parent.hash if parent else b"", tokens)
        contents.append(pool.publish(block_id, tokens, parent, value))
    return contents


def find(pool, *texts):
    """Blocks that hold this chain, as far as it is published."""
    found, parent, value = [], None, b""
    for tokens in texts:
        value = pool.hash(value, tokens)
        parent = pool.lookup(value, tokens, parent)
        if parent is None:
            break
        found.append(pool.block_of(parent))
    return found


def test_a_pool_of_three_gives_out_three_and_then_none():
    pool = make(3)
    assert sorted(pool.allocate(3)) == [0, 1, 2]
    assert pool.allocate(1) is None
    pool.free([1])
    assert pool.allocate(2) is None, "all or nothing"
    assert pool.num_free == 1
    assert pool.allocate(1) == [1]
    assert pool.allocate(0) == []


def test_published_content_is_found_again_after_it_was_freed():
    pool = make()
    blocks = pool.allocate(2)
    publish_chain(pool, blocks, (1, 2), (3, 4))
    pool.free(reversed(blocks))
    assert pool.counts() == {"free": 2, "cached": 2, "referenced": 0}
    assert find(pool, (1, 2), (3, 4)) == blocks
    pool.share(blocks[0])
    assert pool.counts() == {"free": 2, "cached": 1, "referenced": 1}
    pool.check_invariants([[blocks[0]]])


def test_empty_blocks_go_first_then_the_longest_unused_tail():
    pool = make(5)
    first, second = pool.allocate(2), pool.allocate(2)
    publish_chain(pool, first, (1, 2), (3, 4))
    publish_chain(pool, second, (5, 6), (7, 8))
    pool.free(reversed(first))
    pool.free(reversed(second))
    order = [pool.allocate(1)[0] for _ in range(5)]
    assert order == [4, first[1], first[0], second[1], second[0]]
    assert pool.stats.num_evicted_blocks == 4


def test_an_empty_block_that_is_freed_last_still_goes_first():
    pool = make(2)
    a, b = pool.allocate(2)
    publish_chain(pool, [a], (1, 2))
    pool.free([a])
    pool.free([b])
    assert pool.allocate(1) == [b] and pool.stats.num_evicted_blocks == 0


def test_a_block_that_was_used_again_is_evicted_last():
    pool = make(2)
    a, b = pool.allocate(2)
    publish_chain(pool, [a], (1, 2))
    publish_chain(pool, [b], (3, 4))
    pool.free([a, b])
    pool.share(a)
    pool.free([a])
    assert pool.allocate(1) == [b]


def test_equal_content_is_indexed_once_and_both_blocks_live():
    pool = make()
    a, b = pool.allocate(2)
    (content,) = publish_chain(pool, [a], (1, 2))
    assert publish_chain(pool, [b], (1, 2)) == [content]
    assert pool.content_of(b) is None and find(pool, (1, 2)) == [a]
    pool.check_invariants([[a], [b]])
    pool.free([a, b])
    assert pool.counts()["cached"] == 1


@pytest.mark.parametrize("hash_function", [chain_hash, constant_hash])
def test_a_hit_needs_the_same_tokens_after_the_same_parent(hash_function):
    pool = make(hash_function=hash_function)
    blocks = pool.allocate(3)
    publish_chain(pool, blocks[:1], (1, 2))
    assert find(pool, (1, 2)) == blocks[:1]
    assert find(pool, (2, 1)) == []
    publish_chain(pool, blocks[1:], (7, 8), (9, 9))
    assert find(pool, (1, 2), (9, 9)) in ([], blocks[:1])
    assert find(pool, (9, 9)) == []
    pool.check_invariants([blocks])


def test_a_collision_gives_way_to_the_newer_content():
    pool = make(hash_function=constant_hash)
    a, b = pool.allocate(2)
    publish_chain(pool, [a], (1, 2))
    publish_chain(pool, [b], (3, 4))
    assert find(pool, (1, 2)) == [] and find(pool, (3, 4)) == [b]
    pool.check_invariants([[a, b]])


def test_a_child_whose_parent_was_evicted_and_made_again_is_not_trusted():
    pool = make(2)
    a, b = pool.allocate(2)
    publish_chain(pool, [a, b], (1, 2), (3, 4))
    pool.free([a])
    assert pool.allocate(1) == [a]
    publish_chain(pool, [a], (1, 2))
    assert find(pool, (1, 2), (3, 4)) == [a]


def test_the_hash_is_the_same_in_every_process_and_depends_on_order_and_parent():
    assert chain_hash(b"", (1, 2)).hex() == chain_hash(b"", [1, 2]).hex() == KNOWN_HASH
    different = {chain_hash(b"", (1, 2)), chain_hash(b"", (2, 1)), chain_hash(b"x", (1, 2))}
    assert len(different) == 3


KNOWN_HASH = "f59df9f51bfcb52f7ae49756810ec78b"


def test_taking_and_freeing_do_not_slow_down_with_the_size_of_the_pool():
    def seconds(num_blocks):
        pool = make(num_blocks)
        held = pool.allocate(num_blocks // 2)
        rng = random.Random(0)
        started = time.perf_counter()
        for _ in range(3000):
            i = rng.randrange(len(held))
            pool.free([held[i]])
            held[i] = pool.allocate(1)[0]
        return time.perf_counter() - started

    assert seconds(100_000) < 20 * seconds(100) + 0.05, "an operation is linear in the number of blocks"


class PoolMachine(RuleBasedStateMachine):
    """Tables come, grow, publish and go; a model of what was published says which hits are right."""

    @initialize(num_blocks=st.integers(1, 8), collide=st.booleans())
    def start(self, num_blocks, collide):
        self.pool = make(num_blocks, hash_function=constant_hash if collide else chain_hash)
        self.tables = []
        self.chains = []  # texts of each table's published blocks
        self.contents = []
        self.held = {}  # block id -> whole text of the chain it was published with

    @rule(count=st.integers(0, 4))
    def grow(self, count):
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks:
            for block_id in blocks:
                self.held.pop(block_id, None)
            self.tables.append(blocks)
            self.chains.append([])
            self.contents.append([])

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 100), tokens=st.tuples(st.integers(0, 1), st.integers(0, 1)))
    def publish(self, which, tokens):
        i = which % len(self.tables)
        index = len(self.chains[i])
        if index == len(self.tables[i]):
            return
        parent = self.contents[i][-1] if index else None
        value = self.pool.hash(parent.hash if parent else b"", tokens)
        block_id = self.tables[i][index]
        if self.pool.content_of(block_id) is not None:
            return
        self.contents[i].append(self.pool.publish(block_id, tokens, parent, value))
        self.chains[i].append(tokens)
        self.held[block_id] = tuple(self.chains[i])

    @rule(tokens=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=4))
    def match(self, tokens):
        """Every block found holds exactly this text after exactly the text before it."""
        found = find(self.pool, *tokens)
        for index, block_id in enumerate(found):
            assert self.held[block_id] == tuple(tokens[: index + 1])
        if found:
            for block_id in found:
                self.pool.share(block_id)
            self.tables.append(found)
            self.chains.append(list(tokens[: len(found)]))
            self.contents.append([self.pool.content_of(b) for b in found])

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 100))
    def drop(self, which):
        i = which % len(self.tables)
        self.pool.free(reversed(self.tables.pop(i)))
        del self.chains[i], self.contents[i]

    @invariant()
    def consistent(self):
        if hasattr(self, "pool"):
            self.pool.check_invariants(self.tables)
            counts = self.pool.counts()
            assert sum(counts.values()) == self.pool.num_blocks
            assert counts["free"] + counts["cached"] == self.pool.num_free


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
