"""torch.compile over the whole step: one graph, no breaks, no recompiles after the first call.

The decoder is the same; attention and the KV write become opaque custom ops, because their loops depend on
the batch. Everything that is not the number of tokens or of logit rows is padded to one fixed shape, and
these two are padded to at least 2: Dynamo specialises sizes 0 and 1, and would compile again for them. What
was compiled, and how long it took, is in `compile_stats`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.config import EngineConfig
from ridgeline.distributed.collectives import Collectives
from ridgeline.distributed.groups import ALONE
from ridgeline.engine.executors import FinishedStep, run_plan
from ridgeline.engine.executors.eager import bind_torch, logits_of, prepare_torch
from ridgeline.engine.scheduler import StepPlan
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.exchange import Exchange, exchange_over
from ridgeline.ops.torch_ops import TorchBatch, paged_attention, store_kv

MIN_ROWS = 2


@torch.library.custom_op("ridgeline::store_kv", mutates_args=("k_pages", "v_pages", "k_scales", "v_scales"))
def _store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> None:
    store_kv(k, v, slot_mapping, k_pages, v_pages, k_scales, v_scales)


@torch.library.custom_op("ridgeline::paged_attention", mutates_args=())
def _paged_attention(
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
    pages = (k_pages, v_pages, k_scales, v_scales)
    lengths = (positions, query_start_loc, seq_lens, block_tables)
    return paged_attention(q, q_sinks, *lengths, *pages, scale, window, num_sinks, implementation)


@_paged_attention.register_fake
def _(q: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(q)


_EXCHANGES: list[Exchange] = []
"""Custom ops take numbers, no objects: an executor's ranks are known by their place in this list."""


@torch.library.custom_op("ridgeline::all_reduce", mutates_args=())
def _all_reduce(x: torch.Tensor, number: int) -> torch.Tensor:
    return _EXCHANGES[number].all_reduce(x)


@_all_reduce.register_fake
def _(x: torch.Tensor, number: int) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("ridgeline::all_gather", mutates_args=())
def _all_gather(x: torch.Tensor, number: int, columns: int) -> torch.Tensor:
    return _EXCHANGES[number].all_gather(x, columns=columns)


@_all_gather.register_fake
def _(x: torch.Tensor, number: int, columns: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], columns)


