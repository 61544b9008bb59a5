"""What was seen under load, as metrics, counts and words.

Names and definitions are those of `vllm bench serve`, but that latencies count from the scheduled arrival
(see `load`). A load generator that is busy measures itself: so its CPU time, the lateness of what it sends
and the delay of its reading are reported, and every reason to doubt a figure is a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ridgeline.bench.intervals import percentile
from ridgeline.bench.load import RequestRecord, Run
from ridgeline.bench.result import Better, Metric
from ridgeline.bench.workload import Workload

DEFINITIONS = {
    "ttft_ms": "arrival of the request to its first event with text",
    "itl_ms": "each gap between consecutive events with text, all requests pooled",
    "tpot_ms": "per request: (E2EL - TTFT) / (output tokens - 1); requests of one token have none",
    "e2el_ms": "arrival of the request to its last event with text",
    "client_queue_time_ms": "scheduled arrival to the moment before the request is written",
    "request_throughput": "answered requests / seconds from the start to the last token",
    "output_throughput": "output tokens / the same seconds",
    "total_token_throughput": "prompt and output tokens / the same seconds",
    "request_goodput": "answered requests that meet every limit of --goodput / the same seconds",
}
"""What each metric means; it is written into every result."""


def metrics(runs: Sequence[Run], limits: Mapping[str, float]) -> list[Metric]:
    """Latencies of all runs in the order of the requests, throughputs of each."""

    def metric(name: str, unit: str, better: Better, per_run: Sequence[Sequence[float]]) -> Metric:
        samples = tuple(round(sample, 6) for samples in per_run for sample in samples)
        return Metric(name, unit, better, samples, rounds=tuple(map(len, per_run)) if len(runs) > 1 else ())

    def latency(name: str) -> Metric:
        every = [[record.latencies_ms() for record in run.answered] for run in runs]
        return metric(name, "ms", "lower", [[ms[name] for ms in run if name in ms] for run in every])

    def rate(name: str, unit: str, count: Callable[[list[RequestRecord]], int]) -> Metric:
        return metric(name, unit, "higher", [[count(run.answered) / run.duration_s] for run in runs])

    def gaps(record: RequestRecord) -> list[float]:
        times = record.answer.token_times
        return [1000 * (after - before) for before, after in pairwise(times)]

    queued = [[1000 * (r.answer.sent - r.scheduled) for r in run.answered] for run in runs]
    measured = [
        latency("ttft_ms"),
        latency("tpot_ms"),
        metric("itl_ms", "ms", "lower", [[gap for r in run.answered for gap in gaps(r)] for run in runs]),
        latency("e2el_ms"),
        metric("client_queue_time_ms", "ms", "lower", queued),
        rate("request_throughput", "requests/s", len),
        rate("output_throughput", "tok/s", lambda records: sum(r.num_output_tokens for r in records)),
        rate(
            "total_token_throughput",
            "tok/s",
            lambda records: sum(r.num_prompt_tokens + r.num_output_tokens for r in records),
        ),
    ]
    if limits:
        measured.append(
            rate(
                "request_goodput",
                "requests/s",
                lambda records: sum(_is_good(record, limits) for record in records),
            )
        )
    return measured


def _is_good(record: RequestRecord, limits: Mapping[str, float]) -> bool:
    measured = record.latencies_ms()
    return all(measured.get(name, 0.0) <= limit for name, limit in limits.items())


def details(
    runs: Sequence[Run], workload: Workload, limits: Mapping[str, float], delays: Sequence[float]
) -> dict[str, Any]:
    """The rest of the document: definitions, counts, the client's own cost, warnings, every request."""
    counts, client = _counts(runs, limits), _client_cost(runs, delays)
    return {
        "definitions": DEFINITIONS,
        **counts,
        "client": client,
        "warnings": _warnings(runs, workload, counts, client),
        "requests": [_describe(record, run) for run in runs for record in run.records],
    }


def _counts(runs: Sequence[Run], limits: Mapping[str, float]) -> dict[str, Any]:
    every = [record for run in runs for record in run.records]
    answered = [record for run in runs for record in run.answered]
    cached = [n for r in answered if (n := r.answer.num_cached_tokens) is not None]
    errors = Counter(record.answer.error for record in every if record.answer.error is not None)
    return {
        "num_requests": len(every),
        "num_failed": len(every) - len(answered),
        "errors": dict(errors.most_common()),
        "num_prompt_tokens": sum(record.num_prompt_tokens for record in answered),
        "num_planned_prompt_tokens": sum(len(record.request.prompt_token_ids) for record in answered),
        "num_output_tokens": sum(record.num_output_tokens for record in answered),
        "num_events": sum(len(record.answer.token_times) for record in answered),
        "num_cached_tokens": sum(cached) if cached else None,
        "duration_s": [run.duration_s for run in runs],
        "goodput_share": sum(_is_good(r, limits) for r in answered) / len(every) if limits else None,
    }


