"""What /metrics says: the engine's statistics under vLLM's names, with our prefix, for Prometheus.

`EngineStats` counts; here its plain snapshot is only spelled out, when the page is asked for. The kind of a
metric follows from the end of its name: _total counts, _seconds is a histogram, anything else is a gauge.
Each app has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

MEANINGS = {
    "num_requests_running": "Requests that have a place in the batch.",
    "num_requests_waiting": "Requests that wait for one.",
    "kv_cache_usage_ratio": "Blocks that requests hold, of all blocks; 1 is full.",
    "num_steps_total": "Steps of the engine.",
    "num_preemptions_total": "Times that a request lost its blocks to others.",
    "prompt_tokens_total": "Prompt tokens of requests that gave a first token.",
    "generation_tokens_total": "Tokens generated.",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Prompt tokens that were found there.",
    "num_evicted_blocks_total": "Cached blocks given to other content.",
    "request_success_total": "Requests that ended, by the reason.",
    "time_to_first_token_seconds": "From arrival to the first token.",
    "inter_token_latency_seconds": "Between consecutive tokens of a request.",
    "e2e_request_latency_seconds": "From arrival to the end.",
    "step_time_seconds": "One step of the engine.",
}


class Metrics(Collector):
    """Owns a registry with one collector: itself."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, snapshot: Callable[[], Mapping[str, Any]]) -> None:
        """`snapshot` is that of `EngineStats`."""
        self._snapshot = snapshot
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def page(self) -> bytes:
        """The metrics of this moment, in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        for name, value in self._snapshot().items():
            full_name, meaning = f"ridgeline_{name}", MEANINGS.get(name, name)
            if name.endswith("_seconds"):
                yield _histogram(full_name, meaning, value)
            elif name.endswith("_total"):
                yield _counter(full_name, meaning, value)
            else:
                yield GaugeMetricFamily(full_name, meaning, value=value)


def _counter(name: str, meaning: str, value: float | Mapping[str, float]) -> Metric:
    """One number, or one for each reason to finish."""
    if not isinstance(value, Mapping):
        return CounterMetricFamily(name, meaning, value=value)
    family = CounterMetricFamily(name, meaning, labels=["finish_reason"])
    for label, count in value.items():
        family.add_metric([label], count)
    return family


def _histogram(name: str, meaning: str, value: Mapping[str, Any]) -> Metric:
    """Prometheus counts upwards: each bucket with all below it."""
    bounds = [*value["bounds"], float("inf")]
    buckets = list(zip(map(floatToGoString, bounds), accumulate(value["counts"]), strict=True))
    return HistogramMetricFamily(name, meaning, buckets=buckets, sum_value=value["sum"])
