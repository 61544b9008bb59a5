"""StepPlans of one seeded workload, recorded: a change of the scheduler shows here what it changed.

The workload has shared prefixes, priorities, prompt scores, an abort and a cache that is too small. One line
of the record is one plan; of the sampling parameters only what the scheduler decides is kept.
RIDGELINE_UPDATE_GOLDEN=1 rewrites the record; read its diff before you commit it.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from ridgeline.config import Batching, SchedulerConfig
from ridgeline.engine.scheduler import Scheduler, StepPlan
from ridgeline.kvcache.block_pool import BlockPool
from ridgeline.kvcache.manager import BlockManager
from ridgeline.request import Request, Sampled
from ridgeline.sampling_params import SamplingParams

RECORD = Path(__file__).with_name("step_plans.json")
BLOCK_SIZE = 4
EOS = 3
MODES: dict[str, dict[str, Any]] = {
    "continuous": {"num_blocks": 9, "budget": 6},
    "no prefix cache": {"num_blocks": 9, "budget": 16, "prefix": False},
    "no chunked prefill": {"num_blocks": 24, "budget": 40, "chunked": False},
    "one at a time": {"num_blocks": 12, "budget": 8, "batching": "none", "prefix": False},
    "static": {"num_blocks": 40, "budget": 64, "batching": "static", "chunked": False, "prefix": False},
    "no kv cache": {"num_blocks": 40, "budget": 64, "chunked": False, "prefix": False, "kv_cache": False},
    "window": {"num_blocks": 12, "budget": 8, "window": 6, "num_sinks": 2},
}


def requests() -> list[Request]:
    rng = random.Random(0)
    shared = [rng.randrange(50) for _ in range(13)]
    return [
        Request(
            f"r{i}",
            shared[: rng.choice((0, 6, 13))] + [rng.randrange(50) for _ in range(rng.randrange(1, 9))],
            SamplingParams(
                max_tokens=rng.randrange(6, 20),
                min_tokens=i % 2,
                prompt_logprobs=0 if i == 4 else None,
                repetition_penalty=1.5 if i == 2 else 1.0,
            ),
            float(i),
            priority=-1 if i == 5 else 0,
        )
        for i in range(7)
    ]


def plans(
    *,
    num_blocks: int,
    budget: int,
    batching: Batching = "continuous",
    chunked: bool = True,
    prefix: bool = True,
    kv_cache: bool = True,
    window: int | None = None,
    num_sinks: int = 0,
) -> list[StepPlan]:
    config = SchedulerConfig(
        batching=batching,
        max_num_seqs=1 if batching == "none" else 4,
        max_num_batched_tokens=budget,
        enable_chunked_prefill=chunked,
    )
    pool = BlockPool(num_blocks, BLOCK_SIZE, enable_prefix_caching=prefix)
    manager = BlockManager(pool, window=window, num_sinks=num_sinks)
    scheduler = Scheduler(config, manager, max_model_len=40, eos_token_ids=(EOS,), kv_cache=kv_cache)
    arrivals = requests()
    recorded: list[StepPlan] = []
    while arrivals or scheduler.has_unfinished:
        assert len(recorded) < 300, "no end"
        for request in arrivals[:2]:
            scheduler.validate(request)
            scheduler.add(request)
        del arrivals[:2]
        plan = scheduler.schedule()
        recorded.append(plan)
        if plan.step == 3:
            scheduler.abort("r1")
        sampled = {}
        for row in plan.rows:
            if row.sampling is not None:
                drawn = crc32(f"{row.request_id} {row.sampling.num_output}".encode()) % 50
                sampled[row.request_id] = Sampled(
                    drawn + 50 * (drawn in row.sampling.forbidden_token_ids), 0.0
                )
        scheduler.update(plan, sampled)
        scheduler.check_invariants()
    return recorded


def plain(value: Any) -> Any:
    """Without what is empty, zero or false, and without the sampling parameters: short lines to read."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "params" and v not in ((), 0, None)}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def lines(mode: str) -> list[str]:
    """One plan a line, as JSON."""
    return [json.dumps(plain(asdict(plan))) for plan in plans(**MODES[mode])]


@pytest.fixture(scope="module")
def record() -> dict[str, list[str]]:
    if os.environ.get("RIDGELINE_UPDATE_GOLDEN") == "1":
        modes = (f"{json.dumps(mode)}: [\n" + ",\n".join(lines(mode)) + "\n]" for mode in MODES)
        RECORD.write_text("{" + ",\n".join(modes) + "}\n")
    modes = json.loads(RECORD.read_text())
    return {mode: [json.dumps(plan) for plan in of_mode] for mode, of_mode in modes.items()}


@pytest.mark.parametrize("mode", MODES)
def test_plans_are_as_recorded(mode: str, record: dict[str, list[str]]) -> None:
    assert lines(mode) == record[mode], "RIDGELINE_UPDATE_GOLDEN=1 records the new plans; read the diff"


def test_the_workload_shows_what_it_is_meant_to_show() -> None:
    """Else a record that matches says little."""
    recorded = {mode: plans(**options) for mode, options in MODES.items()}
    rows = {mode: [row for plan in of_mode for row in plan.rows] for mode, of_mode in recorded.items()}
    assert all(any(plan.preempted for plan in recorded[m]) for m in ("continuous", "no prefix cache"))
    assert any(row.num_padding for row in rows["static"])
    assert any(row.sampling and row.sampling.prompt_targets for row in rows["continuous"])
    assert any(row.sampling and row.sampling.output_token_ids for row in rows["continuous"])
    assert any(-1 in row.block_ids for row in rows["window"])
    computed = {mode: sum(len(row.token_ids) for row in of_mode) for mode, of_mode in rows.items()}
    assert computed["continuous"] < computed["no prefix cache"] < computed["no kv cache"]
