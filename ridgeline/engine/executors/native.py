"""The recorded Program, replayed in C++ with one call per step. Needs no torch."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from ridgeline.config import EngineConfig
from ridgeline.engine.executors import FinishedStep, run_plan
from ridgeline.engine.scheduler import StepPlan
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import record_decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.native import NativeProgram


class NativeExecutor:
    """Owns the Program of one model, its buffers and pages."""

    def __init__(self, config: EngineConfig, model: LoadedModel, layout: CacheLayout) -> None:
        assert config.max_model_len and config.scheduler.max_num_batched_tokens
        self._block_size = layout.block_size
        self.program = record_decoder(model.config, model.weights, max_model_len=config.max_model_len)
        self._native = NativeProgram(
            self.program,
            layout,
            max_tokens=config.scheduler.max_num_batched_tokens,
            max_logits=config.scheduler.max_num_seqs,
            num_threads=config.num_threads or len(os.sched_getaffinity(0)),
        )

    def forward(self, batch: ForwardBatch) -> npt.NDArray[np.floating]:
        return self._native.step(batch)

    def submit(self, plan: StepPlan) -> FinishedStep:
        return run_plan(self, plan, block_size=self._block_size)

    def close(self) -> None:
        self._native.close()
