"""The decoder: every supported model, written once against `ops`, importing no tensor library.

A transformer decoder of the Llama kind (Touvron et al. 2023, arXiv:2302.13971) with the features that
`ModelConfig` names: grouped-query attention, QK-norm, norms after as well as before each block, sliding
windows with their own RoPE, attention sinks, scaled embeddings. No branch asks for an architecture.

A rank of a parallel engine runs the same function over its `Shard`. Its heads and its MLP columns add up to
the whole where their outputs are summed over the tp ranks, twice a layer (Shoeybi et al. 2019, Megatron-LM,
arXiv:1909.08053); the vocabulary is split by rows; a stage begins with what the one before it sends.

Letters: T tokens, L logit rows, C hidden, F intermediate, V vocabulary, H query and G KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic

from ridgeline.config import ModelConfig, RopeConfig
from ridgeline.distributed.groups import ALONE, RankPlace, Shard
from ridgeline.models.rope import rope_frequencies
from ridgeline.ops.interface import Batch, Handle, Ops, Tensor
from ridgeline.ops.program import Program
from ridgeline.ops.recorder import Recorder
from ridgeline.quant.weight import Weight


@dataclass(frozen=True, slots=True)
class Rotation(Generic[Handle]):
    """Frequencies of one kind of layer: inv_freq [R/2], and the factor on cos and sin."""

    inv_freq: Handle
    attention_factor: float


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[Handle]):
    """Handles of one layer, by canonical name; None where the architecture has no such weight."""

    input_norm: Handle
    q_proj: Handle
    k_proj: Handle
    v_proj: Handle
    o_proj: Handle
    mlp_norm: Handle
    gate_proj: Handle
    up_proj: Handle
    down_proj: Handle
    q_bias: Handle | None
    k_bias: Handle | None
    v_bias: Handle | None
    o_bias: Handle | None
    q_norm: Handle | None
    k_norm: Handle | None
    post_attn_norm: Handle | None
    post_mlp_norm: Handle | None


@dataclass(frozen=True, slots=True)
class DecoderWeights(Generic[Handle]):
    """All handles of a model, and its rotations: what `decoder` needs besides the step.

    None: a weight that belongs to another stage.
    """

    embed_tokens: Handle | None
    layers: tuple[LayerWeights[Handle], ...]
    norm: Handle | None
    lm_head: Handle | None
    rotation: Rotation[Handle]
    rotation_local: Rotation[Handle]
    """Of the windowed layers."""


def bind_decoder(
    ops: Ops[Tensor, Handle, Batch],
    config: ModelConfig,
    weights: Mapping[str, Weight],
    *,
    max_model_len: int,
    shard: Shard | None = None,
) -> DecoderWeights[Handle]:
    """Hand every weight (by canonical name) to `ops` and fix the rotations.

    `config` and `weights` are those of the shard, where there is one. Length-dependent RoPE is decided here,
    from max_model_len, so that tokens never depend on the batch.
    """

    def bind(name: str) -> Handle:
        return ops.bind(weights[name])

    def bind_if_there(name: str) -> Handle | None:
        return ops.bind(weights[name]) if name in weights else None

    def rotation(rope: RopeConfig) -> Rotation[Handle]:
        inv_freq, attention_factor = rope_frequencies(
            rope, max_position=config.max_position, max_model_len=max_model_len
        )
        return Rotation(ops.bind_constant(inv_freq), attention_factor)

    place = _place(shard)

    layers = tuple(
        LayerWeights(
            input_norm=bind(f"layers.{i}.input_norm"),
            q_proj=bind(f"layers.{i}.q_proj"),
            k_proj=bind(f"layers.{i}.k_proj"),
            v_proj=bind(f"layers.{i}.v_proj"),
            o_proj=bind(f"layers.{i}.o_proj"),
            mlp_norm=bind(f"layers.{i}.mlp_norm"),
            gate_proj=bind(f"layers.{i}.gate_proj"),
            up_proj=bind(f"layers.{i}.up_proj"),
            down_proj=bind(f"layers.{i}.down_proj"),
            q_bias=bind_if_there(f"layers.{i}.q_proj.bias"),
            k_bias=bind_if_there(f"layers.{i}.k_proj.bias"),
            v_bias=bind_if_there(f"layers.{i}.v_proj.bias"),
            o_bias=bind_if_there(f"layers.{i}.o_proj.bias"),
            q_norm=bind_if_there(f"layers.{i}.q_norm"),
            k_norm=bind_if_there(f"layers.{i}.k_norm"),
            post_attn_norm=bind_if_there(f"layers.{i}.post_attn_norm"),
            post_mlp_norm=bind_if_there(f"layers.{i}.post_mlp_norm"),
        )
        for i in range(config.num_layers)
    )
    return DecoderWeights(
        embed_tokens=bind("embed_tokens") if place.is_first_stage else None,
        layers=layers,
        norm=bind("norm") if place.is_last_stage else None,
        lm_head=bind("lm_head") if place.is_last_stage else None,
        rotation=rotation(config.rope),
        rotation_local=rotation(config.rope_local or config.rope),
    )


def decoder(
    ops: Ops[Tensor, Handle, Batch],
    config: ModelConfig,
    weights: DecoderWeights[Handle],
    batch: Batch,
    shard: Shard | None = None,
) -> Tensor:
    """One step: token ids of `batch` -> logits [L, V] of its logit rows. K and V go to the cache.

    A stage that is not the last sends its output x [T, C], and returns it.
    """
    place = _place(shard)
    x = _stage_input(ops, config, weights, batch, shard)
    angles = _rope_angles(ops, config, weights, batch)
    for index, layer in enumerate(weights.layers):
        residual = x
        x = ops.rms_norm(x, layer.input_norm, eps=config.norm_eps, offset=config.norm_offset)
        x = _sum_over_ranks(ops, place, _attention(ops, config, layer, x, angles, batch, index=index))
        if layer.post_attn_norm is not None:
            x = ops.rms_norm(x, layer.post_attn_norm, eps=config.norm_eps, offset=config.norm_offset)
        x = ops.add(residual, x)

        residual = x
        x = ops.rms_norm(x, layer.mlp_norm, eps=config.norm_eps, offset=config.norm_offset)
        x = ops.glu(
            ops.linear(x, layer.gate_proj), ops.linear(x, layer.up_proj), activation=config.activation
        )
        x = _sum_over_ranks(ops, place, ops.linear(x, layer.down_proj))
        if layer.post_mlp_norm is not None:
            x = ops.rms_norm(x, layer.post_mlp_norm, eps=config.norm_eps, offset=config.norm_offset)
        x = ops.add(residual, x)

    if weights.norm is None or weights.lm_head is None:
        ops.send(x)
        return x
    x = ops.gather_logit_rows(x, batch)
    x = ops.rms_norm(x, weights.norm, eps=config.norm_eps, offset=config.norm_offset)
    x = ops.linear(x, weights.lm_head)
    return x if shard is None or place.tp_size == 1 else ops.all_gather(x, columns=shard.vocab_size)


def _place(shard: Shard | None) -> RankPlace:
    return ALONE if shard is None else shard.place


def _sum_over_ranks(ops: Ops[Tensor, Handle, Batch], place: RankPlace, x: Tensor) -> Tensor:
    return x if place.tp_size == 1 else ops.all_reduce(x)


def _stage_input(
    ops: Ops[Tensor, Handle, Batch],
    config: ModelConfig,
    weights: DecoderWeights[Handle],
    batch: Batch,
    shard: Shard | None,
) -> Tensor:
    """Embedded tokens [T, C], each from the rank that has its row; or what the stage before sends."""
    if weights.embed_tokens is None:
        return ops.receive(batch, columns=config.hidden_size)
    x = ops.embed(weights.embed_tokens, batch, first_row=0 if shard is None else shard.first_vocab_row)
    if config.embed_scale != 1.0:
        x = ops.scale(x, config.embed_scale)
    return _sum_over_ranks(ops, _place(shard), x)


@dataclass(frozen=True, slots=True)
class _Angles(Generic[Tensor]):
    """cos and sin of the step's positions: of full layers, of windowed ones, and towards the sinks."""

    full: Tensor | None
    local: Tensor | None
    sinks: Tensor | None


