"""Workloads as data: what is asked of an engine, how much of it and when.

A `Workload` describes distributions; `requests` turns it into a list. Two seeds are kept apart: that of the
workload fixes lengths and arrival times, the one given to `requests` only the words. So a repetition asks for
exactly the same work with other words, and a prefix cache hits only what the workload shares on purpose.
Arrivals follow Poisson or gamma processes as in `vllm bench serve` (shape = burstiness); a closed loop is
"all at once" with `max_concurrency`. Plain Python, so that a load generator starts at once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ridgeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Fixed:
    """Every length is the same."""

    value: int

    def draw(self, rng: random.Random, index: int) -> int:
        return self.value


@dataclass(frozen=True, slots=True)
class Uniform:
    """Whole numbers from low to high, both included."""

    low: int
    high: int

    def draw(self, rng: random.Random, index: int) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp of a normal distribution, rounded and clipped: the shape of prompts that people write."""

    median: float
    sigma: float
    low: int = 1
    high: int = 1 << 20

    def draw(self, rng: random.Random, index: int) -> int:
        length = round(self.median * rng.lognormvariate(0.0, self.sigma))
        return min(max(length, self.low), self.high)


@dataclass(frozen=True, slots=True)
class Listed:
    """The lengths of a trace, in order; from the start again when they run out."""

    values: tuple[int, ...]

    def draw(self, rng: random.Random, index: int) -> int:
        return self.values[index % len(self.values)]


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Everything has arrived at time 0."""

    def next(self, rng: random.Random, index: int, last: float) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps of a gamma distribution with mean 1/rate; burstiness is its shape, 1 is Poisson, less is worse."""

    rate: float
    burstiness: float = 1.0

    def next(self, rng: random.Random, index: int, last: float) -> float:
        if self.burstiness == 1.0:
            return last + rng.expovariate(self.rate)
        return last + rng.gammavariate(self.burstiness, 1.0 / (self.rate * self.burstiness))


@dataclass(frozen=True, slots=True)
class FixedRate:
    """One arrival every 1/rate seconds, the first at 0."""

    rate: float

    def next(self, rng: random.Random, index: int, last: float) -> float:
        return index / self.rate


@dataclass(frozen=True, slots=True)
class Times:
    """The arrival times of a trace, in seconds."""

    values: tuple[float, ...]

    def next(self, rng: random.Random, index: int, last: float) -> float:
        return self.values[index]


