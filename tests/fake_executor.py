"""A model that is a hash: it tests scheduling and memory without tensors.

Each slot holds a checksum of the text up to its token, as K and V depend on all tokens before. A step writes
its rows through the block tables, reads everything a query sees back through them, and refuses anything that
is not the request's own text. The next token is a hash of the text, so a request has exactly one right answer,
whatever the schedule: `Simulation.answer` computes it without a scheduler.
"""

from __future__ import annotations

from zlib import crc32

from ridgeline.config import SchedulerConfig
from ridgeline.engine.scheduler import PlanRow, Scheduler, StepPlan
from ridgeline.kvcache.block_pool import NO_BLOCK, BlockPool, chain_hash
from ridgeline.kvcache.manager import BlockManager
from ridgeline.request import Request, Sampled
from ridgeline.sampling_params import SamplingParams

VOCAB_SIZE = 40


def checksums(token_ids: list[int]) -> list[int]:
    """Of the text up to each token."""
    sums, last = [], 0
    for token_id in token_ids:
        last = crc32(token_id.to_bytes(4, "little"), last)
        sums.append(last)
    return sums


def next_token(token_ids: list[int], forbidden: tuple[int, ...] = ()) -> int:
    token_id = checksums(token_ids)[-1] % VOCAB_SIZE
    while token_id in forbidden:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


class Simulation:
    """A scheduler with this executor; owns every request that was added and what came of it."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        batching: str = "continuous",
        max_num_seqs: int = 8,
        budget: int = 64,
        chunked: bool = True,
        prefix: bool = True,
        kv_cache: bool = True,
        window: int | None = None,
        num_sinks: int = 0,
        max_model_len: int = 64,
        eos: tuple[int, ...] = (),
        hash_function=chain_hash,
    ) -> None:
        self.pool = BlockPool(
            num_blocks, block_size, enable_prefix_caching=prefix, hash_function=hash_function
        )
        self.manager = BlockManager(self.pool, window=window, num_sinks=num_sinks)
        config = SchedulerConfig(
            batching=batching,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_chunked_prefill=chunked,
        )
        self.scheduler = Scheduler(
            config, self.manager, max_model_len=max_model_len, eos_token_ids=eos, kv_cache=kv_cache
        )
        self.batching, self.budget, self.kv_cache, self.eos = batching, budget, kv_cache, eos
        self.window, self.num_sinks = window, num_sinks
        self.store: dict[tuple[int, int], int] = {}
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.targets: dict[str, list[int]] = {}
        self.num_computed = 0
        """Tokens of all steps, padding not counted."""

    def add(self, prompt: list[int], *, name: str | None = None, priority: int = 0, **params) -> Request:
        """Raises RequestError as `validate` does."""
        request_id = name or f"r{len(self.requests)}"
        params = SamplingParams(**{"max_tokens": 6, "ignore_eos": not self.eos} | params)
        request = Request(request_id, prompt, params, float(len(self.requests)), priority=priority)
        self.scheduler.validate(request)
        self.scheduler.add(request)
        self.requests[request_id] = request
        self.targets[request_id] = []
        return request

    def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)
        self.scheduler.abort(request_id)

    def step(self) -> StepPlan:
        """Schedule, compute and record; the invariants hold before and after."""
        plan = self.scheduler.schedule()
        self.scheduler.check_invariants()
        self.scheduler.update(plan, self.execute(plan))
        self.scheduler.check_invariants()
        return plan

    def run(self, *, max_steps: int = 5000) -> list[StepPlan]:
        """Steps until nothing is left; every answer is then checked."""
        plans: list[StepPlan] = []
        while self.scheduler.has_unfinished:
            assert len(plans) < max_steps, "no end"
            plans.append(self.step())
        self.check_answers()
        return plans

    def execute(self, plan: StepPlan) -> dict[str, Sampled]:
        assert len({row.request_id for row in plan.rows}) == len(plan.rows)
        assert sum(len(row.token_ids) + row.num_padding for row in plan.rows) <= self.budget
        assert self.batching == "static" or not any(row.num_padding for row in plan.rows)
        for row in plan.rows:
            self._write(row)
        return {row.request_id: self._read(row) for row in plan.rows if row.sampling is not None}

    def _write(self, row: PlanRow) -> None:
        request = self.requests[row.request_id]
        end = row.start + len(row.token_ids)
        assert list(row.token_ids) == request.tokens(row.start, end)
        assert self.kv_cache or row.start == 0
        assert row.samples == (bool(row.token_ids) and end == request.num_tokens)
        assert (row.num_logits > 0) == (row.sampling is not None)
        self.num_computed += len(row.token_ids)
        for position, value in list(enumerate(checksums(request.tokens(0, end))))[row.start :]:
            block_id, offset = self._slot(row, position)
            assert self.pool._blocks[block_id].content is None, "published blocks never change"
            self.store[block_id, offset] = value

    def _read(self, row: PlanRow) -> Sampled:
        request = self.requests[row.request_id]
        end = row.start + len(row.token_ids)
        expected = checksums(request.tokens(0, end))
        for query in range(row.start, end) if self.window else (end - 1,):
            first = 0 if self.window is None else max(0, query - self.window + 1)
            for position in {*range(min(self.num_sinks, query)), *range(first, query + 1)}:
                assert self.store[self._slot(row, position)] == expected[position]
        assert row.sampling is not None
        targets = row.sampling.prompt_targets
        for offset, target in enumerate(targets):
            assert target == request.prompt_token_ids[end - row.num_logits + offset + 1]
        self.targets[row.request_id].extend(targets)
        token_id = next_token(request.tokens(0, end), row.sampling.forbidden_token_ids)
        return Sampled(token_id if row.samples else -1, 0.0)

    def _slot(self, row: PlanRow, position: int) -> tuple[int, int]:
        block_id = row.block_ids[position // self.pool.block_size]
        assert block_id != NO_BLOCK
        return block_id, position % self.pool.block_size

    def answer(self, request: Request) -> list[int]:
        """What the request generates when nothing limits it but its parameters and its length."""
        params, output = request.params, list[int]()
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos)}
        while len(output) != params.max_tokens:
            if len(request.prompt_token_ids) + len(output) == self.scheduler._max_tokens:
                break
            early = len(output) < params.min_tokens
            forbidden = (*self.eos, *params.stop_token_ids) if early else ()
            output.append(next_token(request.prompt_token_ids + output, forbidden))
            if output[-1] in stops and len(output) >= params.min_tokens:
                break
        return output

    def check_answers(self) -> None:
        """Every request that ended has its one right answer, or the beginning of it if it was aborted."""
        for name, request in self.requests.items():
            answer = self.answer(request)
            if name in self.aborted:
                answer = answer[: len(request.output_token_ids)]
            elif request.params.prompt_logprobs is not None:
                assert self.targets[name] == request.prompt_token_ids[1:]
            assert request.output_token_ids == answer, name
        assert self.pool.counts()["referenced"] == 0
