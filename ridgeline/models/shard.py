"""Which part of a model each rank has: heads, MLP columns and vocabulary by tp rank, layers by stage.

Matrices that read the whole activation (q, k, v, gate, up, the head) are split by rows, those that read what
the former made (o, down) by columns, so that a layer needs two sums over the ranks (Shoeybi et al. 2019,
Megatron-LM, arXiv:1909.08053). KV heads stay whole: where they cannot be shared out evenly, a rank with fewer
of them gets more of the MLP, and where there are more ranks than KV heads, several ranks hold the same one
and share its query heads. Cuts are made from shapes and formats alone, so every process finds the same ones,
and where quantized blocks end: rows and blocks are taken as they are, nothing is unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ridgeline.config import LoadConfig, ModelConfig, ParallelConfig
from ridgeline.distributed.groups import RankPlace, Shard
from ridgeline.errors import ConfigError
from ridgeline.models.load import LoadedModel, describe_model, load_model
from ridgeline.ops.packing import mapping_of
from ridgeline.quant.formats import Array
from ridgeline.quant.weight import Weight

VOCABULARY_ROWS = 16
"""A cut of the vocabulary is at a multiple of these: what the kernels take at a time."""
MLP_COLUMNS = 32
"""The same of the MLP, where it is wide enough."""
HEAD_SHARE = 0.5
"""What a byte of the head costs beside one of a layer: it has no attention, and of a prompt one row only.
Measured on SmolLM2: 0.6 in decode, 0 in prefill, 0.37 over W3, where a layer more or less changes nothing."""
QUERY_ROWS = ("q_proj", "q_proj.bias")
KV_ROWS = ("k_proj", "k_proj.bias", "v_proj", "v_proj.bias")
MLP_ROWS = ("gate_proj", "up_proj")
VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where a model is cut. The same for all layers, so that one config describes a rank."""

    config: ModelConfig
    heads: tuple[range, ...]
    """Query heads of each tp rank"""
    kv_heads: tuple[range, ...]
    mlp_columns: tuple[range, ...]
    vocabulary: tuple[range, ...]
    layers: tuple[range, ...]
    """of each stage"""

    def config_of(self, place: RankPlace) -> ModelConfig:
        """The config of a rank: its own heads, columns, rows and layers, which count from 0."""
        layers = self.layers[place.pp_rank]
        return replace(
            self.config,
            num_layers=len(layers),
            num_heads=len(self.heads[place.tp_rank]),
            num_kv_heads=len(self.kv_heads[place.tp_rank]),
            intermediate_size=len(self.mlp_columns[place.tp_rank]),
            vocab_size=len(self.vocabulary[place.tp_rank]),
            window_layers=tuple(i - layers.start for i in self.config.window_layers if i in layers),
        )

    def configs(self) -> list[ModelConfig]:
        """Of all ranks, by their number."""
        parallel = ParallelConfig(tp_size=len(self.heads), pp_size=len(self.layers))
        return [self.config_of(RankPlace.of(rank, parallel)) for rank in range(parallel.world_size)]

    def shard_of(self, place: RankPlace) -> Shard:
        rows = self.vocabulary[place.tp_rank]
        return Shard(place, self.layers[place.pp_rank], rows.start, self.config.vocab_size)


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank takes of a model's weights, under their names in the whole model."""

    cuts: Cuts
    place: RankPlace

    def wants(self, name: str) -> bool:
        index, kind = _place_of(name)
        if index is not None:
            has_bias = kind != "o_proj.bias" or self.place.tp_rank == 0  # it is added to the sum, once
            return has_bias and index in self.cuts.layers[self.place.pp_rank]
        if kind == "embed_tokens" and self.cuts.config.tie_embeddings:
            return self.place.is_first_stage or self.place.is_last_stage
        return self.place.is_first_stage if kind == "embed_tokens" else self.place.is_last_stage

    def cut(self, weight: Weight) -> Weight:
        """This rank's rows or columns. Raises ConfigError where the weight cannot be cut."""
        tp_rank, head_dim = self.place.tp_rank, self.cuts.config.head_dim
        if self.place.tp_size == 1:
            return weight
        kind = _place_of(weight.name)[1]
        if kind in QUERY_ROWS:
            return cut_rows(weight, _times(self.cuts.heads[tp_rank], head_dim))
        if kind in KV_ROWS:
            return cut_rows(weight, _times(self.cuts.kv_heads[tp_rank], head_dim))
        if kind in MLP_ROWS:
            return cut_rows(weight, self.cuts.mlp_columns[tp_rank])
        if kind in VOCABULARY:
            return cut_rows(weight, self.cuts.vocabulary[tp_rank])
        if kind == "o_proj":
            return cut_columns(weight, _times(self.cuts.heads[tp_rank], head_dim))
        if kind == "down_proj":
            return cut_columns(weight, self.cuts.mlp_columns[tp_rank])
        return weight

    def finish(self, model: LoadedModel) -> LoadedModel:
        """The shard of a model whose weights are this part already."""
        first = self.cuts.layers[self.place.pp_rank].start
        renamed: dict[int, Weight] = {}
        weights: dict[str, Weight] = {}
        for name, weight in model.weights.items():
            index, kind = _place_of(name)
            if index is None and not self._holds(name):
                continue  # of a tied pair that another stage uses
            own_name = name if index is None else f"layers.{index - first}.{kind}"
            weights[own_name] = renamed.setdefault(id(weight), replace(weight, name=own_name))
        config, shard = self.cuts.config_of(self.place), self.cuts.shard_of(self.place)
        # Numbers of the whole model, such as RoPE's, are those of the model that was loaded.
        config = replace(config, rope=model.config.rope, rope_local=model.config.rope_local)
        return LoadedModel(config, weights, model.checkpoint, shard)

    def _holds(self, name: str) -> bool:
        return self.place.is_first_stage if name == "embed_tokens" else self.place.is_last_stage


