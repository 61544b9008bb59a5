"""How ranks exchange numbers: the protocol, and our own implementation for ranks on one host.

`SharedMemory` works through memory that all ranks map (csrc/collectives.cpp). The driver makes it with
`SharedRegion`, gives its name to the ranks, and can abort it: every wait of every rank then fails at once.
`native_pointers` makes C functions of any implementation, which the interpreter of Programs calls.

Sums are formed in the order of the ranks, so all ranks get the same bits.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ridgeline.config import ParallelConfig
from ridgeline.distributed.groups import RankPlace
from ridgeline.errors import ConfigError, RankError
from ridgeline.library import load_library

Array = npt.NDArray[Any]
"""float32 or float64, [rows, columns]; implementations for CUDA take tensors instead."""

OPS = ("all_reduce", "all_gather", "send", "receive")
"""In the order of `rl_traffic` in csrc/collectives.h."""


class Traffic(NamedTuple):
    """What one op of one rank has done since the start."""

    num_calls: int = 0
    num_bytes: int = 0
    """of the results that this rank got; of a send and a receive, the message"""
    seconds: float = 0.0
    wait_s: float = 0.0
    """of `seconds`, those in which this rank waited for others"""


class Collectives(Protocol):
    """Exchange between the ranks of a model. All of them make the same calls in the same order.

    Each call returns when this rank may reuse its argument; it raises RankError when a peer is gone.
    """

    def all_reduce(self, x: Array) -> Array:
        """Sum of x over the tp ranks of the stage, added in their order -> a new array of x's shape."""
        ...

    def all_gather(self, x: Array, *, columns: int) -> Array:
        """x [rows, N_r] of every tp rank of the stage side by side -> [rows, columns]; N_r may differ."""
        ...

    def send(self, x: Array) -> None:
        """Hand x to the same tp rank of the next stage."""
        ...

    def receive(self, rows: int, columns: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """The next message of the same tp rank of the stage before, in the order of sending."""
        ...

    def counters(self) -> dict[str, Traffic]:
        """By the names of `OPS`; only what was called."""
        ...

    def close(self) -> None:
        """Give up the connection to the peers. Idempotent."""
        ...


class SharedRegion:
    """The memory of all ranks on this host, owned by the driver.

    On Linux it is a file without a name in any folder: it ends with the last process that has it open, in
    whatever way, and is not bounded by the size of /dev/shm, which is small in containers.
    """

    def __init__(self, parallel: ParallelConfig, *, max_message_bytes: int = 1 << 20) -> None:
        """`max_message_bytes`: the largest usual message between stages; two of them fit, a longer one is
        read while it is written.

        Raises ConfigError where the system has not that much memory.
        """
        _, self._library = load_library()
        sizes = (parallel.tp_size, parallel.pp_size, max_message_bytes)
        self.num_bytes = int(self._library.rl_region_bytes(*sizes))
        self._path: str | None = None
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("ridgeline")
            self.name = f"/proc/{os.getpid()}/fd/{self._file}"
        else:
            self._file, self._path = tempfile.mkstemp(prefix="ridgeline-")
            self.name = self._path
        try:
            # All of it now, where that can be asked for: a lack is then an error here and not a SIGBUS later.
            getattr(os, "posix_fallocate", lambda file, at, size: os.ftruncate(file, at + size))(
                self._file, 0, self.num_bytes
            )
            self._memory = _Mapping(self._file, self.num_bytes)
        except OSError as error:
            os.close(self._file)
            self._unlink()
            raise ConfigError(
                f"{parallel.tp_size} x {parallel.pp_size} ranks share {self.num_bytes:,} bytes of memory, "
                f"which this system did not give ({error.strerror}); free memory or lower "
                "max_num_batched_tokens"
            ) from error
        self._library.rl_region_init(self._memory.address, *sizes)
        self._is_open = True

    def abort(self) -> None:
        """Make every wait of every rank fail, now and from now on. Any thread may call it."""
        if self._is_open:
            self._library.rl_region_abort(self._memory.address)

    def close(self) -> None:
        """Abort, and give the memory back once the ranks have left it too. Idempotent."""
        if self._is_open:
            self.abort()
            self._is_open = False
            self._memory.close()
            os.close(self._file)
            self._unlink()

    def _unlink(self) -> None:
        if self._path:
            os.unlink(self._path)
            self._path = None


class SharedMemory:
    """`Collectives` of one rank in a `SharedRegion`: float32 or float64 arrays of numpy."""

    def __init__(self, name: str, place: RankPlace) -> None:
        """Join the region of this name. Raises RankError if it is gone or was made for other ranks."""
        self.place = place
        _, self._library = load_library()
        self._handle = None
        try:
            file = os.open(name, os.O_RDWR)
            try:
                self._memory = _Mapping(file, os.fstat(file).st_size)
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise RankError(
                f"rank {place.rank} cannot open the shared memory {name} ({error}); its driver has ended"
            ) from error
        sizes = (place.tp_size, place.pp_size, place.tp_rank, place.pp_rank)
        self._handle = self._library.rl_join(self._memory.address, self._memory.num_bytes, *sizes)
        if not self._handle:
            self._memory.close()
            raise RankError(
                f"the shared memory {name} was not made for {place.tp_size} x {place.pp_size} ranks by this "
                "version; start all ranks from one driver"
            )

    def all_reduce(self, x: Array) -> Array:
        x = _contiguous(x)
        out = np.empty_like(x)
        self._check(
            "all_reduce",
            self._library.rl_all_reduce(
                self._handle, x.ctypes.data, None, out.ctypes.data, x.size, x.itemsize
            ),
        )
        return out

    def all_gather(self, x: Array, *, columns: int) -> Array:
        x = _contiguous(x)
        rows, own_columns = x.shape
        out = np.empty((rows, columns), x.dtype)
        arguments = (x.ctypes.data, rows, own_columns, out.ctypes.data, columns, x.itemsize)
        self._check("all_gather", self._library.rl_all_gather(self._handle, *arguments))
        return out

    def send(self, x: Array) -> None:
        x = _contiguous(x)
        self._check("send", self._library.rl_send(self._handle, x.ctypes.data, x.nbytes))

    def receive(self, rows: int, columns: int, dtype: npt.DTypeLike = np.float32) -> Array:
        x = np.empty((rows, columns), dtype)
        self._check("receive", self._library.rl_receive(self._handle, x.ctypes.data, x.nbytes))
        return x

    def pointers(self) -> NativePointers:
        """C functions over this rank's handle; valid until `close`."""
        made = NativePointers()
        self._library.rl_pointers(self._handle, ctypes.byref(made.functions))
        return made

    def counters(self) -> dict[str, Traffic]:
        values = np.zeros((len(OPS), 4), np.int64)
        if self._handle:
            self._library.rl_traffic_of(self._handle, values.ctypes.data)
        return {
            op: Traffic(calls, num_bytes, ns / 1e9, wait_ns / 1e9)
            for op, (calls, num_bytes, ns, wait_ns) in zip(OPS, values.tolist(), strict=True)
            if calls
        }

    def abort(self) -> None:
        """As `SharedRegion.abort`: for a rank that gives up. Any thread may call it."""
        if self._handle:
            self._library.rl_region_abort(self._memory.address)

    def close(self) -> None:
        if self._handle:
            self._library.rl_leave(self._handle)
            self._handle = None
            self._memory.close()

    def _check(self, op: str, status: int) -> None:
        if status:
            raise rank_error(status, f"rank {self.place.rank}, {op}")


class _Mapping:
    """A file mapped for reading and writing, by its address."""

    def __init__(self, file: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._map = mmap.mmap(file, num_bytes)
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data

    def close(self) -> None:
        self._map.close()


def _contiguous(x: Array) -> Array:
    assert x.dtype in (np.float32, np.float64), x.dtype
    return np.ascontiguousarray(x)


STATUS_ABORTED, STATUS_MISMATCH, STATUS_RAISED = 1, 2, 3
"""Why a C function of collectives failed (`rl_status`)."""


def rank_error(status: int, where: str) -> RankError:
    """What a status other than 0 means, as an error to raise."""
    meaning = {
        STATUS_ABORTED: "the ranks were told to stop, as one of them died or hung, or the engine is closing; "
        "requests that were running are lost, later ones run on new ranks",
        STATUS_MISMATCH: "the ranks do not agree on the op or its sizes; they must run the same version, "
        "model and plan",
        STATUS_RAISED: "the exchange with the other ranks failed",
    }
    return RankError(f"{where}: {meaning[status]}")


_P, _I64 = ctypes.c_void_p, ctypes.c_int64
_AllReduce = ctypes.CFUNCTYPE(ctypes.c_int32, _P, _P, _P, _P, _I64)
_AllGather = ctypes.CFUNCTYPE(ctypes.c_int32, _P, _P, _I64, _I64, _P, _I64)
_Transfer = ctypes.CFUNCTYPE(ctypes.c_int32, _P, _P, _I64)


class _Functions(ctypes.Structure):
    """`rl_collectives` of csrc/ridgeline.h."""

    _fields_ = [
        ("context", _P),
        ("all_reduce", _AllReduce),
        ("all_gather", _AllGather),
        ("send", _Transfer),
        ("receive", _Transfer),
    ]


@dataclass(slots=True)
class NativePointers:
    """C functions for the interpreter, and the exception that one of them left behind."""

    functions: _Functions = field(default_factory=_Functions)
    error: BaseException | None = None

    def raised(self, status: int) -> RankError:
        """The error of a step that returned `status`."""
        error = rank_error(status, "this step stopped")
        error.__cause__, self.error = self.error, None
        return error


def native_pointers(collectives: Collectives) -> NativePointers:
    """C functions that call `collectives`: its own where it has them, else callbacks into Python."""
    if isinstance(collectives, SharedMemory):
        return collectives.pointers()
    made = NativePointers()

    def floats(address: int, *shape: int) -> npt.NDArray[np.float32]:
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape)

    def guarded(function: Any) -> Any:
        def call(context: int | None, *arguments: Any) -> int:
            try:
                function(*arguments)
            except BaseException as error:  # nothing can be raised through C
                made.error = error
                return STATUS_RAISED
            return 0

        return call

    def all_reduce(x: int, residual: int | None, out: int, count: int) -> None:
        total = collectives.all_reduce(floats(x, 1, count))
        floats(out, 1, count)[:] = total if residual is None else floats(residual, 1, count) + total

    def all_gather(x: int, rows: int, columns: int, out: int, out_columns: int) -> None:
        floats(out, rows, out_columns)[:] = collectives.all_gather(
            floats(x, rows, columns), columns=out_columns
        )

    def send(x: int, count: int) -> None:
        collectives.send(floats(x, 1, count))

    def receive(x: int, count: int) -> None:
        floats(x, 1, count)[:] = collectives.receive(1, count)

    made.functions = _Functions(
        None,
        _AllReduce(guarded(all_reduce)),
        _AllGather(guarded(all_gather)),
        _Transfer(guarded(send)),
        _Transfer(guarded(receive)),
    )
    return made
