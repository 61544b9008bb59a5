"""GPTQ checkpoints (AutoGPTQ, GPTQModel), versions 1 and 2, read and written.

    qweight int32 [K * bits / 32, N]   codes packed along K
    qzeros  int32 [R, N * bits / 32]   zero points packed along N; version 1 stores z - 1, version 2 z
    scales  float16 [R, N]             w = scale * (q - z)
    g_idx   int32 [K]                  the group of each input feature; act-order if it does not rise

Two traps. Files exist that say version 1 and hold the zero points of version 2; where the config says
symmetric the middle is known, and what the file holds decides. And a zero point of 0 has no z - 1: version 1
writers subtract from the whole word, with a borrow from the next code, so reading adds to the whole word.
Some kernels do it code by code and get other numbers; we write version 2 instead.
Sources: AutoGPTQ qlinear_cuda_old.py, GPTQModel utils/model.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ridgeline.checkpoint.stored import (
    Parts,
    Settings,
    StoredLinear,
    even_groups,
    group_sizes,
    grouped_order,
    stored_scales,
)
from ridgeline.checkpoint.words import WORD_BITS, bytes_of_words, num_words, pack_words, unpack_words
from ridgeline.errors import CheckpointError
from ridgeline.quant.formats import Array
from ridgeline.quant.groups import Bytes, Groups, pack_bits

Version = Literal[1, 2]
FORMATS: dict[str, Version] = {"gptq": 1, "gptq_v2": 2}


@dataclass(frozen=True, slots=True)
class GPTQScheme:
    """What a quantization_config of GPTQ says."""

    bits: int
    group_size: int | None
    symmetric: bool | None
    """None: not said"""
    version: Version
    overrides: tuple[tuple[re.Pattern[str], Settings | None], ...] = ()
    """GPTQModel's `dynamic`: settings of modules that match; None: not quantized"""

    def read(self, parts: Parts) -> StoredLinear | None:
        stated = self._for_module(parts.module)
        if stated is None or ("qweight" not in parts and "weight" in parts):
            return None
        bits, group_size, symmetric = stated
        qweight = parts.array("qweight", ("I32",), (None, None))
        n = qweight.shape[1]
        if "g_idx" in parts:
            g_idx = parts.array("g_idx", ("I32",), (None,))
            k = len(g_idx)
        else:
            k = qweight.shape[0] * WORD_BITS // bits
            g_idx = np.arange(k, dtype=np.int32) // np.int32(group_size or max(k, 1))
        if k == 0 or n == 0:
            raise parts.error("qweight", f"has shape {qweight.shape}: it holds no weights")
        parts.array("qweight", ("I32",), (num_words(k, bits), n))
        num_groups = len(group_sizes(k, group_size))
        scales = parts.scales("scales", (num_groups, n))
        qzeros = parts.array("qzeros", ("I32",), (num_groups, num_words(n, bits)))
        zeros = self._zeros(parts, qzeros, bits, n, symmetric)
        order, sizes = grouped_order(parts, "g_idx", g_idx, num_groups)
        repeats = even_groups(parts, "g_idx", sizes, bits)

        def packed() -> Bytes:
            if order is None:
                return bytes_of_words(qweight.T, bits, k)
            return pack_bits(unpack_words(qweight.T, bits, k)[:, order], bits)

        is_symmetric = bool((zeros == 1 << (bits - 1)).all())
        return StoredLinear(
            shape=(n, k),
            bits=bits,
            scales=np.repeat(scales.T, repeats, axis=1),
            zeros=None if is_symmetric else np.repeat(zeros.T, repeats, axis=1),
            packed=packed,
            order=order,
        )

    def _for_module(self, module: str) -> tuple[int, int | None, bool | None] | None:
        """Bits, group size and symmetry of one module; None if it is not quantized."""
        for pattern, settings in self.overrides:
            if pattern.match(module):
                if settings is None:
                    return None
                bits = settings.bits() if settings.get("bits", None) is not None else self.bits
                has_size = settings.get("group_size", None) is not None
                symmetric = settings.flag("sym") if settings.get("sym", None) is not None else self.symmetric
                return bits, settings.group_size() if has_size else self.group_size, symmetric
        return self.bits, self.group_size, self.symmetric

    def _zeros(self, parts: Parts, qzeros: Array, bits: int, n: int, symmetric: bool | None) -> Bytes:
        """Zero points [R, N]. Where all must be in the middle, what is stored tells the version."""
        middle = 1 << (bits - 1)
        if symmetric:
            stored = unpack_words(qzeros, bits, n)
            if not ((stored == middle).all() or (stored == middle - 1).all()):
                raise parts.error(
                    "qzeros",
                    f"holds {int(stored.min())} to {int(stored.max())}; symmetric {bits}-bit codes have "
                    f"{middle - 1} (version 1) or {middle} (version 2) everywhere",
                )
            return np.full_like(stored, middle)
        return unpack_words(qzeros if self.version == 2 else _add_one(qzeros, bits), bits, n)


