"""A job of `ladder.measure` in a fresh process: how it is started, listened to and ended."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any


def run_job(
    job: Mapping[str, Any], *, limit_s: float, on_event: Callable[[str], None]
) -> dict[str, Any] | str:
    """A job of `ladder.measure` in a fresh process -> its result, or the reason why there is none."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        tempfile.TemporaryFile("w+", encoding="utf-8") as order,
    ):
        json.dump(job, order)
        order.seek(0)
        command = [sys.executable, "-m", "ridgeline.ladder.measure"]
        with subprocess.Popen(
            command, stdin=order, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        ) as process:
            timer = threading.Timer(limit_s, process.kill)
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    event = json.loads(line)
                    if event["event"] == "done":
                        result: dict[str, Any] = event["result"]
                        return result
                    if event["event"] == "refused":
                        return str(event["reason"])
                    on_event(event["event"])
                code = process.wait()
            finally:
                in_time = timer.is_alive()
                timer.cancel()
                process.kill()  # of no effect on one that has ended
        if not in_time:
            return f"ended after {limit_s:g} s"
        errors.seek(0)
        lines = errors.read().strip().splitlines()
        return f"its process ended with status {code}: {lines[-1] if lines else 'no message'}"
