"""Packed weights: where a cache file is trusted, and that it changes nothing."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ridgeline.library import load_library
from ridgeline.ops.packing import Packer, cache_name
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.gguf_blocks import quantize
from ridgeline.quant.weight import Weight


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    made = []
    for name, format, shape in (("a", "Q4_0", (37, 96)), ("n", "F32", (96,)), ("b", "F64", (5, 7))):
        values = rng.standard_normal(shape)
        data = values if format == "F64" else quantize(values.astype(np.float32), FORMATS[format])
        made.append(Weight(name, FORMATS[format], shape, {"data": data}))
    return made


def pack(weights, cache=None):
    packed = Packer(load_library()[1], 2).pack(weights, cache)
    return [(p.format, p.rows, p.columns, p.data.tobytes()) for p in packed]


def test_a_cache_file_gives_the_same_bytes(weights, tmp_path):
    path = tmp_path / "deep" / "x.packed"
    plain = pack(weights)
    assert [(f, r, c) for f, r, c, _ in plain] == [(2, 37, 96), (0, 96, 1), (0, 5, 7)]
    assert pack(weights, path) == plain
    assert os.listdir(path.parent) == ["x.packed"]
    stamp = path.stat().st_mtime_ns
    assert pack(weights, path) == plain and path.stat().st_mtime_ns == stamp
    path.write_bytes(path.read_bytes()[:-64])  # cut short: written again
    assert pack(weights, path) == plain


def test_the_name_follows_files_formats_and_details(weights, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"1")
    name = cache_name(weights, [file], None)
    assert name == cache_name(weights, [file], None)
    assert name != cache_name(weights, [file], "float16") != cache_name(weights[:1], [file], "float16")
    file.write_bytes(b"12")
    assert name != cache_name(weights, [file], None)
