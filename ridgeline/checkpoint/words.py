"""Codes in 32-bit words, as GPTQ, AWQ and compressed-tensors store them: dense, lowest bits first.

With little-endian words this is one stream of bits, the same as in our own blocks (`quant.groups`), so a code
of 3 bits may begin in one word and end in the next. Rows are padded with zero bits to whole words.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ridgeline.quant.formats import Array
from ridgeline.quant.groups import Bytes, pack_bits, unpack_bits

Words = npt.NDArray[np.int32]

WORD_BITS = 32


def num_words(count: int, bits: int) -> int:
    """Words of a row of `count` codes."""
    return -(-count * bits // WORD_BITS)


def pack_words(codes: Bytes, bits: int) -> Words:
    """uint8 [n, count] as int32 [n, num_words(count, bits)]."""
    n, count = codes.shape
    padded = codes if count % WORD_BITS == 0 else np.pad(codes, ((0, 0), (0, -count % WORD_BITS)))
    words = np.ascontiguousarray(pack_bits(padded, bits)).view("<i4").reshape(n, -1)
    return np.ascontiguousarray(words[:, : num_words(count, bits)])


def bytes_of_words(words: Array, bits: int, count: int) -> Bytes:
    """The first `count` codes of every row, still packed, as of `pack_bits`; they must fill whole bytes."""
    stream = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(len(words), -1)
    return stream[:, : count * bits // 8]


def unpack_words(words: Array, bits: int, count: int) -> Bytes:
    """The first `count` codes of every row: the inverse of `pack_words`."""
    n, width = words.shape
    if width % bits and bits == 3:
        words = np.pad(words, ((0, 0), (0, -width % bits)))
    stream = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(n, -1)
    return np.ascontiguousarray(unpack_bits(stream, bits)[:, :count])
