"""The ops in plain torch: the definition of correct, and the path to CUDA.

Nothing here is clever. Weights are dequantized once to the compute dtype; norms and softmax accumulate in
float32 at least; K and V live in pages [blocks, block_size, G, D] and attention reads them through the block
table, one sequence after the other. `paged_attention` and `store_kv` are module functions on tensors so that
the compiled executor can wrap the very same code in opaque custom ops.

Letters: T tokens, S sequences, L logit rows, H query heads, G KV heads, D head_dim, N x K a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ridgeline.config import Activation, AttentionImpl
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.exchange import Exchange
from ridgeline.ops.flash import flash_attention, visible
from ridgeline.quant.weight import ActivationQuant, Weight

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


@dataclass(frozen=True, slots=True)
class TorchBatch:
    """`ForwardBatch` as tensors. Lengths stay on the CPU, where the loop over sequences reads them."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor

    @classmethod
    def from_host(cls, batch: ForwardBatch, device: str) -> TorchBatch:
        def tensor(array: npt.NDArray[np.int32], *, on: str = device) -> torch.Tensor:
            return torch.from_numpy(array).to(device=on, dtype=torch.int64)

        return cls(
            token_ids=tensor(batch.token_ids),
            positions=tensor(batch.positions),
            slot_mapping=tensor(batch.slot_mapping),
            query_start_loc=tensor(batch.query_start_loc, on="cpu"),
            seq_lens=tensor(batch.seq_lens, on="cpu"),
            block_tables=tensor(batch.block_tables),
            logit_rows=tensor(batch.logit_rows),
        )


@dataclass(frozen=True, slots=True)
class Pages:
    """K and V of one layer: [blocks, block_size, G, D]; int8 pages with scales [blocks, block_size, G]."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor | None
    v_scales: torch.Tensor | None

    @classmethod
    def allocate(cls, layout: CacheLayout, device: str) -> Pages:
        """Uninitialised memory: attention never reads a slot that was not written."""
        shape = (layout.num_blocks, layout.block_size, layout.num_kv_heads, layout.head_dim)

        def pages() -> torch.Tensor:
            return torch.empty(shape, dtype=TORCH_DTYPES[layout.dtype], device=device)

        def scales() -> torch.Tensor | None:
            return (
                torch.empty(shape[:3], dtype=torch.float32, device=device) if layout.dtype == "int8" else None
            )

        return cls(pages(), pages(), scales(), scales())


def _write(pages: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, x: torch.Tensor) -> None:
    """Put rows x [n, G, D] at slots; int8: symmetric, one scale max|x|/127 per token and head."""
    if scales is not None:
        amax = x.abs().amax(-1).to(scales.dtype)
        scale = amax / 127.0
        scales.view(-1, scales.shape[-1])[slots] = scale
        inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
        x = torch.round(x.to(scales.dtype) * inverse[..., None]).clamp(-127, 127)
    pages.view(-1, *pages.shape[2:])[slots] = x.to(pages.dtype)


def _read(
    pages: torch.Tensor, scales: torch.Tensor | None, slots: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows at slots as [G, n, D] in the compute dtype."""
    x = pages.view(-1, *pages.shape[2:])[slots].to(dtype)
    if scales is not None:
        x = x * scales.view(-1, scales.shape[-1])[slots][..., None].to(dtype)
    return x.transpose(0, 1)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> None:
    """Write k, v [T, G*D] into the pages at slot_mapping [T]; slot -1 is padding and skipped."""
    stored = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[stored]
    num_kv_heads, head_dim = k_pages.shape[2:]
    _write(k_pages, k_scales, slots, k[stored].view(-1, num_kv_heads, head_dim))
    _write(v_pages, v_scales, slots, v[stored].view(-1, num_kv_heads, head_dim))


