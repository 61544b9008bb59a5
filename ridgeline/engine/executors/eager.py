"""torch, one op at a time: the definition of correct, and the CUDA path."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.config import EngineConfig
from ridgeline.engine.executors import FinishedStep, run_plan
from ridgeline.engine.scheduler import StepPlan
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import bind_decoder, decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.torch_ops import TorchBatch, TorchOps


def prepare_torch(config: EngineConfig) -> None:
    """Check the device and set the number of threads, for both torch executors."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch sees no CUDA device here; use device='cpu'")
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)


def logits_to_numpy(logits: torch.Tensor) -> npt.NDArray[np.floating]:
    """float64 stays, everything else becomes float32 on the CPU."""
    wanted = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.to(device="cpu", dtype=wanted).numpy()


class EagerExecutor:
    """Owns the torch weights and pages of one model."""

    def __init__(self, config: EngineConfig, model: LoadedModel, layout: CacheLayout) -> None:
        assert config.dtype and config.device and config.attention and config.max_model_len
        prepare_torch(config)
        self._model_config = model.config
        self._device = config.device
        self._block_size = layout.block_size
        self.ops = TorchOps(layout, dtype=config.dtype, device=config.device, attention=config.attention)
        self._weights = bind_decoder(
            self.ops, model.config, model.weights, max_model_len=config.max_model_len
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> npt.NDArray[np.floating]:
        tensors = TorchBatch.from_host(batch, self._device)
        return logits_to_numpy(decoder(self.ops, self._model_config, self._weights, tensors))

    def submit(self, plan: StepPlan) -> FinishedStep:
        return run_plan(self, plan, block_size=self._block_size)

    def close(self) -> None:
        pass
