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
from ridgeline.engine.executors import FinishedStep, run_plan
from ridgeline.engine.executors.eager import logits_to_numpy, prepare_torch
from ridgeline.engine.scheduler import StepPlan
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import bind_decoder, decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.torch_ops import TorchBatch, TorchOps, paged_attention, store_kv

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
    """Owns the torch weights and pages, and the compiled step."""

    def __init__(self, config: EngineConfig, model: LoadedModel, layout: CacheLayout) -> None:
        assert config.dtype and config.device and config.attention and config.max_model_len
        prepare_torch(config)
        self._device = config.device
        self._layout = layout
        self._max_num_seqs = config.scheduler.max_num_seqs
        self._max_num_blocks = -(-config.max_model_len // layout.block_size)
        self.ops = TorchOps(
            layout,
            dtype=config.dtype,
            device=config.device,
            attention=config.attention,
            store_kv=_store_kv,
            paged_attention=_paged_attention,
        )
        weights = bind_decoder(self.ops, model.config, model.weights, max_model_len=config.max_model_len)

        def step(batch: TorchBatch) -> torch.Tensor:
            return decoder(self.ops, model.config, weights, batch)

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
        num_logits = len(batch.logit_rows)
        tensors = TorchBatch.from_host(self._padded(batch), self._device)
        for tensor in (tensors.token_ids, tensors.positions, tensors.slot_mapping, tensors.logit_rows):
            torch._dynamo.mark_dynamic(tensor, 0)
        graphs, started = _num_graphs(), time.perf_counter()
        logits = self._step(tensors)
        if _num_graphs() > graphs:
            self._compile_s += time.perf_counter() - started
        return logits_to_numpy(logits)[:num_logits]

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

    def close(self) -> None:
        pass
