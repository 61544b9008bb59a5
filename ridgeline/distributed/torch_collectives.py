"""Collectives through torch.distributed: gloo between hosts and for tensors on the CPU, NCCL between GPUs.

gloo adds in an order of its own, so a sum is an all_gather and an addition in the order of the ranks: the
same bits as in shared memory. NCCL adds on its way round the ring: all ranks get the same bits, but not those
of other implementations. A send is not waited for until MAX_SENDS are under way, so that stages overlap.

Every method takes and gives numpy arrays, or tensors where the argument is a tensor.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ridgeline.distributed.collectives import Traffic
from ridgeline.distributed.groups import RankPlace
from ridgeline.errors import ConfigError, RankError

X = TypeVar("X", npt.NDArray[Any], torch.Tensor)

MAX_SENDS = 2
_TIMEOUT = timedelta(minutes=10)
"""A peer that is gone is noticed by the driver long before."""
_SIOCGIFADDR = 0x8915


def make_store(host: str, port: int | None, *, world_size: int) -> TCPStore:
    """Where the ranks find each other. Rank 0 makes it, with port None, and tells the others its `port`."""
    is_master = port is None
    return TCPStore(
        host, port or 0, world_size, is_master=is_master, timeout=_TIMEOUT, wait_for_workers=False
    )


def choose_device(local_rank: int) -> None:
    """One GPU a rank. Raises ConfigError where there are fewer."""
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ConfigError(
            f"this host has {num_devices} CUDA devices and needs one for each of its ranks, at least "
            f"{local_rank + 1}; use fewer ranks, or more hosts"
        )
    torch.cuda.set_device(local_rank)


class TorchCollectives:
    """`Collectives` of one rank; owns the process group of this process, of which there is one."""

    def __init__(self, store: TCPStore, place: RankPlace, *, backend: str, local_host: str) -> None:
        """Connect to all ranks. `local_host`: the address of this host whose network is to be used."""
        interface = interface_of(local_host)
        if interface is not None:
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, interface)
        self.place = place
        self._backend = backend
        with _peer_errors(place, "connecting"):
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.world_size, timeout=_TIMEOUT
            )
            stages = [
                dist.new_group([stage * place.tp_size + rank for rank in range(place.tp_size)])
                for stage in range(place.pp_size)
            ]
        self._stage = stages[place.pp_rank]
        self._widths: dict[tuple[int, int], list[int]] = {}
        self._sends: deque[tuple[dist.Work | None, torch.Tensor]] = deque()
        self._traffic: dict[str, Traffic] = {}

    def all_reduce(self, x: X) -> X:
        if not x.shape[0]:
            return x
        with self._counted("all_reduce", x.nbytes):
            own = _tensor(x)
            if self._backend == "nccl":
                total = own.clone()
                dist.all_reduce(total, group=self._stage)
                return _like(total, x)
            parts = self._gathered(own)
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return _like(total, x)

    def all_gather(self, x: X, *, columns: int) -> X:
        rows = x.shape[0]
        if not rows:
            return _like(_tensor(x).new_empty((0, columns)), x)
        with self._counted("all_gather", x.nbytes // max(x.shape[1], 1) * columns):
            own = _tensor(x)
            widths = self._widths_of(own, columns)
            padded = own.new_zeros((rows, max(widths)))
            padded[:, : own.shape[1]] = own
            parts = self._gathered(padded)
            joined = torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
            return _like(joined, x)

    def send(self, x: X) -> None:
        with self._counted("send", x.nbytes):
            message = _tensor(x).clone()
            self._sends.append((dist.isend(message, self.place.rank + self.place.tp_size), message))
            self._finish_sends(MAX_SENDS)

    def receive(self, rows: int, columns: int, dtype: Any = np.float32) -> Any:
        """A tensor on this rank's device where `dtype` is one of torch's."""
        is_torch = isinstance(dtype, torch.dtype)
        device = "cuda" if is_torch and self._backend == "nccl" else "cpu"
        kind = dtype if is_torch else torch.from_numpy(np.empty(0, dtype)).dtype
        message = torch.empty((rows, columns), dtype=kind, device=device)
        with self._counted("receive", message.nbytes):
            dist.recv(message, self.place.rank - self.place.tp_size)
        return message if is_torch else message.numpy()

    def counters(self) -> dict[str, Traffic]:
        return dict(self._traffic)

    def close(self) -> None:
        if dist.is_initialized():
            with _peer_errors(self.place, "closing"):
                self._finish_sends(0)
            dist.destroy_process_group()

    def _finish_sends(self, num_left: int) -> None:
        while len(self._sends) > num_left:
            work, _ = self._sends.popleft()
            if work is not None:
                work.wait()

    def _gathered(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x of every tp rank, all of one shape."""
        parts = [torch.empty_like(x) for _ in range(self.place.tp_size)]
        dist.all_gather(parts, x, group=self._stage)
        return parts

    def _widths_of(self, x: torch.Tensor, columns: int) -> list[int]:
        """Columns of every tp rank: asked once for each width, as a model gathers the same ones each time."""
        key = (x.shape[1], columns)
        if key not in self._widths:
            own = torch.tensor([x.shape[1]], device=x.device)
            self._widths[key] = [int(width.item()) for width in self._gathered(own)]
            assert sum(self._widths[key]) == columns
        return self._widths[key]

    @contextmanager
    def _counted(self, op: str, num_bytes: int) -> Iterator[None]:
        started = time.perf_counter()
        with _peer_errors(self.place, op):
            yield
        before = self._traffic.get(op, Traffic())
        seconds = before.seconds + time.perf_counter() - started
        self._traffic[op] = Traffic(before.num_calls + 1, before.num_bytes + num_bytes, seconds)


@contextmanager
def _peer_errors(place: RankPlace, op: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank {place.rank}, {op}: the exchange with the other ranks failed: {error}"
        ) from error


def _tensor(x: npt.NDArray[Any] | torch.Tensor) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x.contiguous()
    x = np.ascontiguousarray(x)
    return torch.from_numpy(x if x.flags.writeable else x.copy())


def _like(result: torch.Tensor, x: X) -> X:
    return result if isinstance(x, torch.Tensor) else result.numpy()


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None where the system does not say."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
            except OSError:
                continue  # an interface without an address
            if socket.inet_ntoa(found) == address:
                return name
    return None