def _rope_angles(
    ops: Ops[Tensor, Handle, Batch], config: ModelConfig, weights: DecoderWeights[Handle], batch: Batch
) -> _Angles[Tensor]:
    """The angles that this model's layers need, each computed once per step.

    With sinks, a query sees the first num_sinks keys and its window. Counted inside the cache it sits at
    num_sinks + window - 1 once the text is longer than that (Xiao et al. 2023, arXiv:2309.17453). RoPE
    depends on distances only, so rotating the query a second time is all it takes: no key is ever rotated
    again.
    """

    def angles(rotation: Rotation[Handle], max_position: int | None = None) -> Tensor:
        return ops.rope_cos_sin(
            rotation.inv_freq, batch, attention_factor=rotation.attention_factor, max_position=max_position
        )

    has_full = len(config.window_layers) < config.num_layers
    has_local = bool(config.window_layers)
    same = config.rope_local is None
    full = angles(weights.rotation) if has_full or same else None
    local = (full if same else angles(weights.rotation_local)) if has_local else None
    sinks = None
    if has_local and config.num_sinks and config.sliding_window is not None:
        sinks = angles(weights.rotation_local, config.num_sinks + config.sliding_window - 1)
    return _Angles(full, local, sinks)


def _attention(
    ops: Ops[Tensor, Handle, Batch],
    config: ModelConfig,
    layer: LayerWeights[Handle],
    x: Tensor,
    angles: _Angles[Tensor],
    batch: Batch,
    *,
    index: int,
) -> Tensor:
    """Attention block without its norms: x [T, C] -> [T, C]; stores K and V of the step."""
    windowed = index in config.window_layers
    cos_sin = angles.local if windowed else angles.full
    assert cos_sin is not None
    q = ops.linear(x, layer.q_proj, layer.q_bias)
    k = ops.linear(x, layer.k_proj, layer.k_bias)
    v = ops.linear(x, layer.v_proj, layer.v_bias)
    if layer.q_norm is not None and layer.k_norm is not None:
        q = ops.rms_norm(q, layer.q_norm, eps=config.norm_eps, offset=config.norm_offset)
        k = ops.rms_norm(k, layer.k_norm, eps=config.norm_eps, offset=config.norm_offset)

    q_sinks = None
    if windowed and angles.sinks is not None:
        q_sinks = ops.rope(q, angles.sinks, head_dim=config.head_dim)
    q = ops.rope(q, cos_sin, head_dim=config.head_dim)
    k = ops.rope(k, cos_sin, head_dim=config.head_dim)

    ops.store_kv(index, k, v, batch)
    x = ops.attention(
        index,
        q,
        batch,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5 if config.attn_scale is None else config.attn_scale,
        window=config.sliding_window if windowed else None,
        q_sinks=q_sinks,
        num_sinks=config.num_sinks if windowed else 0,
    )
    return ops.linear(x, layer.o_proj, layer.o_bias)


def record_decoder(
    config: ModelConfig, weights: Mapping[str, Weight], *, max_model_len: int, shard: Shard | None = None
) -> Program:
    """The decoder of this model, or of this part of it, as a Program, by running it once with symbols."""
    recorder = Recorder()
    handles = bind_decoder(recorder, config, weights, max_model_len=max_model_len, shard=shard)
    return recorder.program(decoder(recorder, config, handles, None, shard))