def paged_attention(
    q: torch.Tensor,
    q_sinks: torch.Tensor | None,
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    scale: float,
    window: int | None,
    num_sinks: int,
    implementation: str,
) -> torch.Tensor:
    """Attention of `Ops.attention` over the pages, sequence by sequence: q [T, H*D] -> [T, H*D]."""
    block_size, num_kv_heads, head_dim = k_pages.shape[1:]
    num_q_per_kv = q.shape[1] // (num_kv_heads * head_dim)
    output = torch.zeros_like(q)
    starts: list[int] = query_start_loc.tolist()
    for s, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[s], starts[s + 1])
        if seq_len == 0 or rows.start == rows.stop:
            continue
        query_positions = positions[rows]
        keys = _visible_keys(int(query_positions[0]), seq_len, window, num_sinks, q.device)
        slots = block_tables[s, keys // block_size] * block_size + keys % block_size
        k = _read(k_pages, k_scales, slots, q.dtype)
        v = _read(v_pages, v_scales, slots, q.dtype)

        def grouped(x: torch.Tensor) -> torch.Tensor:
            return x[rows].view(-1, num_kv_heads, num_q_per_kv, head_dim).permute(1, 2, 0, 3)  # noqa: B023

        q_rows = grouped(q)
        if q_sinks is not None:
            # Two rotations of the query in one product: [q, q_sinks] · [k, 0] = q·k, · [0, k] = q_sinks·k.
            q_rows = torch.cat((q_rows, grouped(q_sinks)), -1)
            is_sink = (keys < num_sinks)[:, None]
            k = torch.cat((k.masked_fill(is_sink, 0.0), k.masked_fill(~is_sink, 0.0)), -1)
        attend = ATTENTION[implementation]
        result = attend(q_rows, k, v, query_positions, keys, scale=scale, window=window, num_sinks=num_sinks)
        output[rows] = result.permute(2, 0, 1, 3).reshape(rows.stop - rows.start, -1)
    return output


def _visible_keys(
    first_query: int, seq_len: int, window: int | None, num_sinks: int, device: torch.device
) -> torch.Tensor:
    """Positions that any query of the sequence may see. Blocks behind the window may be gone: not read."""
    first = 0 if window is None else max(0, first_query - window + 1)
    keys = torch.arange(first, seq_len, device=device)
    if first > 0 and num_sinks > 0:
        keys = torch.cat((torch.arange(min(num_sinks, first), device=device), keys))
    return keys


def naive_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    num_sinks: int,
) -> torch.Tensor:
    """All scores at once: q [G, Q, M, D], k and v [G, N, D] -> [G, Q, M, D]; O(M·N) memory."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k[:, None].transpose(-1, -2)).to(accumulate) * scale
    mask = visible(query_positions, key_positions, window=window, num_sinks=num_sinks)
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1).to(q.dtype) @ v[:, None]


def sdpa_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    num_sinks: int,
) -> torch.Tensor:
    """torch's fused kernel, on the same shapes."""
    num_queries, num_keys = q.shape[2], k.shape[1]
    mask = None
    is_causal = window is None and num_queries == num_keys and num_queries > 1
    if not is_causal and (num_queries > 1 or window is not None):
        mask = visible(query_positions, key_positions, window=window, num_sinks=num_sinks)
    # [G, Q, M, D] with G as the batch: the query heads of a group share the expanded, uncopied K and V.
    shared = (q.shape[0], q.shape[1], num_keys)
    return F.scaled_dot_product_attention(
        q,
        k[:, None].expand(*shared, k.shape[-1]),
        v[:, None].expand(*shared, v.shape[-1]),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
    )


ATTENTION: dict[str, Callable[..., torch.Tensor]] = {
    "naive": naive_attention,
    "flash": flash_attention,
    "sdpa": sdpa_attention,
}


@dataclass(frozen=True, slots=True)
class RoundedInput:
    """The handle of a weight whose linear rounds its input: values [N, K]."""

    values: torch.Tensor
    activation: ActivationQuant


TorchHandle = torch.Tensor | RoundedInput


def _values(handle: TorchHandle) -> torch.Tensor:
    return handle if isinstance(handle, torch.Tensor) else handle.values


