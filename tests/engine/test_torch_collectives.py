"""torch.distributed between real processes: sums in the order of the ranks bit for bit, uneven columns, messages."""

from __future__ import annotations

import multiprocessing
import traceback

import numpy as np
import pytest
import torch

from ridgeline.config import ParallelConfig
from ridgeline.distributed.groups import RankPlace

PARALLEL = ParallelConfig(tp_size=3, pp_size=2)
WIDTHS = (48, 16, 32)
ROWS = 5
NUM_MESSAGES = 6


def part_of(rank: int, dtype: type) -> np.ndarray:
    """Values of very different sizes: another order of addition gives other bits."""
    rng = np.random.default_rng(rank)
    return (rng.standard_normal((ROWS, 64)) * 10.0 ** rng.integers(-6, 6, (ROWS, 64))).astype(dtype)


def in_rank_order(parts: list[np.ndarray]) -> np.ndarray:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def gathered_of(stage: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([part_of(r, np.float32)[:, : WIDTHS[i]] for i, r in enumerate(stage)], axis=1)


def check_rank(rank: int, port, results) -> None:
    """Runs in its own process."""
    from ridgeline.distributed.torch_collectives import TorchCollectives, make_store

    try:
        place = RankPlace.of(rank, PARALLEL)
        store = make_store("127.0.0.1", None if rank == 0 else port.recv(), world_size=PARALLEL.world_size)
        if rank == 0:
            for end in port:
                end.send(store.port)
        ours = TorchCollectives(store, place, backend="gloo", local_host="127.0.0.1")
        for dtype in (np.float32, np.float64):
            expected = in_rank_order([part_of(r, dtype) for r in place.stage])
            own = part_of(rank, dtype)
            np.testing.assert_array_equal(ours.all_reduce(own), expected)
            np.testing.assert_array_equal(own, part_of(rank, dtype))
            as_tensor = ours.all_reduce(torch.from_numpy(own))
            assert isinstance(as_tensor, torch.Tensor)
            np.testing.assert_array_equal(as_tensor.numpy(), expected)
        columns = part_of(rank, np.float32)[:, : WIDTHS[place.tp_rank]]
        for _ in range(2):  # widths are asked for once
            np.testing.assert_array_equal(
                ours.all_gather(columns, columns=sum(WIDTHS)), gathered_of(place.stage)
            )
        assert ours.all_gather(columns[:0], columns=sum(WIDTHS)).shape == (0, sum(WIDTHS))

        message = np.empty((ROWS, 7), np.float32)
        for number in range(NUM_MESSAGES):
            if not place.is_last_stage:
                message[:] = 100 * place.tp_rank + number
                ours.send(message)  # and may be used again at once
            else:
                received = ours.receive(ROWS, 7)
                np.testing.assert_array_equal(received, np.full((ROWS, 7), 100 * place.tp_rank + number))
        counters = ours.counters()
        expected_bytes = {
            "all_reduce": 2 * ROWS * 64 * (4 + 8),
            "all_gather": 2 * ROWS * sum(WIDTHS) * 4,
            ("receive" if place.is_last_stage else "send"): NUM_MESSAGES * ROWS * 7 * 4,
        }
        assert {op: traffic.num_bytes for op, traffic in counters.items()} == expected_bytes
        ours.close()
        results.put((rank, None))
    except BaseException:
        results.put((rank, traceback.format_exc()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gloo_between_processes():
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    pipes = [context.Pipe(duplex=False) for _ in range(1, PARALLEL.world_size)]
    ports = [[sender for _, sender in pipes], *(receiver for receiver, _ in pipes)]
    processes = [
        context.Process(target=check_rank, args=(rank, ports[rank], results), daemon=True)
        for rank in range(PARALLEL.world_size)
    ]
    for process in processes:
        process.start()
    try:
        reports = [results.get(timeout=120) for _ in processes]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    errors = [f"rank {rank}:\n{error}" for rank, error in sorted(reports) if error]
    assert not errors, "\n".join(errors)