class _GraphExchange:
    """An `Exchange` inside of a graph. What comes from and goes to other stages is its input and its output,
    so that sending and receiving stay outside."""

    def __init__(self, exchange: Exchange) -> None:
        self._number = len(_EXCHANGES)
        _EXCHANGES.append(exchange)
        self.received: torch.Tensor | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = _all_reduce(x, self._number)
        return total

    def all_gather(self, x: torch.Tensor, *, columns: int) -> torch.Tensor:
        whole: torch.Tensor = _all_gather(x, self._number, columns)
        return whole

    def send(self, x: torch.Tensor) -> None:
        pass

    def receive(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        assert self.received is not None
        return self.received


def _num_graphs() -> int:
    """Graphs that Dynamo has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _num_breaks() -> int:
    return int(sum(torch._dynamo.utils.counters["graph_break"].values()))


@dataclass(frozen=True, slots=True)
class CompileStats:
    """What torch.compile did so far, from Dynamo's own counters."""

    num_graphs: int
    num_graph_breaks: int
    num_recompiles: int
    compile_s: float
    """Seconds of the calls in which a graph was made."""


class CompiledExecutor:
    """Owns the torch weights and pages of a model or of a rank's part, and the compiled step."""

    reducer = None

    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel,
        layout: CacheLayout,
        collectives: Collectives | Exchange | None = None,
    ) -> None:
        assert config.device and config.max_model_len
        prepare_torch(config)
        self._device = config.device
        self._layout = layout
        self._shard, self._hidden_size = model.shard, model.config.hidden_size
        self._exchange = exchange_over(collectives, config.device)
        in_graph = None if self._exchange is None else _GraphExchange(self._exchange)
        self._max_num_seqs = config.scheduler.max_num_seqs
        self._max_num_blocks = -(-config.max_model_len // layout.block_size)
        self.ops, weights = bind_torch(
            config,
            model,
            layout,
            store_kv=_store_kv,
            paged_attention=_paged_attention,
            exchange=in_graph,
        )

        def step(batch: TorchBatch, received: torch.Tensor | None) -> torch.Tensor:
            if in_graph is not None:
                in_graph.received = received
            return decoder(self.ops, model.config, weights, batch, model.shard)

        self._graphs_before, self._breaks_before = _num_graphs(), _num_breaks()
        # dynamic=True would make the integers of the config symbolic too, and torch 2.13 then answers
        # `index in config.window_layers` wrongly; the two sizes that vary are marked in `forward`.
        self._step = torch.compile(step, fullgraph=True)
        self._compile_s = 0.0

    def compile_stats(self) -> CompileStats:
        """Graphs, breaks, recompiles and seconds since this executor was made."""
        num_graphs = _num_graphs() - self._graphs_before
        return CompileStats(
            num_graphs=num_graphs,
            num_graph_breaks=_num_breaks() - self._breaks_before,
            num_recompiles=max(num_graphs - 1, 0),
            compile_s=self._compile_s,
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> npt.NDArray[np.floating]:
        tensors = TorchBatch.from_host(self._padded(batch), self._device)
        for tensor in (tensors.token_ids, tensors.positions, tensors.slot_mapping, tensors.logit_rows):
            torch._dynamo.mark_dynamic(tensor, 0)
        place = ALONE if self._shard is None else self._shard.place
        received = None
        if self._exchange is not None and not place.is_first_stage:
            received = self._exchange.receive(len(tensors.token_ids), self._hidden_size, self.ops.dtype)
            torch._dynamo.mark_dynamic(received, 0)
        graphs, started = _num_graphs(), time.perf_counter()
        output = self._step(tensors, received)
        if _num_graphs() > graphs:
            self._compile_s += time.perf_counter() - started
        if self._exchange is not None and not place.is_last_stage:
            self._exchange.send(output)
        return logits_of(output, batch, self._shard)

    def _padded(self, batch: ForwardBatch) -> ForwardBatch:
        """Fixed sizes for the tables, at least MIN_ROWS for tokens and logit rows.

        Added tokens belong to no sequence: their attention is zero and their K and V go nowhere.
        """
        extra = max(0, MIN_ROWS - len(batch.token_ids))
        num_seqs, width = batch.block_tables.shape
        tables = np.full((self._max_num_seqs, self._max_num_blocks), -1, np.int32)
        tables[:num_seqs, :width] = batch.block_tables

        def pad(array: npt.NDArray[np.int32], length: int, value: int) -> npt.NDArray[np.int32]:
            return np.concatenate((array, np.full(length - len(array), value, np.int32)))

        num_tokens = len(batch.token_ids) + extra
        return replace(
            batch,
            token_ids=pad(batch.token_ids, num_tokens, 0),
            positions=pad(batch.positions, num_tokens, 0),
            slot_mapping=pad(batch.slot_mapping, num_tokens, -1),
            query_start_loc=pad(
                batch.query_start_loc, self._max_num_seqs + 1, int(batch.query_start_loc[-1])
            ),
            seq_lens=pad(batch.seq_lens, self._max_num_seqs, 0),
            block_tables=tables,
            logit_rows=pad(batch.logit_rows, max(MIN_ROWS, len(batch.logit_rows)), 0),
        )

    def submit(self, plan: StepPlan) -> FinishedStep:
        return run_plan(self, plan, block_size=self._layout.block_size)

    def restart(self) -> None:
        raise AssertionError("an executor without ranks loses none")

    def close(self) -> None:
        pass