Lengths = Fixed | Uniform | LogNormal | Listed
Arrivals = AtOnce | Gamma | FixedRate | Times
LENGTHS: dict[str, type[Any]] = {"fixed": Fixed, "uniform": Uniform, "lognormal": LogNormal, "listed": Listed}
ARRIVALS: dict[str, type[Any]] = {
    "at_once": AtOnce,
    "gamma": Gamma,
    "fixed_rate": FixedRate,
    "times": Times,
}
"""The names that a JSON description uses."""


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request. A later turn's prompt holds stand-ins for the answers that are not known yet."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    arrival_s: float = 0.0
    """From the start of the run; of a later turn: not before the answer to the turn before."""
    texts: tuple[str, ...] = ()
    """The same prompt as text, where words were given: what the user and the model said, in turn."""
    conversation: int | None = None
    turn: int = 0
    own_len: int = 0
    """Tokens at the end of a later turn's prompt that are new; those before are the conversation so far."""

    @property
    def text(self) -> str | None:
        """The whole prompt as one text."""
        return "".join(self.texts) if self.texts else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked, as distributions. Raises ConfigError for one that makes no sense."""

    name: str
    num_requests: int
    """Turns counted one by one."""
    prompt_lens: Lengths
    """Tokens of a request's own, without the shared prefix and the history."""
    output_lens: Lengths
    shared_prefix_len: int = 0
    num_prefixes: int = 1
    """Different shared prefixes; requests take them in turn."""
    turns: int = 1
    arrivals: Arrivals = field(default_factory=AtOnce)
    max_concurrency: int | None = None
    """At most this many requests are sent and not finished; the rest wait, and their waiting counts."""
    seed: int = 0
    """Of lengths and arrival times."""

    def __post_init__(self) -> None:
        for name in ("num_requests", "num_prefixes", "turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"workload {self.name}: {name}={getattr(self, name)}, expected at least 1")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(
                f"workload {self.name}: max_concurrency={self.max_concurrency}, expected at least 1 or null"
            )
        if self.shared_prefix_len < 0:
            raise ConfigError(f"workload {self.name}: shared_prefix_len is negative; 0 shares nothing")
        if self.num_requests % self.turns:
            raise ConfigError(
                f"workload {self.name}: {self.num_requests} requests are no whole number of conversations "
                f"of {self.turns} turns"
            )
        for lengths in (self.prompt_lens, self.output_lens):
            _check_lengths(self.name, lengths)
        _check_arrivals(self)

    def requests(
        self, *, vocab_size: int, seed: int, words: Sequence[tuple[int, str]] | None = None
    ) -> list[WorkloadRequest]:
        """The requests in order of arrival; another seed gives other words, the same lengths and times.

        `words` are (token id, text) pairs to draw from instead of all token ids; the requests then have the
        text too, and are as long as planned where each word is one token (`PLAIN_WORDS`).
        """
        if vocab_size < 1:
            raise ConfigError(f"vocab_size={vocab_size}: expected the number of token ids of the model")
        shape = random.Random(self.seed)
        content = random.Random(f"{self.name} {seed}")
        vocabulary = words if words is not None else range(vocab_size)

        def draw(count: int) -> list[Any]:
            return content.choices(vocabulary, k=count)

        prefixes = [draw(self.shared_prefix_len) for _ in range(self.num_prefixes)]
        requests: list[WorkloadRequest] = []
        parts: list[list[Any]] = []
        arrival = 0.0
        for index in range(self.num_requests):
            conversation, turn = divmod(index, self.turns)
            if turn == 0:
                arrival = self.arrivals.next(shape, conversation, arrival)
                parts = []
            own_len, output_len = (
                lengths.draw(shape, index) for lengths in (self.prompt_lens, self.output_lens)
            )
            own = draw(own_len)
            parts.append(own if turn else prefixes[conversation % self.num_prefixes] + own)
            history = [word for part in parts for word in part]
            requests.append(
                WorkloadRequest(
                    tuple(history if words is None else (token_id for token_id, _ in history)),
                    output_len,
                    arrival,
                    () if words is None else tuple("".join(text for _, text in part) for part in parts),
                    conversation if self.turns > 1 else None,
                    turn,
                    own_len,
                )
            )
            if turn + 1 < self.turns:
                parts.append(draw(output_len))
        return sorted(requests, key=lambda request: request.arrival_s)

    @property
    def shares_prefixes(self) -> bool:
        """Whether a prefix cache is meant to hit."""
        return self.turns > 1 or (self.shared_prefix_len > 0 and self.num_requests > self.num_prefixes)

    def describe(self) -> dict[str, Any]:
        """The JSON form, which `workload_named` reads back."""
        description = asdict(self)
        for name, kinds in (("prompt_lens", LENGTHS), ("output_lens", LENGTHS), ("arrivals", ARRIVALS)):
            kind = next(kind for kind, cls in kinds.items() if isinstance(getattr(self, name), cls))
            description[name] = {"kind": kind} | {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in description[name].items()
            }
        return description


def continue_with(
    request: WorkloadRequest, previous: WorkloadRequest, answer: Sequence[int], *, text: str | None = None
) -> WorkloadRequest:
    """A later turn with the real answer to the turn before it in place of the stand-in.

    `previous` is the request as it was sent, `text` the answer as text; without it the texts are left out,
    since they would no longer be the same prompt.
    """
    own = request.prompt_token_ids[len(request.prompt_token_ids) - request.own_len :]
    return replace(
        request,
        prompt_token_ids=(*previous.prompt_token_ids, *answer, *own),
        texts=() if text is None or not request.texts else (*previous.texts, text, request.texts[-1]),
    )


def _check_lengths(name: str, lengths: Lengths) -> None:
    match lengths:
        case Fixed(value):
            valid = value >= 1
        case Uniform(low, high):
            valid = 1 <= low <= high
        case LogNormal(median, sigma, low, high):
            valid = 1 <= low <= high and median > 0 and sigma >= 0
        case Listed(values):
            valid = min(values, default=0) >= 1
    if not valid:
        raise ConfigError(
            f"workload {name}: {lengths}: expected lengths of at least 1 token, low <= high, sigma >= 0"
        )


def _check_arrivals(workload: Workload) -> None:
    arrivals = workload.arrivals
    if isinstance(arrivals, (Gamma, FixedRate)) and arrivals.rate <= 0:
        raise ConfigError(f"workload {workload.name}: rate={arrivals.rate}, expected requests per second > 0")
    if isinstance(arrivals, Gamma) and arrivals.burstiness <= 0:
        raise ConfigError(
            f"workload {workload.name}: burstiness={arrivals.burstiness}, expected > 0; 1 is Poisson"
        )
    if isinstance(arrivals, Times):
        needed = workload.num_requests // workload.turns
        if len(arrivals.values) < needed or min(arrivals.values) < 0:
            raise ConfigError(
                f"workload {workload.name}: {len(arrivals.values)} arrival times for {needed} arrivals; "
                "expected one for each, none negative"
            )