def plan_cuts(model: LoadedModel, parallel: ParallelConfig) -> Cuts:
    """Decide from shapes and formats. Raises ConfigError for a model that cannot be cut so."""
    config, tp_size = model.config, parallel.tp_size
    if tp_size > 1:
        _check_inputs(model)
    heads, kv_heads = _cut_heads(model, tp_size)
    vocabulary = _even(config.vocab_size, tp_size, unit=VOCABULARY_ROWS)
    if vocabulary is None:
        raise ConfigError(
            f"tp_size={tp_size}: a vocabulary of {config.vocab_size} tokens has fewer than {tp_size} times "
            f"{VOCABULARY_ROWS} rows; use a smaller tp_size"
        )
    return Cuts(
        config=config,
        heads=heads,
        kv_heads=kv_heads,
        mlp_columns=_cut_mlp(model, heads),
        vocabulary=vocabulary,
        layers=_cut_layers(model, parallel.pp_size),
    )


def shard_model(model: LoadedModel, place: RankPlace) -> LoadedModel:
    """The part of a rank. Raises ConfigError for a model that cannot be cut so."""
    part = Part(plan_cuts(model, ParallelConfig(tp_size=place.tp_size, pp_size=place.pp_size)), place)
    cut: dict[int, Weight] = {}
    weights = {}
    for name, weight in model.weights.items():
        if part.wants(name):
            if id(weight) not in cut:
                cut[id(weight)] = part.cut(weight)
            weights[name] = cut[id(weight)]
    return part.finish(replace(model, weights=weights))


def load_shard(path: str | Path, load: LoadConfig | None, place: RankPlace) -> LoadedModel:
    """`shard_model` of a file, of which only this part is read: other layers are never touched.

    Raises ConfigError, and what `load_model` raises.
    """
    parallel = ParallelConfig(tp_size=place.tp_size, pp_size=place.pp_size)
    part = Part(plan_cuts(describe_model(path, load), parallel), place)
    return part.finish(load_model(path, load, part=part))


def cut_rows(weight: Weight, rows: range) -> Weight:
    """Some rows; a view where the weight is a mapped file."""
    if len(rows) == weight.shape[0]:
        return weight
    return _with_data(weight, (len(rows), *weight.shape[1:]), (slice(rows.start, rows.stop),))


