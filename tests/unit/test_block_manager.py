"""Block tables: growth, prefix matches, publication, and memory that stays flat behind a window."""

from __future__ import annotations

import pytest

from ridgeline.kvcache.block_pool import NO_BLOCK, BlockPool
from ridgeline.kvcache.manager import BlockManager
from ridgeline.request import Request
from ridgeline.sampling_params import SamplingParams


def make(num_blocks=8, block_size=4, *, prefix=True, **options):
    return BlockManager(BlockPool(num_blocks, block_size, enable_prefix_caching=prefix), **options)


def request(tokens, name="a", **params):
    return Request(name, list(tokens), SamplingParams(**params), 0.0)


def compute(manager, r, num_tokens):
    """Allocate, as if computed, and publish."""
    assert manager.allocate(r, num_tokens)
    r.num_computed_tokens = num_tokens
    manager.publish(r)
    manager.check_invariants()


def test_a_table_grows_by_what_is_missing_and_no_room_is_a_normal_answer():
    manager = make(3)
    r = request(range(13))
    assert manager.allocate(r, 1) and len(manager.table(r)) == 1
    first = list(manager.table(r))
    assert manager.allocate(r, 4) and manager.table(r) == first
    assert manager.allocate(r, 9) and manager.table(r)[:1] == first
    assert not manager.allocate(r, 13)
    assert len(manager.table(r)) == 3 and manager.pool.num_free == 0
    manager.free(r)
    manager.free(r)
    assert manager.table(r) == [] and manager.pool.num_free == 3
    manager.check_invariants()


@pytest.mark.parametrize(
    ("num_tokens", "num_hit"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12), (20, 12)]
)
def test_hits_are_full_blocks_and_leave_one_token_to_compute(num_tokens, num_hit):
    manager = make()
    compute(manager, request(range(12)), 12)
    other = request(range(num_tokens), "b")
    manager.adopt(other, manager.match_prefix(other))
    assert other.num_computed_tokens == other.num_cached_tokens == num_hit
    stats = manager.pool.stats
    assert (stats.num_queried_tokens, stats.num_hit_tokens) == (num_tokens, num_hit)
    manager.check_invariants()


def test_only_computed_full_blocks_are_published():
    manager = make()
    r = request(range(12))
    assert manager.allocate(r, 12)
    r.num_computed_tokens = 7
    manager.publish(r)
    assert len(manager.match_prefix(request(range(12), "b"))) == 1
    r.num_computed_tokens = 12
    manager.publish(r)
    assert len(manager.match_prefix(request(range(13), "b"))) == 3


def test_output_tokens_are_published_too():
    manager = make()
    r = request(range(6))
    r.output_token_ids += [6, 7, 8]
    compute(manager, r, 8)
    assert len(manager.match_prefix(request(range(9), "b"))) == 2


def test_a_shared_block_is_the_same_block():
    manager = make()
    a, b = request(range(8)), request([*range(8), 99], "b")
    compute(manager, a, 8)
    matched = manager.match_prefix(b)
    assert manager.num_unheld(matched) == 0
    manager.adopt(b, matched)
    assert manager.table(b) == manager.table(a)
    manager.forget(a)
    manager.check_invariants()
    assert manager.pool.num_free == 6
    assert manager.num_unheld(manager.match_prefix(a)) == 0


def test_two_that_compute_the_same_keep_their_own_blocks():
    manager = make()
    a, b = request(range(9)), request(range(9), "b")
    assert manager.allocate(a, 9) and manager.allocate(b, 9)
    for r in (a, b):
        r.num_computed_tokens = 9
        manager.publish(r)
    manager.check_invariants()
    assert not set(manager.table(a)) & set(manager.table(b))
    assert manager.pool.counts() == {"free": 2, "cached": 0, "referenced": 6}
    manager.forget(a)
    assert manager.pool.counts() == {"free": 3, "cached": 2, "referenced": 3}
    compute(manager, b, 9)


def test_a_prefix_outlives_its_tail():
    manager = make(3)
    a = request(range(12))
    compute(manager, a, 12)
    manager.forget(a)
    compute(manager, request([70, 71], "b"), 2)
    assert len(manager.match_prefix(request(range(13), "c"))) == 2


@pytest.mark.parametrize("why", ["prompt_logprobs", "switched off"])
def test_no_hits_where_there_must_be_none(why):
    manager = make(prefix=why != "switched off")
    compute(manager, request(range(8)), 8)
    other = request(range(9), "b", prompt_logprobs=0 if why == "prompt_logprobs" else None)
    assert manager.match_prefix(other) == []
    manager.adopt(other, [])
    assert manager.pool.stats.num_queried_tokens == 0


@pytest.mark.parametrize(("window", "num_sinks"), [(1, 0), (4, 0), (5, 0), (6, 3), (9, 5), (3, 4)])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_memory_stays_flat_behind_a_window(window, num_sinks, prefix, chunk):
    manager = make(30, prefix=prefix, window=window, num_sinks=num_sinks)
    r = request(range(400))
    most = 0
    for start in range(0, 400, chunk):
        end = min(start + chunk, 400)
        assert manager.allocate(r, end)
        table = manager.table(r)
        for position in (*range(min(num_sinks, end)), *range(max(0, start - window + 1), end)):
            assert table[position // 4] != NO_BLOCK, (position, start)
        most = max(most, sum(b != NO_BLOCK for b in table))
        r.num_computed_tokens = end
        manager.publish(r)
        manager.check_invariants()
    assert len(manager.table(r)) == 100
    assert most <= -(-num_sinks // 4) + -(-(window + chunk) // 4) + 1
    assert manager.max_request_tokens(chunk) is None
    manager.forget(r)
    assert manager.pool.num_free == 30
    manager.check_invariants()


def test_the_largest_request():
    assert make(3).max_request_tokens(16) == 12
    assert make(3, window=4).max_request_tokens(16) == 12, "window and chunk together do not fit"
    assert make(6, window=4).max_request_tokens(16) is None
    assert make(6, window=4, num_sinks=1).max_request_tokens(16) == 24


def test_the_same_block_means_the_same_tokens_after_the_same_tokens():
    manager = make()
    a, b = request(range(12)), request([*range(8), 50, 51, 52, 53], "b")
    same = [manager.is_same_block(a, b, index) for index in range(3)]
    assert same == [True, True, False]
    swapped = request([*range(4, 8), *range(4, 8), 1], "c")
    assert not manager.is_same_block(a, swapped, 1)
    assert not manager.is_same_block(request(range(8), "d"), a, 1), "its last token is computed anyway"