def round_input(
    x: torch.Tensor, activation: ActivationQuant
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x [rows, K] -> (integers q, their scale d [rows, 1], outliers or None): x is about d * q + outliers.

    d is max|x| / 127 of the row without its outliers, or given. Dettmers et al. 2022, arXiv:2208.07339, whose
    outlier columns are those of the whole batch; here each token has its own.
    """
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    outliers = None
    if activation.outlier_threshold is not None:
        is_outlier = precise.abs() >= activation.outlier_threshold
        outliers = torch.where(is_outlier, x, 0.0)
        precise = torch.where(is_outlier, 0.0, precise)
    if activation.static_scale is not None:
        d = torch.full_like(precise[:, :1], activation.static_scale)
        inverse = 1.0 / d
    else:
        most = precise.abs().amax(-1, keepdim=True)
        d = most / 127.0
        inverse = torch.where(most > 127.0 / torch.finfo(torch.float32).max, 127.0 / most, 0.0)
    return torch.round(precise * inverse).clamp(-127, 127), d, outliers


class TorchOps:
    """Interpreter of `Ops` that computes. Owns the bound weights and the pages of every layer."""

    def __init__(
        self,
        layout: CacheLayout,
        *,
        dtype: str,
        device: str,
        attention: AttentionImpl,
        store_kv: Callable[..., None] = store_kv,
        paged_attention: Callable[..., torch.Tensor] = paged_attention,
        exchange: Exchange | None = None,
    ) -> None:
        """`store_kv` and `paged_attention`: the functions above, or custom ops around them.

        `exchange`: with the other ranks, if there are any.
        """
        self.dtype = TORCH_DTYPES[dtype]
        self.device = device
        self.attention_impl = attention
        self.pages = [Pages.allocate(layout, device) for _ in range(layout.num_layers)]
        self._store_kv = store_kv
        self._paged_attention = paged_attention
        self._exchange = exchange
        self._bound: dict[Weight, TorchHandle] = {}

    def bind(self, weight: Weight) -> TorchHandle:
        if weight not in self._bound:
            values = torch.from_numpy(weight.dequantize()).to(device=self.device, dtype=self.dtype)
            self._bound[weight] = RoundedInput(values, weight.activation) if weight.activation else values
        return self._bound[weight]

    def bind_constant(self, values: npt.NDArray[np.float64]) -> TorchHandle:
        precision = torch.promote_types(self.dtype, torch.float32)
        return torch.from_numpy(values).to(device=self.device, dtype=precision)

    def embed(self, table: TorchHandle, batch: TorchBatch, *, first_row: int = 0) -> torch.Tensor:
        values = _values(table)
        if self._exchange is None:
            return F.embedding(batch.token_ids, values)
        rows = batch.token_ids - first_row
        is_here = (rows >= 0) & (rows < len(values))
        return F.embedding(rows.clamp(0, len(values) - 1), values).masked_fill(~is_here[:, None], 0.0)

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * torch.tensor(factor, dtype=x.dtype, device=x.device)

    def rms_norm(self, x: torch.Tensor, weight: TorchHandle, *, eps: float, offset: float) -> torch.Tensor:
        weight = _values(weight)
        accumulate = torch.promote_types(x.dtype, torch.float32)
        groups = x.to(accumulate).view(len(x), x.shape[1] // len(weight), len(weight))
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
        return (normed * (weight.to(accumulate) + offset)).to(x.dtype).flatten(-2)

    def linear(self, x: torch.Tensor, weight: TorchHandle, bias: TorchHandle | None = None) -> torch.Tensor:
        added = None if bias is None else _values(bias)
        if isinstance(weight, torch.Tensor):
            return F.linear(x, weight, added)
        q, d, outliers = round_input(x, weight.activation)
        # In float16 d * q would be rounded once more, q alone is exact.
        y = F.linear(q.to(x.dtype), weight.values) * d.to(x.dtype)
        if outliers is not None:
            y = y + F.linear(outliers, weight.values)
        return y if added is None else y + added

    def rope_cos_sin(
        self,
        inv_freq: TorchHandle,
        batch: TorchBatch,
        *,
        attention_factor: float,
        max_position: int | None = None,
    ) -> torch.Tensor:
        inv_freq = _values(inv_freq)
        positions = batch.positions if max_position is None else batch.positions.clamp(max=max_position)
        angles = positions.to(inv_freq.dtype)[:, None] * inv_freq
        return (torch.cat((angles.cos(), angles.sin()), -1) * attention_factor).to(self.dtype)

    def rope(self, x: torch.Tensor, cos_sin: torch.Tensor, *, head_dim: int) -> torch.Tensor:
        heads = x.view(len(x), x.shape[1] // head_dim, head_dim)
        cos, sin = cos_sin[:, None].chunk(2, -1)
        half = cos.shape[-1]
        first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        rotated = (first * cos - second * sin, second * cos + first * sin, rest)
        return torch.cat(rotated, -1).flatten(-2)

    def store_kv(self, layer: int, k: torch.Tensor, v: torch.Tensor, batch: TorchBatch) -> None:
        pages = self.pages[layer]
        self._store_kv(k, v, batch.slot_mapping, pages.k, pages.v, pages.k_scales, pages.v_scales)

    def attention(
        self,
        layer: int,
        q: torch.Tensor,
        batch: TorchBatch,
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        q_sinks: torch.Tensor | None = None,
        num_sinks: int = 0,
    ) -> torch.Tensor:
        pages = self.pages[layer]
        assert pages.k.shape[-1] == head_dim
        return self._paged_attention(
            q,
            q_sinks,
            batch.positions,
            batch.query_start_loc,
            batch.seq_lens,
            batch.block_tables,
            pages.k,
            pages.v,
            pages.k_scales,
            pages.v_scales,
            scale,
            window,
            num_sinks,
            self.attention_impl,
        )

    def glu(self, gate: torch.Tensor, up: torch.Tensor, *, activation: Activation) -> torch.Tensor:
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def gather_logit_rows(self, x: torch.Tensor, batch: TorchBatch) -> torch.Tensor:
        return x[batch.logit_rows]

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self._others.all_reduce(x)

    def all_gather(self, x: torch.Tensor, *, columns: int) -> torch.Tensor:
        return self._others.all_gather(x, columns=columns)

    def send(self, x: torch.Tensor) -> None:
        self._others.send(x)

    def receive(self, batch: TorchBatch, *, columns: int) -> torch.Tensor:
        return self._others.receive(len(batch.token_ids), columns, self.dtype)

    @property
    def _others(self) -> Exchange:
        assert self._exchange is not None, "a whole model exchanges nothing"
        return self._exchange
