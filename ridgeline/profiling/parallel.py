"""Time and memory of a model over several ranks, from their Programs.

The tp ranks of a stage work side by side and wait for each other: it takes as long as its slowest rank. A
token passes the stages one after the other; where several plans are in flight, the slowest stage sets the
pace. Ranks that share one machine share its cores and its memory: each takes as long as the whole machine
would for its part, times the number of ranks. Over any other link each rank has such a machine of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.config import EngineConfig
from ridgeline.distributed.groups import RankPlace
from ridgeline.engine.memory import cache_of_rank, plan_cache
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.load import LoadedModel
from ridgeline.models.shard import plan_cuts, shard_model
from ridgeline.ops.program import StepShape
from ridgeline.profiling.links import SHARED_MEMORY, Link
from ridgeline.profiling.machine import MachineLimits
from ridgeline.profiling.rates import KernelRates
from ridgeline.profiling.roofline import Company, Predictor, alike_step


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank's part of a described or loaded model, and of the cache."""

    place: RankPlace
    shard: LoadedModel
    layout: CacheLayout


def ranks_of(model: LoadedModel, config: EngineConfig) -> list[Rank]:
    """All ranks of `config.parallel`, by number; `config` may be unresolved. Raises ConfigError."""
    resolved = config.resolve(model.config, unavailable={})
    whole = plan_cache(resolved, model.config, ranks=plan_cuts(model, config.parallel).configs())
    ranks = []
    for number in range(config.parallel.world_size):
        place = RankPlace.of(number, config.parallel)
        shard = shard_model(model, place)
        ranks.append(Rank(place, shard, cache_of_rank(whole, shard.config)))
    return ranks


class ParallelPredictor:
    """Owns a `Predictor` for each rank; answers as one for a whole model does."""

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        limits: MachineLimits,
        rates: KernelRates | None,
        link: Link,
    ) -> None:
        """`config` may be unresolved. Raises ConfigError for what cannot be cut or predicted."""
        parallel = config.parallel
        num_on_machine = parallel.world_size if link.name == SHARED_MEMORY else 1
        company = Company(link, parallel.tp_size, num_on_machine)
        self.link = link
        self.ranks = ranks_of(model, config)
        self.predictors = [
            Predictor.for_model(r.shard, config, limits, rates, layout=r.layout, company=company)
            for r in self.ranks
        ]
        self._parallel = parallel
        self._known: dict[tuple[tuple[tuple[int, int], ...], int], float] = {}

    def stages_s(self, shape: StepShape) -> list[float]:
        """Seconds of each stage: of its slowest rank."""
        seconds = [predictor.ops_s(shape) for predictor in self.predictors]
        tp_size = self._parallel.tp_size
        return [max(seconds[i : i + tp_size]) for i in range(0, len(seconds), tp_size)]

    def slowest_rank(self, shape: StepShape) -> int:
        """By number; its ops are worth a look."""
        return max(range(len(self.ranks)), key=lambda r: self.predictors[r].ops_s(shape))

    def step_s(self, sequences: Sequence[tuple[int, int]], num_logits: int) -> float:
        """Seconds of one plan through all stages, alone. Steps of about the same shape are computed once."""
        alike = alike_step(sequences)
        if (alike, num_logits) not in self._known:
            shape = StepShape(alike, num_logits)
            self._known[alike, num_logits] = sum(self.stages_s(shape)) + self.predictors[-1].overhead_s(shape)
        return self._known[alike, num_logits]

    def prefill_s(self, num_tokens: int, *, chunk: int = 512) -> float:
        """TTFT of one prompt on an idle engine: its chunks wait for each other."""
        ends = [*range(chunk, num_tokens, chunk), num_tokens]
        starts = [0, *ends[:-1]]
        return sum(
            self.step_s([(end - start, end)], int(end == num_tokens))
            for start, end in zip(starts, ends, strict=True)
        )

    def decode_s(self, batch: int, context: int) -> float:
        """TPOT: the batch is dealt out to as many plans as there are stages."""
        num_plans = min(self._parallel.pp_size, batch)
        shape = StepShape.decode(-(-batch // num_plans), context)
        stages = self.stages_s(shape)
        overhead = num_plans * self.predictors[-1].overhead_s(shape)
        return max(sum(stages), num_plans * max(stages)) + overhead

    def communication_bytes(self, shape: StepShape) -> list[int]:
        """That each rank exchanges in a step."""
        return [predictor.program.communication_bytes(shape) for predictor in self.predictors]