_MIXED: dict[str, Any] = {"prompt_lens": Uniform(16, 256), "output_lens": Uniform(16, 192)}
NAMED: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(name="w1", num_requests=1, prompt_lens=Fixed(32), output_lens=Fixed(128), max_concurrency=1),
        Workload(name="w2", num_requests=1, prompt_lens=Fixed(512), output_lens=Fixed(1), max_concurrency=1),
        Workload(
            name="w2l", num_requests=1, prompt_lens=Fixed(2048), output_lens=Fixed(1), max_concurrency=1
        ),
        Workload(name="w3", num_requests=32, max_concurrency=16, seed=31337, **_MIXED),
        Workload(
            name="w4",
            num_requests=32,
            prompt_lens=Fixed(32),
            output_lens=Fixed(32),
            shared_prefix_len=512,
            max_concurrency=16,
        ),
        Workload(name="w5", num_requests=58, arrivals=Gamma(2.0), seed=5150, **_MIXED),
        Workload(name="w5l", num_requests=18, arrivals=Gamma(0.5), seed=5150, **_MIXED),
    )
}
"""w1 single-stream decode, w2 and w2l prefill, w3 a mixed batch, w4 a shared prefix, w5 and w5l arrivals at
2 and 0.5 requests a second."""


def workload_named(name_or_path: str) -> Workload:
    """A named workload, a JSON description (`Workload.describe`), or a trace of JSON lines.

    A trace line has prompt_len, output_len and, on all lines or none, arrival_s. Raises ConfigError.
    """
    if name_or_path in NAMED:
        return NAMED[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"workload {name_or_path!r}: no such name and no such file; names: {', '.join(NAMED)}; "
            "files: a JSON description, or JSON lines with prompt_len and output_len"
        )
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        lines = []
    if len(lines) == 0 or not all(isinstance(line, dict) for line in lines) or "prompt_len" not in lines[0]:
        try:
            description = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"workload {name_or_path}: neither JSON nor JSON lines: {error}") from None
        if not isinstance(description, dict):
            raise ConfigError(f"workload {name_or_path}: expected an object, given {text.strip()[:40]}")
        return _from_description({"name": path.stem} | description, name_or_path)
    return _from_trace(path.stem, lines)


def _from_trace(name: str, lines: Sequence[Mapping[str, Any]]) -> Workload:
    try:
        times = tuple(float(line["arrival_s"]) for line in lines if "arrival_s" in line)
        prompt_lens, output_lens = (
            Listed(tuple(int(line[key]) for line in lines)) for key in ("prompt_len", "output_len")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"trace {name}: {error!r}; every line needs the numbers prompt_len and output_len"
        ) from None
    if times and len(times) != len(lines):
        raise ConfigError(f"trace {name}: {len(times)} of {len(lines)} lines have arrival_s; all or none")
    return Workload(
        name=name,
        num_requests=len(lines),
        prompt_lens=prompt_lens,
        output_lens=output_lens,
        arrivals=Times(times) if times else AtOnce(),
    )


def _from_description(description: Mapping[str, Any], source: str) -> Workload:
    known = {f.name for f in fields(Workload)}
    if unknown := sorted(set(description) - known):
        raise ConfigError(
            f"workload {source}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    values = dict(description)
    try:
        for name, kinds in (("prompt_lens", LENGTHS), ("output_lens", LENGTHS), ("arrivals", ARRIVALS)):
            if name in values:
                values[name] = _spec(values[name], kinds)
        return Workload(**values)
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f'workload {source}: {error}; lengths are a number or {{"kind": ...}} with kind in '
            f"{', '.join(LENGTHS)}; arrivals in {', '.join(ARRIVALS)}"
        ) from None


def _spec(value: Any, kinds: Mapping[str, type[Any]]) -> Any:
    """A number is a fixed length; lists become tuples, so that the result can be frozen."""
    if isinstance(value, int) and "fixed" in kinds:
        return Fixed(value)
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items() if key != "kind"}
    return kinds[value["kind"]](**options)


_PLAIN = """
water stone river mountain valley forest field garden window table paper letter number question answer morning
evening summer winter light shadow market street village city country people children teacher doctor farmer
music story picture colour silver gold iron glass bread apple horse bird fish island ocean weather north south
east west little great early late slow quick open closed simple common
"""
PLAIN_WORDS = tuple(enumerate(f" {word}" for word in _PLAIN.split()))
"""Words for prompts that are text: in nearly every vocabulary one token each. The ids stand for no token."""
