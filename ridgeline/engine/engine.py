"""The engine: schedule, execute, update, and nothing else.

`LLMEngine.step` is the whole loop on one screen. Every optimisation is a setting of what it calls: the
scheduler decides from plain numbers, the executor computes what a plan says, and the outputs turn tokens into
text. It is not thread-safe: one thread owns it (`AsyncEngine` has one).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ridgeline.config import EngineConfig, ModelConfig
from ridgeline.engine.executors import StepHandle, make_executor, unavailable_executors
from ridgeline.engine.memory import plan_cache
from ridgeline.engine.outputs import OutputProcessor
from ridgeline.engine.sampler import derive_seed
from ridgeline.engine.scheduler import Scheduler, StepPlan
from ridgeline.engine.stats import EngineStats
from ridgeline.errors import RankError, RequestError
from ridgeline.kvcache.block_pool import BlockPool
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.kvcache.manager import BlockManager
from ridgeline.logs import logger
from ridgeline.models.load import LoadedModel, load_model
from ridgeline.models.locate import locate_model
from ridgeline.models.shard import plan_cuts
from ridgeline.request import FinishReason, Request, RequestOutput, Sampled
from ridgeline.sampling_params import SamplingParams
from ridgeline.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Mapping[str, Any]
"""Text, {"prompt": text} or {"prompt_token_ids": [...]}: the forms of vLLM's offline API."""


def make_scheduler(
    config: EngineConfig, model: ModelConfig, layout: CacheLayout, *, eos_token_ids: tuple[int, ...]
) -> Scheduler:
    """The scheduler of a resolved config, with the blocks of `layout`; `bench.simulate` uses it too."""
    cache = config.cache
    assert cache.enable_prefix_caching is not None and config.max_model_len
    pool = BlockPool(layout.num_blocks, layout.block_size, enable_prefix_caching=cache.enable_prefix_caching)
    window = model.sliding_window if model.window_is_global else None
    return Scheduler(
        config.scheduler,
        BlockManager(pool, window=window, num_sinks=model.num_sinks),
        max_model_len=config.max_model_len,
        eos_token_ids=eos_token_ids,
        kv_cache=cache.kv_cache,
        max_in_flight=config.parallel.pp_size,
    )


