"""What turns a StepPlan into tokens: one interface, one lazy factory per executor.

An executor owns the bound weights and the pages of the cache. `submit` may return before the work is done
(pipeline stages keep several steps in flight); `result` waits. torch is imported only by the executors that
need it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ridgeline.config import EngineConfig, Executor
from ridgeline.engine.sampler import Reducer, sample_plan
from ridgeline.engine.scheduler import StepPlan
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.library import load_library
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch
from ridgeline.request import Sampled

FACTORIES: dict[Executor, str] = {
    "native": "ridgeline.engine.executors.native:NativeExecutor",
    "eager": "ridgeline.engine.executors.eager:EagerExecutor",
    "compiled": "ridgeline.engine.executors.compiled:CompiledExecutor",
}


PARALLEL = "ridgeline.engine.executors.parallel:ParallelExecutor"


class StepHandle(Protocol):
    """A step under way."""

    def result(self) -> Mapping[str, Sampled]:
        """Wait, then what was sampled, by request id."""
        ...


class ModelExecutor(Protocol):
    """Runs plans. One thread submits; results are collected in the order of submission."""

    @property
    def reducer(self) -> Reducer | None:
        """Faster reductions over logits than numpy's, where it has them."""
        ...

    def submit(self, plan: StepPlan) -> StepHandle: ...

    def forward(self, batch: ForwardBatch) -> npt.NDArray[np.floating]:
        """Logits [L, V] of one batch; float32, or float64 where the executor computes in it."""
        ...

    def restart(self) -> None:
        """Begin anew with empty caches after a RankError, which only executors with ranks raise."""
        ...

    def close(self) -> None:
        """Give back threads and memory. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """Handle of an executor that computes before it returns."""

    sampled: Mapping[str, Sampled]

    def result(self) -> Mapping[str, Sampled]:
        return self.sampled


def run_plan(executor: ModelExecutor, plan: StepPlan, *, block_size: int) -> FinishedStep:
    """Lay out the batch of a plan, compute its logits, sample from them."""
    batch = ForwardBatch.from_rows(plan.rows, block_size=block_size)
    return FinishedStep(sample_batch(executor, plan, batch))


def sample_batch(
    executor: ModelExecutor, plan: StepPlan, batch: ForwardBatch, *, samples: bool = True
) -> Mapping[str, Sampled]:
    """Compute the batch of a plan and sample from its logits; of several ranks one `samples`."""
    logits = executor.forward(batch)
    return sample_plan(logits, plan.rows, executor.reducer) if samples else {}


def unavailable_executors() -> dict[Executor, str]:
    """Executors that cannot run here, with the reason."""
    reasons: dict[Executor, str] = {}
    try:
        load_library()
    except ConfigError as error:
        reasons["native"] = str(error)
    if importlib.util.find_spec("torch") is None:
        for name in ("eager", "compiled"):
            reasons[name] = "torch is not installed (pip install torch, or the extra ridgeline[torch])"
    return reasons


def make_executor(config: EngineConfig, model: LoadedModel, layout: CacheLayout) -> ModelExecutor:
    """The executor that a resolved config names; over several ranks, what drives them."""
    assert config.executor is not None
    factory = FACTORIES[config.executor] if config.parallel.world_size == 1 else PARALLEL
    module, _, name = factory.partition(":")
    executor: ModelExecutor = getattr(importlib.import_module(module), name)(config, model, layout)
    return executor
