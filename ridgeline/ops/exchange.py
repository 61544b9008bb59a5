"""Exchange of tensors between ranks, as `TorchOps` calls it, over any `Collectives`."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.distributed.collectives import Collectives


class Exchange(Protocol):
    """`distributed.collectives.Collectives` on tensors of any device and dtype."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor: ...

    def all_gather(self, x: torch.Tensor, *, columns: int) -> torch.Tensor: ...

    def send(self, x: torch.Tensor) -> None: ...

    def receive(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor: ...


class HostExchange:
    """An `Exchange` of CPU tensors through `Collectives` of numpy: float64 as it is, all else as float32."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._collectives.all_reduce(_to_numpy(x))).to(x.dtype) if len(x) else x

    def all_gather(self, x: torch.Tensor, *, columns: int) -> torch.Tensor:
        if not len(x):
            return x.new_empty(0, columns)
        return torch.from_numpy(self._collectives.all_gather(_to_numpy(x), columns=columns)).to(x.dtype)

    def send(self, x: torch.Tensor) -> None:
        if len(x):
            self._collectives.send(_to_numpy(x))

    def receive(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        if not rows:
            return torch.empty(0, columns, dtype=dtype)
        precise = np.float64 if dtype == torch.float64 else np.float32
        return torch.from_numpy(self._collectives.receive(rows, columns, precise)).to(dtype)


def _to_numpy(x: torch.Tensor) -> npt.NDArray[np.floating]:
    return x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous().numpy()


def exchange_over(collectives: Collectives | Exchange | None, device: str) -> Exchange | None:
    """For the CPU a `HostExchange`; collectives for CUDA take tensors themselves."""
    if collectives is None or device != "cpu":
        return cast("Exchange | None", collectives)
    return HostExchange(cast("Collectives", collectives))