def gptq_scheme(settings: Settings) -> GPTQScheme:
    """From quantization_config, or quantize_config.json of older files. Raises CheckpointError."""
    stated = settings.one_of("checkpoint_format", tuple(FORMATS), "gptq")
    if settings.flag("is_marlin_format", False):
        raise settings.wrong("is_marlin_format", "false: kernel-specific layouts are not read")
    dynamic = settings.inner("dynamic")
    return GPTQScheme(
        bits=settings.bits(),
        group_size=settings.group_size(),
        symmetric=None if settings.get("sym", None) is None else settings.flag("sym"),
        version=FORMATS[stated],
        overrides=() if dynamic is None else tuple(_override(key, dynamic) for key in dynamic.values),
    )


def _override(key: str, dynamic: Settings) -> tuple[re.Pattern[str], Settings | None]:
    """An entry of `dynamic`: "-:regex" leaves modules as they are, "+:regex" or "regex" changes settings."""
    sign, _, pattern = key.rpartition(":") if key[:2] in ("-:", "+:") else ("", "", key)
    try:
        compiled = re.compile(key[2:] if sign else pattern)
    except re.error as error:
        raise CheckpointError(f"{dynamic.where}: {key!r:.80} is no regular expression: {error}") from None
    return compiled, None if key.startswith("-:") else dynamic.inner(key)


def _add_one(qzeros: Array, bits: int) -> Array:
    """z from z - 1. Codes of 3 bits cross words, and writers change them one by one."""
    if bits == 3:
        n = qzeros.shape[1] * WORD_BITS // bits
        return pack_words((unpack_words(qzeros, bits, n) + np.uint8(1)) & np.uint8(7), bits)
    ones = np.uint32(sum(1 << shift for shift in range(0, WORD_BITS, bits)))
    words: Array = np.ascontiguousarray(qzeros, "<i4").view("<u4") + ones
    return words.view("<i4")


def fits_gptq(groups: Groups) -> bool:
    """Whether rows and columns fill whole words, which every reader expects."""
    n, k = groups.q.shape
    return not (n * groups.bits % WORD_BITS or k * groups.bits % WORD_BITS)


def gptq_tensors(groups: Groups, order: Array | None, *, version: Version) -> dict[str, Array]:
    """The parts of one linear by suffix, columns back in the order of the input features."""
    g_idx = np.arange(groups.q.shape[1], dtype=np.int32) // np.int32(groups.group_size)
    codes = groups.q
    if order is not None:
        back = np.argsort(order)
        codes, g_idx = codes[:, back], g_idx[back]
    zeros = groups.zeros
    if zeros is None:
        zeros = np.full(groups.scales.shape, 1 << (groups.bits - 1), np.uint8)
    stored = zeros.T if version == 2 else zeros.T - np.uint8(1)
    return {
        "qweight": np.ascontiguousarray(pack_words(codes, groups.bits).T),
        "qzeros": pack_words(np.ascontiguousarray(stored), groups.bits),
        "scales": stored_scales(groups).T,
        "g_idx": g_idx,
    }


def gptq_config(
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    desc_act: bool,
    lm_head: bool,
    version: Version,
    dynamic: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """quantization_config, in the words of GPTQModel."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "bits": bits,
        "group_size": -1 if group_size is None else group_size,
        "desc_act": desc_act,
        "sym": symmetric,
        "lm_head": lm_head,
        "true_sequential": True,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["ridgeline"]},
    }
    return config | ({"dynamic": dict(dynamic)} if dynamic else {})
