"""Keys that an int8 KV cache holds well: all channels brought to about the same size, at no cost at run time.

The cache has one scale for each token and head, so that the largest channel of a key decides how finely the
others are rounded, and keys have channels that are many times larger than others (Liu et al. 2024, KIVI,
arXiv:2402.02750). Dividing channel j of all keys by s_j and multiplying channel j of the queries by it leaves
every score as it was; Lin et al. 2024, QServe, arXiv:2405.04532, call it SmoothAttention. RoPE turns channels
i and i + R/2 into each other, so that such a pair shares one scale, and the scales commute with the rotation:
they are folded into the rows of q_proj and k_proj, or into the gains of QK-norm, which all heads share.

Letters: H query heads, G KV heads, D head_dim, R rotated features of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ridgeline.compress.passes import InputStats, float_values
from ridgeline.config import ModelConfig
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

KEY_STEPS = 8


def key_scales(q: torch.Tensor, k: torch.Tensor, *, rotary_dim: int) -> torch.Tensor:
    """Scales [D] for queries [n, D] and keys [m, D] of one head, before their rotation; geometric mean 1.

    s = size^alpha where the size of a pair is its largest norm over the tokens, which no rotation changes.
    Alpha is searched for the least expected error of a score: sum_j q_j² s_j² times the mean over tokens of
    the squared step of a rounded key, max_j (|k_j| / s_j)².
    """
    pair_k, pair_q = _pair_squares(k, rotary_dim), _pair_squares(q, rotary_dim)
    size = pair_k.amax(0).sqrt()
    alive = size > 0
    size = torch.where(alive, size, 1.0)
    weight = pair_q.mean(0)
    best, least = torch.ones_like(size), torch.inf
    for step in range(KEY_STEPS + 1):
        scales = size.pow(step / KEY_STEPS)
        scales = torch.where(alive, scales / scales[alive].log().mean().exp(), 1.0) if alive.any() else size
        error = float((weight * scales.square()).sum() * (pair_k / scales.square()).amax(1).mean())
        if error < least:
            best, least = scales, error
    return best


def _pair_squares(x: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Squares [n, D]; of rotated features the sum over their pair."""
    squares, half = x.square(), rotary_dim // 2
    pairs = squares[:, :half] + squares[:, half:rotary_dim]
    return torch.cat((pairs, pairs, squares[:, rotary_dim:]), 1)


def smooth_keys(
    config: ModelConfig, prefix: str, inputs: InputStats, weights: Mapping[str, Weight]
) -> dict[str, Weight]:
    """q_proj and k_proj of the layer `prefix` with their biases, or its QK-norms, with scales folded in.

    What changes comes back in float32, by name, for `inputs` like those of calibration.
    """
    names = {kind: f"{prefix}.{kind}_proj" for kind in "qk"}
    values = {kind: float_values(weights[name]) for kind, name in names.items()}
    biases = {
        kind: float_values(weights[f"{name}.bias"]) if f"{name}.bias" in weights else None
        for kind, name in names.items()
    }
    heads = {}
    for kind, matrix in values.items():
        bias = biases[kind]
        out = inputs.sample @ matrix.T + (0.0 if bias is None else bias)
        heads[kind] = out.view(len(out), -1, config.head_dim)
    index = int(prefix.rpartition(".")[2])
    local = config.rope_local if index in config.window_layers else None
    rotary_dim = (local or config.rope).rotary_dim
    if f"{prefix}.q_norm" in weights:
        return _into_norms(config, prefix, heads, weights, rotary_dim=rotary_dim)
    scales = torch.stack(
        [
            key_scales(
                heads["q"][:, g * config.num_q_per_kv : (g + 1) * config.num_q_per_kv].flatten(0, 1),
                heads["k"][:, g],
                rotary_dim=rotary_dim,
            )
            for g in range(config.num_kv_heads)
        ]
    )
    factors = {"q": scales.repeat_interleave(config.num_q_per_kv, 0).flatten(), "k": 1.0 / scales.flatten()}
    changed = {}
    for kind, name in names.items():
        changed[name] = _with_values(weights[name], values[kind] * factors[kind][:, None])
        bias = biases[kind]
        if bias is not None:
            changed[f"{name}.bias"] = _with_values(weights[f"{name}.bias"], bias * factors[kind])
    return changed


def _into_norms(
    config: ModelConfig,
    prefix: str,
    heads: Mapping[str, torch.Tensor],
    weights: Mapping[str, Weight],
    *,
    rotary_dim: int,
) -> dict[str, Weight]:
    gains, normed = {}, {}
    for kind, x in heads.items():
        gains[kind] = float_values(weights[f"{prefix}.{kind}_norm"]) + config.norm_offset
        root = (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
        normed[kind] = (x * root * gains[kind]).flatten(0, 1)
    scales = key_scales(normed["q"], normed["k"], rotary_dim=rotary_dim)
    factors = {"q": scales, "k": 1.0 / scales}
    return {
        f"{prefix}.{kind}_norm": _with_values(
            weights[f"{prefix}.{kind}_norm"], gains[kind] * factors[kind] - config.norm_offset
        )
        for kind in "qk"
    }


def _with_values(weight: Weight, values: torch.Tensor) -> Weight:
    return Weight(
        weight.name, FORMATS["F32"], weight.shape, {"data": values.contiguous().numpy()}, weight.activation
    )
