"""A request and what comes back for it: the record that every part of the engine talks about.

The scheduler owns `Request` and is the only one to change it. `num_computed_tokens` is the one number
that scheduling is about: tokens whose K and V are in the cache. There are no phases; each step lets the
request catch up with its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from ridgeline.pickles import pickled_by_position
from ridgeline.sampling_params import SamplingParams


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Request:
    """One prompt with its parameters, from arrival to finish.

    Owner: the scheduler. Invariant: num_computed_tokens <= num_planned_tokens <= num_tokens; preemption sets
    the first two back to 0.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival_time: float
    """Seconds, time.monotonic()."""
    seed: int = 0
    """Seed of the counter hash; resolved from params.seed, the engine's seed and the choice index."""
    priority: int = 0
    """Lower runs first; ties by arrival."""
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_planned_tokens: int = 0
    """And those of plans whose results are not known yet."""
    num_cached_tokens: int = 0
    """Tokens taken over by prefix caching at the first admission."""
    num_preemptions: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None at end-of-sequence and length."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def is_in_flight(self) -> bool:
        """A plan computes tokens of it now."""
        return self.num_planned_tokens > self.num_computed_tokens

    def tokens(self, start: int, end: int) -> list[int]:
        """Tokens start..end of prompt and output taken together, without joining the two lists."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - num_prompt]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token, from the model's own logits before any sampling parameter."""

    logprob: float
    rank: int
    """1 is the most probable token."""
    decoded_token: str | None = None


@pickled_by_position
@dataclass(frozen=True, slots=True)
class Sampled:
    """What an executor returns for one row with logits. Free of tensors, picklable."""

    token_id: int
    logprob: float
    """Of token_id, from the raw logits."""
    rank: int = 1
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The params.logprobs most probable (token id, logprob), best first."""
    prompt_logprobs: tuple[tuple[tuple[int, float, int], ...], ...] = ()
    """With params.prompt_logprobs: for each prompt token that this step's rows predict, in order,
    ((token id, logprob, rank), ...): the actual prompt token first, then the top ones, best first."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the n answers of a request; the fields of vLLM's."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] | None = None
    """Per output token: the sampled token and the most probable ones; None unless asked for."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times are time.monotonic() seconds; None until it has happened."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """State of a request after a step: everything generated so far, cumulative."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token; the first is None, nothing predicts it."""
    finished: bool = False
    error: str | None = None
    """Why the engine could not finish it: a rank of a parallel engine was lost."""
