"""FlashAttention's algorithm in plain torch: tiles of keys and an online softmax, O(N) memory.

Dao et al. 2022, arXiv:2205.14135, Algorithm 1, after Milakov & Gimelshein 2018 (arXiv:1805.02867): a running
maximum m and a running sum l per query; when a tile raises the maximum, what has been summed so far is
scaled by exp(m_old - m_new). Tiles that no query of the tile may see are skipped.

Letters: G KV heads, Q query heads per KV head, M queries, N keys, D head_dim.
"""

from __future__ import annotations

import torch

QUERY_TILE = 64
KEY_TILE = 256


def visible(
    query_positions: torch.Tensor, key_positions: torch.Tensor, *, window: int | None, num_sinks: int
) -> torch.Tensor:
    """Which keys each query may see: causal, inside its window or a sink -> bool [M, N]."""
    query = query_positions[:, None]
    mask = key_positions <= query
    if window is not None:
        mask &= (key_positions > query - window) | (key_positions < num_sinks)
    return mask


def flash_attention(
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
    """q [G, Q, M, D], k and v [G, N, D], positions [M] and [N] ascending -> [G, Q, M, D].

    Accumulates in float32 (float64 for float64 inputs).
    """
    accumulate = torch.promote_types(q.dtype, torch.float32)
    output = torch.empty((*q.shape[:3], v.shape[-1]), dtype=q.dtype, device=q.device)
    for start in range(0, q.shape[2], QUERY_TILE):
        tile = slice(start, start + QUERY_TILE)
        q_tile = q[:, :, tile].to(accumulate) * scale
        positions = query_positions[tile]
        row_max = torch.full((*q_tile.shape[:3], 1), -torch.inf, dtype=accumulate, device=q.device)
        row_sum = torch.zeros_like(row_max)
        summed = torch.zeros((*q_tile.shape[:3], v.shape[-1]), dtype=accumulate, device=q.device)
        for key_start in range(0, k.shape[1], KEY_TILE):
            keys = slice(key_start, key_start + KEY_TILE)
            mask = visible(positions, key_positions[keys], window=window, num_sinks=num_sinks)
            if not bool(mask.any()):
                continue
            scores = q_tile @ k[:, None, keys].to(accumulate).transpose(-1, -2)
            scores = scores.masked_fill(~mask, -torch.inf)
            new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
            # A row that has seen no key yet keeps -inf; exp(-inf - -inf) would be NaN.
            safe_max = new_max.masked_fill(new_max == -torch.inf, 0.0)
            weights = torch.exp(scores - safe_max)
            decay = torch.exp(row_max - safe_max)
            row_sum = row_sum * decay + weights.sum(-1, keepdim=True)
            summed = summed * decay + weights @ v[:, None, keys].to(accumulate)
            row_max = new_max
        output[:, :, tile] = (summed / row_sum).to(q.dtype)
    return output