class LLMEngine:
    """Owns the executor with its cache, and every request between arrival and finish."""

    def __init__(
        self, config: EngineConfig, model: LoadedModel, tokenizer: Tokenizer | Future[Tokenizer | None] | None
    ) -> None:
        """Resolve the settings for this model and build the parts, the executor first. Raises ConfigError."""
        config = config.resolve(model.config, unavailable=unavailable_executors())
        assert config.max_model_len
        alone = config.parallel.world_size == 1
        ranks = () if alone else plan_cuts(model, config.parallel).configs()
        self.layout = plan_cache(config, model.config, ranks=ranks)
        self.config = replace(config, max_model_len=min(config.max_model_len, self.layout.num_slots))
        self.executor = make_executor(self.config, model, self.layout)
        self.model = model.without_data()  # the executor has the values in its own form
        self.tokenizer = tokenizer.result() if isinstance(tokenizer, Future) else tokenizer
        self.scheduler = make_scheduler(
            config, model.config, self.layout, eos_token_ids=self._eos_token_ids()
        )
        self.stats = EngineStats(self.scheduler)
        self._outputs = OutputProcessor(self.tokenizer)
        self._in_flight: deque[tuple[StepPlan, StepHandle]] = deque()
        self._num_submitted = 0

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLMEngine:
        """Find, map and load the model that `config` names, with its tokenizer.

        Raises SystemExit at the end of the work where torchrun started this process for a rank beyond 0.
        """
        if config.parallel.world_size > 1:
            from ridgeline.engine.executors.parallel import enter_torchrun

            enter_torchrun(config)
        model = load_model(locate_model(config.model), config.load)
        assert model.checkpoint is not None
        with ThreadPoolExecutor(1) as background:  # the weights are packed meanwhile
            return cls(config, model, background.submit(load_tokenizer, model.checkpoint))

    def _eos_token_ids(self) -> tuple[int, ...]:
        of_tokenizer = self.tokenizer.eos_token_ids if self.tokenizer is not None else ()
        return tuple(dict.fromkeys((*self.model.config.eos_token_ids, *of_tokenizer)))

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        arrival_time: float | None = None,
    ) -> str:
        """Queue a prompt -> its request id. Lower priority runs first; times are time.monotonic().

        Raises RequestError if it can never be served: empty, longer than the model or the cache allows,
        token ids out of the vocabulary, text without a tokenizer, an id that is in use.
        """
        params = params or SamplingParams()
        params.check_vocabulary(self.model.config.vocab_size)
        request_id = request_id or f"req-{self._num_submitted}"
        if request_id in self._outputs:
            raise RequestError(f"request id {request_id!r} is already in use; wait for it or choose another")
        text, token_ids = self._tokenize(prompt)
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        arrival = time.monotonic() if arrival_time is None else arrival_time
        seed = derive_seed(self.config.seed, self._num_submitted, 0) if params.seed is None else params.seed
        requests = [
            Request(
                request_id if params.n == 1 else f"{request_id}-{choice}",
                token_ids,
                params,
                arrival,
                seed=derive_seed(seed, 0, choice) if choice else seed,
                priority=priority,
            )
            for choice in range(params.n)
        ]
        for request in requests:
            self.scheduler.validate(request)
        self._num_submitted += 1
        self._outputs.add(request_id, text, requests)
        for request in requests:
            self.scheduler.add(request)
        return request_id

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                ids = prompt["prompt_token_ids"]
                vocab_size = self.model.config.vocab_size
                if not isinstance(ids, (list, tuple)) or not all(
                    isinstance(i, int) and 0 <= i < vocab_size for i in ids
                ):
                    raise RequestError(
                        f"prompt_token_ids: expected a list of whole numbers from 0 to {vocab_size - 1}, "
                        f"given {_shortened(ids)}"
                    )
                return None, list(ids)
            prompt = prompt.get("prompt", prompt)
        if not isinstance(prompt, str):
            raise RequestError(
                'a prompt is a string, {"prompt": text} or {"prompt_token_ids": [...]}; '
                f"given {_shortened(prompt)}"
            )
        if self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer; give {'prompt_token_ids': [...]} instead of text"
            )
        return prompt, self.tokenizer.encode(prompt)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request at any moment and free its blocks; unknown and finished ids are ignored."""
        output = None
        for child in self._outputs.children(request_id):
            request = self.scheduler.abort(child)
            if request is not None:
                self.stats.record_finish(request, now=time.monotonic())
                output = self._outputs.abort(request)
        return output

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def step(self) -> list[RequestOutput]:
        """One step -> the requests that got a token or finished, cumulative."""
        started = time.monotonic()
        try:
            plan, sampled = self._next_result()
        except RankError as error:
            return self._recover(error)
        changed = self.scheduler.update(plan, sampled)
        outputs, stopped = self._outputs.update(changed, sampled)
        for request_id, stop in stopped:
            self.scheduler.finish(request_id, FinishReason.STOP, stop)
        self.stats.record_step(changed, started=started, now=time.monotonic())
        return outputs

    def _next_result(self) -> tuple[StepPlan, Mapping[str, Sampled]]:
        """Keep the stages of a pipeline busy, then wait for the oldest plan -> it and its tokens."""
        while len(self._in_flight) < self.config.parallel.pp_size:
            plan = self.scheduler.schedule()
            if self._in_flight and not plan.rows:
                break
            self._in_flight.append((plan, self.executor.submit(plan)))
        plan, handle = self._in_flight.popleft()
        return plan, handle.result()

    def _recover(self, error: RankError) -> list[RequestOutput]:
        """Ranks were lost, and their caches with them: what was running ends with the error, the group is
        built anew, and what waits is served by it."""
        logger.error("%s", error)
        self._in_flight.clear()
        ended = self.scheduler.fail_running()
        now = time.monotonic()
        outputs: dict[str, RequestOutput] = {}
        for request in ended:
            self.stats.record_finish(request, now=now)
            output = self._outputs.abort(request, str(error))
            if output is not None:
                outputs[output.request_id] = output
        self.executor.restart()
        return list(outputs.values())

    def close(self) -> None:
        """Give back the executor's threads and memory."""
        self.executor.close()


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
