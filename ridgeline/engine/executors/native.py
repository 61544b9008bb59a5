"""The recorded Program, replayed in C++ with one call per step. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ridgeline.checkpoint.checkpoint import cache_directory
from ridgeline.config import EngineConfig
from ridgeline.distributed.collectives import Collectives
from ridgeline.engine.executors import FinishedStep, run_plan
from ridgeline.engine.sampler import Reducer
from ridgeline.engine.scheduler import StepPlan, largest_plan
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import record_decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.fuse import fuse, rules_named
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.packing import cache_name
from ridgeline.ops.program import Program
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight


class NativeExecutor:
    """Owns the Program of one model, or of one rank's part of it, with its buffers and pages: `native`."""

    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel,
        layout: CacheLayout,
        collectives: Collectives | None = None,
    ) -> None:
        assert config.max_model_len and config.scheduler.max_num_batched_tokens and config.attention
        self._block_size = layout.block_size
        recorded = record_decoder(
            model.config,
            stored_weights(config, model),
            max_model_len=config.max_model_len,
            shard=model.shard,
        )
        self.native = NativeProgram(
            fuse(recorded, rules_named(config.fusion)),
            layout,
            max_tokens=largest_plan(config.scheduler, model.shard.place.pp_size if model.shard else 1),
            max_logits=config.scheduler.max_num_seqs,
            num_threads=config.num_threads or len(os.sched_getaffinity(0)),
            attention=config.attention,
            packed_cache=_cache_file(config, model, recorded) if config.packed_cache else None,
            collectives=collectives,
        )

    @property
    def program(self) -> Program:
        """What is replayed: fused, without the values of the weights."""
        return self.native.program

    @property
    def isa(self) -> str:
        """The instruction set that was chosen."""
        return self.native.isa

    @property
    def reducer(self) -> Reducer:
        return self.native

    def forward(self, batch: ForwardBatch) -> npt.NDArray[np.floating]:
        return self.native.step(batch)

    def submit(self, plan: StepPlan) -> FinishedStep:
        return run_plan(self, plan, block_size=self._block_size)

    def restart(self) -> None:
        raise AssertionError("an executor without ranks loses none")

    def close(self) -> None:
        self.native.close()


def stored_weights(config: EngineConfig, model: LoadedModel) -> Mapping[str, Weight]:
    """Matrices in the float format of `dtype`, where it is given; a tied one stays one object."""
    if config.dtype is None:
        return model.weights
    format = FORMATS[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[config.dtype]]
    converted = {id(w): w.converted(format) if len(w.shape) > 1 else w for w in model.weights.values()}
    return {name: converted[id(weight)] for name, weight in model.weights.items()}


def _cache_file(config: EngineConfig, model: LoadedModel, program: Program) -> Path | None:
    """Where the packed weights of this model with these load options are kept; None without a file."""
    if model.checkpoint is None:
        return None
    path = model.checkpoint.path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    details = (config.dtype, config.load, *([] if model.shard is None else [model.shard]))
    return cache_directory() / "packed" / cache_name(program.weights, files, *details)