def cut_columns(weight: Weight, columns: range) -> Weight:
    """Some columns of a matrix, whole quant blocks; a view where the weight is a mapped file."""
    if len(columns) == weight.shape[1]:
        return weight
    if "order" in weight.buffers:
        raise ConfigError(
            f"{weight.name}: its columns are stored in the order of act-order (desc_act), so that no rank's "
            "columns are together; use pp_size instead of tp_size, or a checkpoint without act-order"
        )
    fmt = weight.format
    assert columns.start % fmt.block_size == 0 and columns.stop % fmt.block_size == 0, (weight.name, columns)
    # Blocks are bytes; floats are elements of their own type.
    each = 1 if fmt.block_size == 1 else fmt.block_bytes
    begin, end = (n // fmt.block_size * each for n in (columns.start, columns.stop))
    return _with_data(weight, (weight.shape[0], len(columns)), (slice(None), slice(begin, end)))


def _with_data(weight: Weight, shape: tuple[int, ...], where: tuple[slice, ...]) -> Weight:
    """A described weight has no data; one in memory is copied, so that the rest of it can go."""
    buffers = dict(weight.buffers)
    if "data" in buffers:
        data: Array = buffers["data"][where]
        buffers["data"] = data if mapping_of(data) is not None else np.array(data)
    return replace(weight, shape=shape, buffers=buffers)


def _place_of(name: str) -> tuple[int | None, str]:
    """Layer and kind of a weight: "layers.3.q_proj.bias" -> (3, "q_proj.bias"), "norm" -> (None, "norm")."""
    if not name.startswith("layers."):
        return None, name
    _, index, kind = name.split(".", 2)
    return int(index), kind


def _times(numbers: range, factor: int) -> range:
    return range(numbers.start * factor, numbers.stop * factor)


def _even(total: int, parts: int, *, unit: int = 1, first: int = 0) -> tuple[range, ...] | None:
    """Cut range(first, first + total) into parts that differ by at most a unit, the larger first.

    None where there are fewer units than parts. The last unit may be incomplete.
    """
    num_units = -(-total // unit)
    if num_units < parts:
        return None
    each, more = divmod(num_units, parts)
    sizes = [unit * (each + (i < more)) for i in range(parts)]
    return _in_turn(sizes, total, first=first)


def _in_turn(sizes: Sequence[int], total: int, *, first: int = 0) -> tuple[range, ...]:
    ends = [first + min(sum(sizes[: i + 1]), total) for i in range(len(sizes))]
    return tuple(range(start, end) for start, end in zip([first, *ends[:-1]], ends, strict=True))


def _matrices(model: LoadedModel, kind: str) -> list[Weight]:
    return [model.weights[f"layers.{i}.{kind}"] for i in range(model.config.num_layers)]


def _check_inputs(model: LoadedModel) -> None:
    """A linear whose input is split cannot round it by a scale of the whole token."""
    for kind in ("o_proj", "down_proj"):
        for weight in _matrices(model, kind):
            if weight.activation is not None and weight.activation.static_scale is None:
                raise ConfigError(
                    f"{weight.name} rounds its input with one scale a token (W8A8), and with tp_size > 1 no "
                    "rank sees the whole token; use pp_size instead, static scales, or a recipe with float "
                    "activations"
                )


def _cut_heads(model: LoadedModel, tp_size: int) -> tuple[tuple[range, ...], tuple[range, ...]]:
    """Query heads and KV heads of each tp rank, cut where the blocks of every o_proj end."""
    config = model.config
    num_q_per_kv = config.num_q_per_kv
    if tp_size > config.num_heads:
        raise ConfigError(
            f"tp_size={tp_size}: the model has {config.num_heads} query heads, and each rank needs one; use "
            f"tp_size up to {config.num_heads}, or pp_size"
        )
    block = math.lcm(*(w.format.block_size for w in _matrices(model, "o_proj"))) if tp_size > 1 else 1
    heads_a_block = block // math.gcd(block, config.head_dim)
    if tp_size <= config.num_kv_heads:
        unit = heads_a_block // math.gcd(heads_a_block, num_q_per_kv)
        kv_heads = _even(config.num_kv_heads, tp_size, unit=unit)
        if kv_heads is not None:
            return tuple(_times(r, num_q_per_kv) for r in kv_heads), kv_heads
    else:
        sharers = _even(tp_size, config.num_kv_heads)
        assert sharers is not None
        cuts = [
            _even(num_q_per_kv, len(ranks), unit=heads_a_block, first=g * num_q_per_kv)
            for g, ranks in enumerate(sharers)
        ]
        starts_whole = num_q_per_kv % heads_a_block == 0 or config.num_kv_heads == 1
        if starts_whole and all(cut is not None for cut in cuts):
            heads = tuple(r for cut in cuts for r in cut or ())
            return heads, tuple(range(g, g + 1) for g, ranks in enumerate(sharers) for _ in ranks)
    names = " and ".join(sorted({w.format.name for w in _matrices(model, "o_proj")}))
    raise ConfigError(
        f"tp_size={tp_size}: o_proj in {names} can be cut at multiples of {block} columns only, and its "
        f"{config.num_heads} heads of {config.head_dim} columns, {num_q_per_kv} to a KV head, cannot be "
        "shared out so; use another tp_size, pp_size, or a format with smaller blocks (Q8_0, Q4_0)"
    )


def _cut_mlp(model: LoadedModel, heads: Sequence[range]) -> tuple[range, ...]:
    """MLP columns of each tp rank, as even as can be; what is left over goes to those with the fewest heads.

    Ranks wait for each other after attention and again after the MLP: a rank with fewer heads gains nothing
    from more columns.
    """
    config, tp_size = model.config, len(heads)
    size = config.intermediate_size
    block = math.lcm(*(w.format.block_size for w in _matrices(model, "down_proj"))) if tp_size > 1 else 1
    wide = math.lcm(block, MLP_COLUMNS)
    unit = wide if size >= tp_size * wide else block
    if size < tp_size * unit:
        names = " and ".join(sorted({w.format.name for w in _matrices(model, "down_proj")}))
        raise ConfigError(
            f"tp_size={tp_size}: the {size} columns of down_proj in {names} are fewer than {tp_size} times "
            f"its {unit} columns that belong together; use a smaller tp_size, pp_size, or a format with "
            "smaller blocks (Q8_0, Q4_0)"
        )

    each, more = divmod(-(-size // unit), tp_size)
    by_heads = sorted(range(tp_size), key=lambda rank: len(heads[rank]))
    sizes = [unit * (each + (rank in by_heads[:more])) for rank in range(tp_size)]
    return _in_turn(sizes, size)


def _cut_layers(model: LoadedModel, pp_size: int) -> tuple[range, ...]:
    """Layers of each stage, so that the slowest stage has as little to do as can be.

    Work is counted as bytes of weights: all of each layer, HEAD_SHARE of the head in the last stage, and none
    of the embedding, of which a step reads a few rows.
    """
    num_layers = model.config.num_layers
    if pp_size > num_layers:
        raise ConfigError(
            f"pp_size={pp_size}: the model has {num_layers} layers, and each stage needs one; use pp_size up "
            f"to {num_layers}, or tp_size"
        )
    sizes = [0] * num_layers
    for name, weight in model.weights.items():
        index, _ = _place_of(name)
        if index is not None:
            sizes[index] += weight.num_bytes
    sums = np.concatenate(([0], np.cumsum(sizes)))
    head = int(HEAD_SHARE * model.weights["lm_head"].num_bytes)

    def cost(start: int, end: int) -> int:
        return int(sums[end] - sums[start]) + head * (end == num_layers)

    # best[end]: slowest stage, sum of squares, and starts of the stages that hold the layers before end.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {
        end: (cost(0, end), cost(0, end) ** 2, (0,)) for end in range(1, num_layers + 1)
    }
    for stage in range(1, pp_size):
        best = {
            end: min(
                (max(best[s][0], cost(s, end)), best[s][1] + cost(s, end) ** 2, (*best[s][2], s))
                for s in range(stage, end)
            )
            for end in range(stage + 1, num_layers + 1)
        }
    starts = best[num_layers][2]
    return tuple(range(s, e) for s, e in zip(starts, (*starts[1:], num_layers), strict=True))
