"""Group formats: arrays to rows of blocks and back, and what a weight of them says."""

from __future__ import annotations

import numpy as np
import pytest

from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import group_format
from ridgeline.quant.groups import Groups, pack_bits, pack_groups, unpack_bits, unpack_groups
from ridgeline.quant.weight import Weight


def random_groups(bits: int, *, symmetric: bool, n: int = 33, k: int = 192, group_size: int = 64) -> Groups:
    rng = np.random.default_rng(bits)
    q = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    scales = rng.random((n, k // group_size)).astype(np.float16).astype(np.float32)
    zeros = None if symmetric else rng.integers(0, 1 << bits, scales.shape, dtype=np.uint8)
    return Groups(bits, q, scales, zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_blocks_hold_what_the_arrays_say(bits: int, symmetric: bool) -> None:
    groups = random_groups(bits, symmetric=symmetric)
    fmt, rows = pack_groups(groups)
    back = unpack_groups(rows, fmt)
    np.testing.assert_array_equal(back.q, groups.q)
    np.testing.assert_array_equal(back.scales, groups.scales)
    assert fmt.num_bytes(groups.q.shape) == rows.nbytes
    zeros = np.full(groups.scales.shape, 1 << (bits - 1)) if groups.zeros is None else groups.zeros
    expected = [
        [groups.scales[n, k // 64] * (float(groups.q[n, k]) - zeros[n, k // 64]) for k in range(192)]
        for n in range(33)
    ]
    weight = Weight("w", fmt, (33, 192), {"data": rows})
    np.testing.assert_allclose(weight.dequantize(), np.array(expected, np.float32), rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_are_packed_lowest_first_without_gaps(bits: int) -> None:
    q = np.random.default_rng(0).integers(0, 1 << bits, (3, 40), dtype=np.uint8)
    packed = pack_bits(q, bits)
    numbers = [int.from_bytes(row.tobytes(), "little") for row in packed]
    assert [[n >> (bits * i) & ((1 << bits) - 1) for i in range(40)] for n in numbers] == q.tolist()
    np.testing.assert_array_equal(unpack_bits(packed, bits), q)


def test_scales_are_float16_only_where_that_loses_nothing() -> None:
    groups = random_groups(4, symmetric=False)
    assert pack_groups(groups)[0].name == "INT4_G64"
    odd = Groups(4, groups.q, groups.scales * np.float32(1.0001), groups.zeros)
    fmt, rows = pack_groups(odd)
    assert fmt.name == "INT4_G64_F32"
    np.testing.assert_array_equal(unpack_groups(rows, fmt).scales, odd.scales)


def test_a_stored_order_is_undone_by_dequantize() -> None:
    groups = random_groups(4, symmetric=False)
    fmt, rows = pack_groups(groups)
    order = np.random.default_rng(1).permutation(192).astype(np.int32)
    weight = Weight("w", fmt, (33, 192), {"data": rows, "order": order})
    expected = np.empty((33, 192), np.float32)
    expected[:, order] = groups.dequantize()
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_what_does_not_fit_is_refused() -> None:
    groups = random_groups(4, symmetric=False)
    with pytest.raises(CheckpointError, match="do not fit together"):
        pack_groups(Groups(4, groups.q, groups.scales[:5], None))
    with pytest.raises(CheckpointError, match="differ in shape"):
        pack_groups(Groups(4, groups.q, groups.scales, groups.scales[:, :1].astype(np.uint8)))
    with pytest.raises(CheckpointError, match="code of 15 does not fit 3 bits"):
        pack_groups(Groups(3, groups.q, groups.scales, None))
    with pytest.raises(CheckpointError, match="not finite"):
        pack_groups(Groups(4, groups.q, groups.scales * np.float32(1e6), None), "F16")
    with pytest.raises(CheckpointError, match="expected bits of 2, 3, 4, 8"):
        group_format(5, 64, symmetric=True)
