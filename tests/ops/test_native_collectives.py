"""Programs of several ranks, replayed in C++ by one thread each, against numpy and against the unfused Program."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

import numpy as np
import pytest

from ridgeline.config import ParallelConfig
from ridgeline.distributed.collectives import SharedMemory, SharedRegion
from ridgeline.distributed.groups import RankPlace
from ridgeline.errors import RankError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.library import ISAS
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.fuse import fuse
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.program import Opcode, Program
from ridgeline.ops.recorder import Recorder
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

LAYOUT = CacheLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_size=32, num_blocks=1)
VOCABULARY, COLUMNS, CUTS = 50, 48, ((0, 16), (16, 48), (48, 50))
"""Rows of the vocabulary on each of three ranks."""
NUM_TOKENS = 37
IDS = np.random.default_rng(5).integers(0, VOCABULARY, NUM_TOKENS).astype(np.int32)
LOGIT_ROWS = np.arange(0, NUM_TOKENS, 5, dtype=np.int32)


def step(logit_rows: np.ndarray = LOGIT_ROWS) -> ForwardBatch:
    one = np.arange(NUM_TOKENS, dtype=np.int32)
    return ForwardBatch(
        *(IDS, one, np.full(NUM_TOKENS, -1, np.int32), np.array([0, NUM_TOKENS], np.int32)),
        *(np.array([0], np.int32), np.zeros((1, 1), np.int32), logit_rows, NUM_TOKENS, 0),
    )


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def f32(name: str, data: np.ndarray) -> Weight:
    return Weight(name, FORMATS["F32"], data.shape, {"data": np.ascontiguousarray(data)})


TABLE, HEAD = values(1, VOCABULARY, COLUMNS), values(2, VOCABULARY, COLUMNS)
PARTS = [values(10 + rank, COLUMNS, COLUMNS) for rank in range(3)]
"""A matrix of each rank, whose products are summed."""


def sharded(rank: int) -> Program:
    """x = scaled embedding; logits = (x + Σ x·Pᵣ) · head, all of it cut over three ranks."""
    r = Recorder()
    begin, end = CUTS[rank]
    x = r.embed(r.bind(f32("table", TABLE[begin:end])), None, first_row=begin)
    x = r.all_reduce(r.scale(x, 3.0))
    y = r.all_reduce(r.linear(x, r.bind(f32("part", PARTS[rank]))))
    x = r.gather_logit_rows(r.add(x, y), None)
    logits = r.linear(x, r.bind(f32("head", HEAD[begin:end])))
    return r.program(r.all_gather(logits, columns=VOCABULARY))


def opened(program: Program, collectives, isa: str | None = None) -> NativeProgram:
    sizes = {"max_tokens": NUM_TOKENS, "max_logits": 4, "num_threads": 1}
    return NativeProgram(program, LAYOUT, isa=isa, collectives=collectives, **sizes)


def on_ranks(function: Callable, parallel: ParallelConfig, region: SharedRegion) -> list:
    """`function(rank, shared)` of every rank in a thread of its own: C calls run side by side."""

    def one(rank: int):
        shared = SharedMemory(region.name, RankPlace.of(rank, parallel))
        try:
            return function(rank, shared)
        finally:
            shared.close()

    with ThreadPoolExecutor(parallel.world_size) as pool:
        return list(pool.map(one, range(parallel.world_size)))


@pytest.fixture
def three():
    parallel = ParallelConfig(tp_size=3)
    region = SharedRegion(parallel)
    yield parallel, region
    region.close()


@pytest.mark.parametrize("isa", ISAS)
def test_a_sharded_program_gives_what_numpy_says_on_all_ranks(isa, three, available_isas):
    if isa not in available_isas:
        pytest.skip(f"this machine does not run {isa}")

    def run(rank: int, shared: SharedMemory) -> tuple[np.ndarray, np.ndarray, dict]:
        plain, fused = opened(sharded(rank), shared, isa), opened(fuse(sharded(rank)), shared, isa)
        out = plain.step(step()).copy(), fused.step(step()).copy(), shared.counters()
        assert fused.step(step(LOGIT_ROWS[:0])).shape == (0, VOCABULARY)
        plain.close()
        fused.close()
        return out

    results = on_ranks(run, *three)
    x = 3.0 * TABLE[IDS].astype(np.float64)
    x = (x + sum(x @ part.T.astype(np.float64) for part in PARTS))[LOGIT_ROWS]
    expected = x @ HEAD.T.astype(np.float64)
    for plain, fused, counters in results:
        np.testing.assert_allclose(plain, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        assert np.array_equal(plain, fused), "fusing changes no bit"
        assert np.array_equal(plain, results[0][0]), "all ranks have the same bits"
        assert counters["all_reduce"][:2] == (4, 4 * 4 * NUM_TOKENS * COLUMNS)
        assert counters["all_gather"][:2] == (2, 2 * 4 * len(LOGIT_ROWS) * VOCABULARY)


def test_fusing_adds_the_residual_in_the_sum_and_scales_in_the_embedding():
    program = fuse(sharded(1))
    opcodes = [i.opcode for i in program.instructions]
    assert Opcode.ADD not in opcodes and Opcode.SCALE not in opcodes
    embed, first, _, second = program.instructions[:4]
    assert embed.attribute("first_row") == 16 and embed.attribute("factor") == 3.0
    assert [len(i.read_buffers) for i in (first, second)] == [1, 2]
    linears = [i for i in program.instructions if i.opcode is Opcode.LINEAR]
    assert all(len(i.read_buffers) == 1 for i in linears), "a residual is added once, not on every rank"
    no_rule = fuse(sharded(1), ())
    assert [i.opcode for i in no_rule.instructions] == [i.opcode for i in sharded(1).instructions]


def stage(number: int) -> Program:
    """Three stages: embedding, a matrix, and a matrix with the head."""
    r = Recorder()
    x = r.receive(None, columns=COLUMNS) if number else r.embed(r.bind(f32("table", TABLE)), None)
    if number:
        x = r.linear(x, r.bind(f32("part", PARTS[number])))
    if number == 2:
        return r.program(r.linear(r.gather_logit_rows(x, None), r.bind(f32("head", HEAD))))
    r.send(x)
    return r.program(x)


def test_stages_hand_on_their_activations():
    parallel = ParallelConfig(pp_size=3)
    region = SharedRegion(parallel)

    def run(number: int, shared: SharedMemory) -> list[np.ndarray]:
        native = opened(fuse(stage(number)), shared)
        out = [native.step(step()).copy() for _ in range(3)]
        native.close()
        return out

    first, second, last = on_ranks(run, parallel, region)
    region.close()
    assert {x.shape for x in (*first, *second)} == {(len(LOGIT_ROWS), 0)}
    x = TABLE[IDS[LOGIT_ROWS]].astype(np.float64)
    expected = reduce(lambda a, w: a @ w.T.astype(np.float64), (PARTS[1], PARTS[2], HEAD), x)
    for logits in last:
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_an_aborted_step_raises_and_the_next_one_too(three):
    parallel, region = three
    shared = SharedMemory(region.name, RankPlace.of(0, parallel))
    native = opened(sharded(0), shared)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(native.step, step())
        with pytest.raises(TimeoutError):
            running.result(0.2)
        region.abort()
        with pytest.raises(RankError, match="told to stop"):
            running.result(1)
    with pytest.raises(RankError, match="told to stop"):
        native.step(step())
    native.close()
    shared.close()


class Alone:
    """What Python callbacks see of rank 2, whose peers bring ones to every sum."""

    def __init__(self) -> None:
        self.fails = False

    def all_reduce(self, x):
        if self.fails:
            raise ConnectionResetError("the link is cut")
        return x + 1

    def all_gather(self, x, *, columns):
        return np.concatenate([np.zeros((len(x), columns - x.shape[1]), np.float32), x], axis=1)

    def send(self, x):
        self.sent = x.copy()

    def receive(self, rows, columns, dtype=np.float32):
        return np.arange(rows * columns, dtype=dtype).reshape(rows, columns)


@pytest.mark.parametrize("rules", [None, ()], ids=["fused", "plain"])
def test_callbacks_into_python(rules):
    alone = Alone()
    native = opened(fuse(sharded(2), rules), alone)
    logits = native.step(step()).copy()
    begin, end = CUTS[2]
    x = 3.0 * np.where((begin <= IDS)[:, None], TABLE[IDS], 0).astype(np.float64) + 1
    x = (x + x @ PARTS[2].T.astype(np.float64) + 1)[LOGIT_ROWS]
    expected = x @ HEAD[begin:end].T.astype(np.float64)
    np.testing.assert_allclose(logits[:, begin:], expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert not logits[:, :begin].any()

    alone.fails = True
    with pytest.raises(RankError, match="exchange with the other ranks failed") as raised:
        native.step(step())
    assert isinstance(raised.value.__cause__, ConnectionResetError)
    native.close()


def test_callbacks_send_and_receive_what_lies_in_the_buffers():
    r = Recorder()
    x = r.receive(None, columns=COLUMNS)
    r.send(r.scale(x, 2.0))
    alone = Alone()
    native = opened(r.program(x), alone)
    native.step(step())
    assert np.array_equal(alone.sent.ravel(), 2.0 * np.arange(NUM_TOKENS * COLUMNS))
    native.close()


def test_a_program_with_collectives_needs_them():
    with pytest.raises(AssertionError, match="needs collectives"):
        opened(sharded(0), None)
