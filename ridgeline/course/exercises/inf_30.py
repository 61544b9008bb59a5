"""Checkers of INF-30, continuous batching."""

from __future__ import annotations

from statistics import quantiles
from typing import Any

from ridgeline.bench.simulate import Simulation, StepTime, simulate
from ridgeline.bench.workload import Fixed, Gamma, Listed, LogNormal, Uniform, Workload
from ridgeline.config import EngineConfig
from ridgeline.course.exercises import exercise
from ridgeline.models.synth import preset_config

ANSWERS = (9, 1, 1, 5, 4, 2)
SHORT, LONG, SHARE_LONG, BATCH = 20, 400, 0.1, 16
P95_LIMIT_S = 0.25


def _simulated(workload: Workload, step_s: StepTime, **options: Any) -> Simulation:
    limits = {"max_model_len": 512, "max_num_batched_tokens": 2048, "kv_cache_tokens": 16 * 512}
    fixed = {"executor": "native", "enable_prefix_caching": False}
    model = preset_config("smollm2-135m")
    config = EngineConfig.from_options("smollm2", **limits | fixed | options)
    return simulate(config, model, workload.requests(vocab_size=model.vocab_size, seed=0), step_s)


@exercise(difficulty=1, importance=3, minutes=5)
def steps(answer: Any, lesson: Any) -> str | None:
    """(static, continuous) steps of six requests on two seats, by the engine's own scheduler."""
    six = Workload(name="six", num_requests=6, prompt_lens=Fixed(8), output_lens=Listed(ANSWERS))
    right = tuple(
        len(_simulated(six, lambda rows, logits, shared: 1.0, batching=batching, max_num_seqs=2).steps)
        for batching in ("static", "continuous")
    )
    try:
        given = (int(answer[0]), int(answer[1]))
    except (TypeError, ValueError, IndexError):
        return "two numbers are wanted: (static, continuous)"
    if given == right:
        return None
    if given[0] == sum(ANSWERS):
        return "that is one request after the other; two of them share each step"
    if given[0] != right[0]:
        return "the static number is not right: each pair takes as many steps as its longer answer"
    if given[1] == given[0]:
        return "continuous batching gives a seat away as soon as it is free: draw the two seats as two rows"
    return "the static number is right; for the other, draw the two seats as rows of boxes and fill them"


@exercise(difficulty=3, importance=3, minutes=10)
def gain(answer: Any, lesson: Any) -> str | None:
    """The most that continuous batching can gain with answers of 20 or 400 tokens in batches of 16."""
    mean = (1 - SHARE_LONG) * SHORT + SHARE_LONG * LONG
    none_long = (1 - SHARE_LONG) ** BATCH
    right = (none_long * SHORT + (1 - none_long) * LONG) / mean
    if not isinstance(answer, int | float):
        return "a number is wanted"
    if abs(answer / right - 1) <= 0.03:
        return None
    if abs(answer - LONG / mean) < 0.1:
        return "that is right if every batch holds a long answer; some hold none"
    if abs(answer - LONG / SHORT) < 0.1:
        return "the useful rows are those of the mean answer, not of a short one"
    return "a static batch takes as many steps as its longest answer; what is the mean of that, over batches?"


@exercise(difficulty=2, importance=2, minutes=10)
def seats(answer: Any, lesson: Any) -> str | None:
    """The least seats for P95 of TTFT below 250 ms, on the machine and the traffic of the notebook."""
    service = Workload(
        name="service",
        num_requests=300,
        prompt_lens=Uniform(16, 64),
        output_lens=LogNormal(36, 0.8, 4, 200),
        arrivals=Gamma(9.0),
        seed=6,
    )

    def p95(number: int) -> float:
        found = _simulated(
            service,
            lambda rows, logits, shared: 0.003 + 0.0008 * sum(num_new for num_new, _ in rows),
            max_num_seqs=number,
        )
        return quantiles([r.ttft_s for r in found.requests], n=20, method="inclusive")[-1]

    choices = (2, 4, 8, 16, 32)
    if answer not in choices:
        return f"one of {', '.join(map(str, choices))} is wanted"
    if p95(answer) >= P95_LIMIT_S:
        return f"with {answer} seats the P95 of TTFT is {1000 * p95(answer):,.0f} ms: they wait for a seat"
    if any(p95(fewer) < P95_LIMIT_S for fewer in choices if fewer < answer):
        return f"{answer} seats are enough, and so are fewer"
    return None
