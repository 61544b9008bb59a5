"""Every attention, in torch and in C++, against a dense float64 oracle on ragged, shuffled, poisoned pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ridgeline.kvcache.layout import CacheLayout
from ridgeline.library import ISAS
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.recorder import Recorder
from ridgeline.ops.torch_ops import TorchBatch, TorchOps
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

HEAD_DIM = 16


@dataclass
class Row:
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    num_logits: int = 1
    num_padding: int = 0


@dataclass
class Case:
    """Sequences of (tokens already cached, new tokens), with heads, window and sinks."""

    sequences: tuple[tuple[int, int], ...]
    num_heads: int = 6
    num_kv_heads: int = 2
    window: int | None = None
    num_sinks: int = 0
    block_size: int = 32
    num_padding: int = 0


CASES = [
    Case(((0, 1),)),
    Case(((0, 7), (31, 1), (32, 1), (33, 2))),
    Case(((0, 33), (255, 1), (100, 5)), num_heads=9, num_kv_heads=3),
    Case(((0, 70), (90, 1)), num_heads=4, num_kv_heads=4),
    Case(((3, 64), (200, 1)), num_heads=9, num_kv_heads=1),
    Case(((0, 90), (130, 3)), window=7),
    Case(((0, 90), (130, 3)), window=40, block_size=64),
    Case(((0, 90), (130, 3), (5, 1)), window=20, num_sinks=4),
    Case(((0, 120), (64, 1)), window=33, num_sinks=33),
    Case(((0, 5), (10, 1)), num_padding=3),
    Case(((0, 300),)),
    Case(((700, 1),), num_heads=9, num_kv_heads=3),
    Case(((600, 2), (20, 1)), window=300),
]


def make(case: Case, seed: int = 0):
    """Rows with shuffled block tables, and random q, q_sinks, and the k, v of every cached and new token."""
    rng = np.random.default_rng(seed)
    lengths = [start + new for start, new in case.sequences]
    counts = [-(-length // case.block_size) for length in lengths]
    ids = rng.permutation(sum(counts) + 3)
    rows, taken = [], 0
    for (start, new), count in zip(case.sequences, counts, strict=True):
        blocks = tuple(int(i) for i in ids[taken : taken + count])
        rows.append(Row(tuple(range(new)), start, blocks, num_padding=case.num_padding))
        taken += count
    kv = [rng.standard_normal((2, length, case.num_kv_heads * HEAD_DIM)) for length in lengths]
    num_tokens = sum(new + case.num_padding for _, new in case.sequences)
    q, q_sinks = rng.standard_normal((2, num_tokens, case.num_heads * HEAD_DIM))
    return rows, kv, q, q_sinks, sum(counts) + 3


def oracle(case: Case, rows, kv, q, q_sinks) -> np.ndarray:
    """Dense attention in float64, one query and head at a time, straight from the definition."""
    group = case.num_heads // case.num_kv_heads
    out, token = np.zeros_like(q), 0
    for row, (k, v) in zip(rows, kv, strict=True):
        for i in range(len(row.token_ids) + row.num_padding):
            position = row.start + min(i, len(row.token_ids) - 1)
            keys = np.arange(position + 1)
            if case.window is not None:
                keys = keys[(keys > position - case.window) | (keys < case.num_sinks)]
            for head in range(case.num_heads):
                mine = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                theirs = slice(head // group * HEAD_DIM, (head // group + 1) * HEAD_DIM)
                scores = k[keys, theirs] @ q[token, mine] * 0.3
                if case.num_sinks:
                    sinks = keys < case.num_sinks
                    scores[sinks] = k[keys[sinks], theirs] @ q_sinks[token, mine] * 0.3
                weights = np.exp(scores - scores.max())
                out[token, mine] = weights / weights.sum() @ v[keys, theirs]
            token += 1
    return out


def layout(case: Case, num_blocks: int, dtype: str) -> CacheLayout:
    return CacheLayout(
        num_layers=1,
        num_kv_heads=case.num_kv_heads,
        head_dim=HEAD_DIM,
        dtype=dtype,
        block_size=case.block_size,
        num_blocks=num_blocks,
    )


def batches(rows, kv, block_size: int):
    """A batch that stores the tokens already cached, and the batch under test."""
    cached = [Row(tuple(range(r.start)), 0, r.block_ids) for r in rows if r.start]
    new = ForwardBatch.from_rows(rows, block_size=block_size)
    old = ForwardBatch.from_rows(cached, block_size=block_size) if cached else None
    old_kv = [x[:, : r.start] for r, x in zip(rows, kv, strict=True) if r.start]
    new_kv = []
    for row, x in zip(rows, kv, strict=True):
        padding = np.full((2, row.num_padding, x.shape[2]), np.nan)
        new_kv += [x[:, row.start :], padding]
    return old, np.concatenate(old_kv, 1) if old_kv else None, new, np.concatenate(new_kv, 1)


def torch_attention(
    case: Case, dtype: str, impl: str, kv_dtype: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    rows, kv, q, q_sinks, num_blocks = make(case)
    ops = TorchOps(layout(case, num_blocks, kv_dtype or dtype), dtype=dtype, device="cpu", attention=impl)
    for tensor in (ops.pages[0].k, ops.pages[0].v):
        if tensor.dtype != torch.int8:
            tensor.fill_(torch.nan)
    old, old_kv, new, new_kv = batches(rows, kv, case.block_size)
    for batch, values in ((old, old_kv), (new, new_kv)):
        if batch is not None:
            k, v = torch.tensor(values, dtype=ops.dtype)
            ops.store_kv(0, k, v, TorchBatch.from_host(batch, "cpu"))
    out = ops.attention(
        0,
        torch.tensor(q, dtype=ops.dtype),
        TorchBatch.from_host(new, "cpu"),
        head_dim=HEAD_DIM,
        scale=0.3,
        window=case.window,
        q_sinks=torch.tensor(q_sinks, dtype=ops.dtype) if case.num_sinks else None,
        num_sinks=case.num_sinks,
    )
    return out.double().numpy(), oracle(case, rows, kv, q, q_sinks)


@pytest.mark.parametrize("impl", ["naive", "flash", "sdpa"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_equals_the_definition_in_float64(case, impl):
    out, expected = torch_attention(case, "float64", impl)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", ["flash", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_low_precision_errs_at_most_twice_as_much_as_naive(impl, dtype):
    for case in CASES:
        out, expected = torch_attention(case, dtype, impl)
        naive, _ = torch_attention(case, dtype, "naive")
        ulp = np.finfo(np.float32).eps * np.abs(expected).max()
        assert np.abs(out - expected).max() <= 2 * np.abs(naive - expected).max() + 2 * ulp


def test_int8_pages_err_by_a_fraction_of_a_step():
    for case in CASES:
        out, expected = torch_attention(case, "float64", "naive", kv_dtype="int8")
        assert 0 < np.abs(out - expected).max() < 0.1


def poison(pages: np.ndarray, kv_dtype: str) -> None:
    """NaN in every slot: one that is read without having been written shows."""
    if kv_dtype == "int8":
        pages.view(np.float32).fill(np.nan)
    else:
        pages.view(kv_dtype).fill(np.nan)


def native_attention(case: Case, kv_dtype: str, isa: str | None, num_threads: int, impl: str = "flash"):
    """The attention instruction alone, replayed in C++; inputs come from embedding tables of one-hot lookups."""
    rows, kv, q, q_sinks, num_blocks = make(case)
    old, old_kv, new, new_kv = batches(rows, kv, case.block_size)
    steps = [(old, old_kv, np.zeros((0, q.shape[1])), np.zeros((0, q.shape[1])))] if old is not None else []
    steps.append((new, new_kv, q, q_sinks))
    tables, batches_out = [[], [], [], []], []
    for batch, (k, v), q_rows, q_sinks_rows in steps:
        count, base = len(batch.token_ids), sum(len(t) for t in tables[0])
        filler = np.zeros((count - len(q_rows), q.shape[1]))
        for table, values in zip(
            tables,
            (k, v, np.concatenate((q_rows, filler)), np.concatenate((q_sinks_rows, filler))),
            strict=True,
        ):
            table.append(np.nan_to_num(values))
        batches_out.append(
            ForwardBatch(
                (base + np.arange(count)).astype(np.int32),
                *(getattr(batch, n) for n in ("positions", "slot_mapping", "query_start_loc", "seq_lens")),
                batch.block_tables,
                np.arange(count, dtype=np.int32),
                batch.max_query_len,
                batch.max_seq_len,
            )
        )
    recorder = Recorder()

    def table(name, parts):
        values = np.concatenate(parts).astype(np.float32)
        return recorder.embed(
            recorder.bind(Weight(name, FORMATS["F32"], values.shape, {"data": values})), None
        )

    k, v, q_buffer, q_sinks_buffer = (table(n, t) for n, t in zip("kvqs", tables, strict=True))
    recorder.store_kv(0, k, v, None)
    attended = recorder.attention(
        0,
        q_buffer,
        None,
        head_dim=HEAD_DIM,
        scale=0.3,
        window=case.window,
        q_sinks=q_sinks_buffer if case.num_sinks else None,
        num_sinks=case.num_sinks,
    )
    program = recorder.program(recorder.gather_logit_rows(attended, None))
    most = max(len(b.token_ids) for b in batches_out)
    native = NativeProgram(
        program,
        layout(case, num_blocks, kv_dtype),
        max_tokens=most,
        max_logits=1,
        num_threads=num_threads,
        attention=impl,
        isa=isa,
    )
    poison(native.pages, kv_dtype)
    for batch in batches_out:
        out = native.step(batch).copy()
    native.close()
    return out, oracle(case, rows, kv, q, q_sinks)


@pytest.mark.parametrize("impl", ["flash", "naive"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_native_errs_at_most_as_much_as_torch_in_float32(case, isa, impl, available_isas):
    if isa not in available_isas:
        pytest.skip(f"this machine does not run {isa}")
    out, expected = native_attention(case, "float32", isa, 2, impl)
    reference, _ = torch_attention(case, "float32", "naive")
    ulp = np.finfo(np.float32).eps * np.abs(expected).max()
    assert np.abs(out - expected).max() <= 2 * np.abs(reference - expected).max() + 4 * ulp


@pytest.mark.parametrize("impl", ["flash", "naive"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kv_dtype", "error"), [("float16", 4e-3), ("int8", 0.1)])
def test_native_pages_round_the_cache_only(kv_dtype, error, isa, impl, available_isas):
    if isa not in available_isas:
        pytest.skip(f"this machine does not run {isa}")
    for case in CASES:
        out, expected = native_attention(case, kv_dtype, isa, 2, impl)
        assert 0 < np.abs(out - expected).max() < error


@pytest.mark.parametrize("impl", ["flash", "naive"])
def test_native_int8_pages_hold_what_torch_pages_hold(impl):
    for case in CASES:
        out, _ = native_attention(case, "int8", None, 2, impl)
        expected, _ = torch_attention(case, "float32", "naive", kv_dtype="int8")
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["flash", "naive"])
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "int8"])
def test_native_bits_do_not_depend_on_threads(kv_dtype, impl):
    for case in CASES:
        one, _ = native_attention(case, kv_dtype, None, 1, impl)
        two, _ = native_attention(case, kv_dtype, None, 2, impl)
        np.testing.assert_array_equal(one, two)


def test_layers_that_follow_each_other_keep_a_block_at_different_places_of_their_pages():
    """Else all layers come to a new huge page in the same step, which then waits for the system (0.2 s seen)."""
    num_layers, num_blocks = 5, 4
    recorder = Recorder()
    values = np.ones((1, HEAD_DIM), np.float32)
    row = recorder.embed(recorder.bind(Weight("w", FORMATS["F32"], values.shape, {"data": values})), None)
    for layer in range(num_layers):
        recorder.store_kv(layer, row, row, None)
    native = NativeProgram(
        recorder.program(recorder.gather_logit_rows(row, None)),
        CacheLayout(
            num_layers=num_layers,
            num_kv_heads=1,
            head_dim=HEAD_DIM,
            dtype="float32",
            block_size=32,
            num_blocks=num_blocks,
        ),
        max_tokens=1,
        max_logits=1,
        num_threads=1,
    )
    native.pages[:] = 0
    native.step(ForwardBatch.from_rows([Row((0,), 0, (2,))], block_size=32))
    written = native.pages.reshape(num_layers, num_blocks, -1).any(axis=2)
    native.close()
    assert written.sum(axis=1).tolist() == [1] * num_layers
    places = written.argmax(axis=1)
    assert (places[1:] != places[:-1]).all() and set(places) == set(range(num_blocks))
