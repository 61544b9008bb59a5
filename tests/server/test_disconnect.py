"""A client that goes away takes its requests with it, and their blocks are free again."""

from __future__ import annotations

import json
import socket
import time

import pytest

IDLE = {
    "ridgeline_num_requests_running": 0.0,
    "ridgeline_num_requests_waiting": 0.0,
    "ridgeline_kv_cache_usage_ratio": 0.0,
}


def gauges(server):
    metrics = server.metrics()
    return {name: metrics[name] for name in IDLE}


def until(condition, *, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def send(server, **body):
    content = json.dumps({"ignore_eos": True, "max_tokens": 250, **body}).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: tiny\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def slow_down(server, monkeypatch):
    """Steps of 50 ms: 250 tokens take longer than `until` waits, so what is gone was aborted."""
    submit = server.llm.executor.submit

    def slow_submit(plan):
        time.sleep(0.05)
        return submit(plan)

    monkeypatch.setattr(server.llm.executor, "submit", slow_submit)


@pytest.mark.parametrize("reset", [False, True])
def test_a_streaming_client_disconnects(server, monkeypatch, reset):
    slow_down(server, monkeypatch)
    with send(server, prompt=[5] * 40, n=2, stream=True) as connection:
        received = b""
        while received.count(b"data: ") < 4:
            received += connection.recv(4096)
        during = gauges(server)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    assert during["ridgeline_num_requests_running"] == 2
    assert during["ridgeline_kv_cache_usage_ratio"] > 0
    until(lambda: gauges(server) == IDLE)
    server.llm.scheduler.check_invariants()


def test_a_client_that_waits_for_a_whole_answer_disconnects(server, monkeypatch):
    slow_down(server, monkeypatch)
    with send(server, prompt=[[5], [6]]):
        until(lambda: gauges(server)["ridgeline_num_requests_running"] == 2)
    until(lambda: gauges(server) == IDLE)


def test_waiting_requests_go_too(server, monkeypatch):
    slow_down(server, monkeypatch)
    connections = [send(server, prompt=[5, i], stream=bool(i % 2)) for i in range(12)]
    until(lambda: gauges(server)["ridgeline_num_requests_waiting"] == 4)
    for connection in reversed(connections):
        connection.close()
    until(lambda: gauges(server) == IDLE)
    assert server.post("/v1/completions", json={"prompt": [5], "max_tokens": 2}).status_code == 200


def test_a_client_that_goes_in_the_middle_of_its_body(server, caplog):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: tiny\r\nContent-Length: 99\r\n\r\n{")
        time.sleep(0.05)
    time.sleep(0.1)
    assert caplog.text == ""
    assert server.get("/health").status_code == 200


def test_aborted_requests_are_counted(server, monkeypatch):
    name = 'ridgeline_request_success_total{finish_reason="abort"}'
    before = server.metrics().get(name, 0.0)
    slow_down(server, monkeypatch)
    with send(server, prompt=[5], stream=True) as connection:
        connection.recv(4096)
    until(lambda: server.metrics().get(name, 0.0) == before + 1)
