"""The recorded Program, replayed in C++ with one call per step. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ridgeline.config import DType, EngineConfig
from ridgeline.engine.executors import FinishedStep
from ridgeline.engine.sampler import sample_plan
from ridgeline.engine.scheduler import StepPlan
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import record_decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.fuse import fuse, rules_named
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.program import Program
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight


class NativeExecutor:
    """Owns the Program of one model, its buffers and pages."""

    def __init__(self, config: EngineConfig, model: LoadedModel, layout: CacheLayout) -> None:
        assert config.max_model_len and config.scheduler.max_num_batched_tokens and config.attention
        self._block_size = layout.block_size
        weights = model.weights if config.dtype is None else _stored_as(config.dtype, model.weights)
        self._native = NativeProgram(
            fuse(
                record_decoder(model.config, weights, max_model_len=config.max_model_len),
                rules_named(config.fusion),
            ),
            layout,
            max_tokens=config.scheduler.max_num_batched_tokens,
            max_logits=config.scheduler.max_num_seqs,
            num_threads=config.num_threads or len(os.sched_getaffinity(0)),
            attention=config.attention,
        )

    @property
    def program(self) -> Program:
        """What is replayed: fused, without the values of the weights."""
        return self._native.program

    def forward(self, batch: ForwardBatch) -> npt.NDArray[np.floating]:
        return self._native.step(batch)

    def submit(self, plan: StepPlan) -> FinishedStep:
        batch = ForwardBatch.from_rows(plan.rows, block_size=self._block_size)
        return FinishedStep(sample_plan(self._native.step(batch), plan.rows, self._native))

    def close(self) -> None:
        self._native.close()


def _stored_as(dtype: DType, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Matrices in another float format; a tied one stays one object."""
    format = FORMATS[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]]
    converted = {id(w): w.converted(format) if len(w.shape) > 1 else w for w in weights.values()}
    return {name: converted[id(weight)] for name, weight in weights.items()}
