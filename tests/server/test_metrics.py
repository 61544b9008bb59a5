"""/metrics agrees with what was asked and answered."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ridgeline.server.metrics import MEANINGS

COUNTED = (
    "ridgeline_prompt_tokens_total",
    "ridgeline_generation_tokens_total",
    "ridgeline_prefix_cache_queries_total",
    "ridgeline_prefix_cache_hits_total",
    "ridgeline_time_to_first_token_seconds_count",
    "ridgeline_inter_token_latency_seconds_count",
    "ridgeline_e2e_request_latency_seconds_count",
    'ridgeline_request_success_total{finish_reason="length"}',
    'ridgeline_request_success_total{finish_reason="stop"}',
    'ridgeline_request_success_total{finish_reason="abort"}',
)


def test_names_and_kinds(server):
    reply = server.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    kinds = {family.name: family.type for family in text_string_to_metric_families(reply.text)}
    assert {name: kind for name, kind in kinds.items() if name.startswith("ridgeline_")} == {
        "ridgeline_num_requests_running": "gauge",
        "ridgeline_num_requests_waiting": "gauge",
        "ridgeline_kv_cache_usage_ratio": "gauge",
        "ridgeline_num_steps": "counter",
        "ridgeline_num_preemptions": "counter",
        "ridgeline_prompt_tokens": "counter",
        "ridgeline_generation_tokens": "counter",
        "ridgeline_prefix_cache_queries": "counter",
        "ridgeline_prefix_cache_hits": "counter",
        "ridgeline_num_evicted_blocks": "counter",
        "ridgeline_request_success": "counter",
        "ridgeline_time_to_first_token_seconds": "histogram",
        "ridgeline_inter_token_latency_seconds": "histogram",
        "ridgeline_e2e_request_latency_seconds": "histogram",
        "ridgeline_step_time_seconds": "histogram",
    }
    assert set(MEANINGS) == set(server.llm.stats.snapshot())


def test_counts_reconcile_with_usage(serve):
    with serve() as server:
        usages = []
        for max_tokens in (1, 5, 9):
            body = {"prompt": [i % 90 for i in range(70)], "max_tokens": max_tokens, "ignore_eos": True}
            usages.append(server.post("/v1/completions", json=body).json()["usage"])
        bias = {"prompt": "stop now", "max_tokens": 9, "logit_bias": {"96": 100}}
        usages.append(server.post("/v1/completions", json=bias).json()["usage"])
        stop = {"prompt": "stop now", "max_tokens": 9, "logit_bias": {"5": 100}, "stop": "$$"}
        usages.append(server.post("/v1/completions", json=stop).json()["usage"])
        server.post("/v1/completions", json={"prompt": []})
        metrics = server.metrics()
    prompt, generated, cached = (
        sum(values)
        for values in zip(
            *(
                (u["prompt_tokens"], u["completion_tokens"], u["prompt_tokens_details"]["cached_tokens"])
                for u in usages
            ),
            strict=True,
        )
    )
    assert (prompt, generated, cached) == (3 * 70 + 2 * 8, 1 + 5 + 9 + 1 + 2, 2 * 64)
    assert [metrics[name] for name in COUNTED] == [
        prompt,
        generated,
        prompt,
        cached,
        5,
        generated - 5,
        5,
        3,
        2,
        0,
    ]
    assert metrics["ridgeline_num_requests_running"] == metrics["ridgeline_kv_cache_usage_ratio"] == 0


def test_histograms_count_upwards_and_hold_plausible_times(serve):
    with serve() as server:
        for max_tokens in (1, 3):
            server.post("/v1/completions", json={"prompt": "a", "max_tokens": max_tokens})
        metrics = server.metrics()
    for name in ("time_to_first_token", "e2e_request_latency", "step_time"):
        buckets = [
            value
            for sample, value in metrics.items()
            if sample.startswith(f"ridgeline_{name}_seconds_bucket")
        ]
        assert buckets == sorted(buckets) and buckets[-1] == metrics[f"ridgeline_{name}_seconds_count"] > 0
        assert 0 < metrics[f"ridgeline_{name}_seconds_sum"] < 60
    assert metrics["ridgeline_e2e_request_latency_seconds_sum"] == pytest.approx(
        metrics["ridgeline_time_to_first_token_seconds_sum"]
        + metrics["ridgeline_inter_token_latency_seconds_sum"],
        rel=1e-6,
    )