def _client_cost(runs: Sequence[Run], delays: Sequence[float]) -> dict[str, Any]:
    late = [1000 * (r.answer.sent - r.free) for run in runs for r in run.records]
    delays_ms = [1000 * delay for delay in delays]
    return {
        "cpu_s": sum(run.client_cpu_s for run in runs),
        "cpu_share": sum(run.client_cpu_s for run in runs) / sum(run.client_wall_s for run in runs),
        "send_lateness_ms": {f"p{q}": percentile(late, q) for q in (50, 99)},
        "reading_delay_ms": {f"p{q}": percentile(delays_ms, q) for q in (50, 99)},
    }


def _warnings(
    runs: Sequence[Run], workload: Workload, counts: Mapping[str, Any], client: Mapping[str, Any]
) -> list[str]:
    """Every reason to doubt a figure, in words."""
    answered = [record for run in runs for record in run.answered]
    short = sum(record.num_output_tokens < record.request.max_tokens for record in answered)
    stand_ins = sum(not record.history_is_real for run in runs for record in run.records)
    unsaid = sum(record.answer.num_output_tokens is None for record in answered)
    cached, events, tokens = (counts[f"num_{name}"] for name in ("cached_tokens", "events", "output_tokens"))
    prompt_tokens, planned = counts["num_prompt_tokens"], counts["num_planned_prompt_tokens"]
    late_ms = client["send_lateness_ms"]["p99"]
    doubts = (
        (
            counts["num_failed"] > 0,
            f"{counts['num_failed']} OF {counts['num_requests']} REQUESTS FAILED; the metrics are of the "
            f"others. Most often: {next(iter(counts['errors']), '')}",
        ),
        (unsaid > 0, f"{unsaid} answers came without usage: their events are counted as tokens"),
        (events != tokens, f"{events} events with text for {tokens} output tokens: ITL is between events"),
        (short > 0, f"{short} answers are shorter than the workload asks for"),
        (
            stand_ins > 0,
            f"{stand_ins} later turns hold made-up answers: the server did not say the token ids of its own, "
            "or a turn before failed; --prompt-format text needs no token ids",
        ),
        (
            bool(cached) and not workload.shares_prefixes,
            f"{cached} prompt tokens came from a prefix cache though the workload shares none: a chat "
            "template begins every prompt alike, or the server has seen these; then use another --seed",
        ),
        (
            abs(prompt_tokens - planned) > 0.05 * planned,
            f"the server counts {prompt_tokens} prompt tokens, {planned} were planned; a chat template adds "
            "tokens of its own",
        ),
        (
            client["cpu_share"] > 0.5,
            f"the client was busy {client['cpu_share']:.0%} of the time; latencies include its own delays",
        ),
        (late_ms > 10, f"P99 of the lateness of sending is {late_ms:.1f} ms"),
    )
    return [text for holds, text in doubts if holds]


def _describe(record: RequestRecord, run: Run) -> dict[str, Any]:
    """One request for the document; times in seconds from the start of its run."""
    answer = record.answer
    return {
        "scheduled_s": record.scheduled - run.started,
        "sent_s": answer.sent - run.started,
        "token_times_s": [round(time - run.started, 6) for time in answer.token_times],
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_output_tokens": record.num_output_tokens,
        "num_cached_tokens": answer.num_cached_tokens,
        "conversation": record.request.conversation,
        "turn": record.request.turn,
        "finish_reason": answer.finish_reason,
        "error": answer.error,
    }


def summary(document: Mapping[str, Any]) -> str:
    """A result of `measure_serve` for people."""
    found, rows = document["details"], []
    for name, metric in document["metrics"].items():
        shown = ("mean", "median", "p95", "p99") if metric["unit"] == "ms" else ("mean",)
        figures = (metric[key] for key in shown)
        cells = "".join(f"{'-' if figure is None else format(figure, ',.2f'):>12}" for figure in figures)
        rows.append(f"{name:<24}{metric['unit']:<12}{cells}")
    client = found["client"]
    late, delay = client["send_lateness_ms"], client["reading_delay_ms"]
    return "\n".join(
        (
            f"{found['num_requests'] - found['num_failed']} of {found['num_requests']} requests answered in "
            f"{sum(found['duration_s']):.2f} s: {found['num_prompt_tokens']:,} prompt tokens "
            f"({found['num_planned_prompt_tokens']:,} planned), {found['num_output_tokens']:,} output tokens",
            f"prompts: {found['prompts']}",
            "",
            f"{'':<36}" + "".join(f"{name:>12}" for name in ("mean", "P50", "P95", "P99")),
            *rows,
            "",
            f"client: {client['cpu_share']:.1%} of one core; sends {late['p50']:.2f} ms late "
            f"(P99 {late['p99']:.2f}), reads {delay['p50']:.2f} ms late (P99 {delay['p99']:.2f})",
            *(f"WARNING: {text}" for text in found["warnings"]),
        )
    )
