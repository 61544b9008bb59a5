"""torch, one op at a time: the definition of correct, and the CUDA path."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.config import EngineConfig
from ridgeline.distributed.collectives import Collectives
from ridgeline.distributed.groups import Shard
from ridgeline.engine.executors import FinishedStep, run_plan
from ridgeline.engine.scheduler import StepPlan
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import DecoderWeights, bind_decoder, decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.exchange import Exchange, exchange_over
from ridgeline.ops.torch_ops import TorchBatch, TorchHandle, TorchOps


def prepare_torch(config: EngineConfig) -> None:
    """Check the device and set the number of threads, for both torch executors."""
    if config.device == "cuda":
        free_cuda_bytes()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)


def free_cuda_bytes() -> int:
    """Free memory of this process's GPU. Raises ConfigError where torch sees none."""
    if not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no CUDA device here; use device='cpu'")
    return int(torch.cuda.mem_get_info()[0])


def bind_torch(
    config: EngineConfig, model: LoadedModel, layout: CacheLayout, **parts: Any
) -> tuple[TorchOps, DecoderWeights[TorchHandle]]:
    """Pages and weights on the device, for both torch executors; `parts` are given to `TorchOps`.

    Raises ConfigError where a GPU has no room for them.
    """
    assert config.dtype and config.device and config.attention and config.max_model_len
    try:
        ops = TorchOps(layout, dtype=config.dtype, device=config.device, attention=config.attention, **parts)
        return ops, bind_decoder(
            ops, model.config, model.weights, max_model_len=config.max_model_len, shard=model.shard
        )
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info()
        raise ConfigError(
            f"the weights and a KV cache of {layout.num_bytes:,} bytes do not fit on the GPU, which has "
            f"{total:,} bytes and {free:,} of them free now; lower kv_cache_tokens or max_model_len, "
            "or use a smaller dtype"
        ) from None


def logits_of(output: torch.Tensor, batch: ForwardBatch, shard: Shard | None) -> npt.NDArray[np.floating]:
    """The decoder's output as logits [L, V], without columns in a stage that is not the last."""
    num_logits = len(batch.logit_rows)
    if shard is not None and not shard.place.is_last_stage:
        return np.empty((num_logits, 0), np.float32)
    return logits_to_numpy(output[:num_logits])


def logits_to_numpy(logits: torch.Tensor) -> npt.NDArray[np.floating]:
    """float64 stays, everything else becomes float32 on the CPU."""
    wanted = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.to(device="cpu", dtype=wanted).numpy()


class EagerExecutor:
    """Owns the torch weights and pages of one model, or of one rank's part of it."""

    reducer = None

    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel,
        layout: CacheLayout,
        collectives: Collectives | Exchange | None = None,
    ) -> None:
        """`collectives`: of a rank, on numpy arrays for the CPU and on tensors for CUDA."""
        assert config.device
        prepare_torch(config)
        self._model_config, self._shard = model.config, model.shard
        self._device = config.device
        self._block_size = layout.block_size
        self.ops, self._weights = bind_torch(
            config, model, layout, exchange=exchange_over(collectives, config.device)
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> npt.NDArray[np.floating]:
        tensors = TorchBatch.from_host(batch, self._device)
        output = decoder(self.ops, self._model_config, self._weights, tensors, self._shard)
        return logits_of(output, batch, self._shard)

    def submit(self, plan: StepPlan) -> FinishedStep:
        return run_plan(self, plan, block_size=self._block_size)

    def restart(self) -> None:
        raise AssertionError("an executor without ranks loses none")

    def close(self) -> None:
        pass
