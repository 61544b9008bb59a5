"""Do parallel engines survive? Ranks are killed, stopped and cut off at random moments while they generate.

Each trial strikes once during long requests, and then wants: a RankError within 5 s that ends them, no
process left of the old ranks, and the same greedy tokens as before from new ranks. Ranks are on this host
(shared memory) and on two (network namespaces joined by a cable, gloo), where the cable is cut too: that
needs root and iproute2. At the end nothing may be left in /dev/shm, of processes, or listening.

    python scripts/check_failures.py -m smollm2 --trials 30 --out docs/results/failures.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ridgeline.errors import RankError
from ridgeline.llm import LLM
from ridgeline.sampling_params import SamplingParams

NOTICED_S = 5.0
RECOVERED_S = 120.0
LATEST_STRIKE_S = 1.0
PROMPTS = [{"prompt_token_ids": list(range(10, 10 + n))} for n in (3, 40, 200)]
SHORT = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=1800, temperature=0.0, ignore_eos=True)
ADDRESS, NETWORK = "10.77.7.1", "10.77.7.{}/24"
PLACES = {"one host": ("kill", "stop"), "two hosts": ("kill", "stop", "cut")}


def drive(model: str, parallel: Mapping[str, int]) -> None:
    """The engine of all trials: says in lines of JSON what it is doing, and waits for a line between them."""

    def say(**fields: Any) -> None:
        print(json.dumps({"at": time.monotonic(), **fields}), flush=True)

    with LLM(
        model, executor="native", max_model_len=2048, kv_cache_tokens=8192, num_threads=1, **parallel
    ) as llm:
        tokens = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, SHORT)]
        while True:
            say(event="ready", pids=llm.engine.executor.pids)  # type: ignore[attr-defined]
            if not sys.stdin.readline().strip():
                return
            say(event="running")
            try:
                llm.generate(PROMPTS, LONG)
                say(event="survived")
            except RankError as error:
                say(event="lost", message=str(error).splitlines()[0])
            while True:
                try:
                    again = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, SHORT)]
                    break
                except RankError as error:
                    say(event="waiting", message=str(error).splitlines()[0])
            say(event="recovered", same=again == tokens)


class Trials:
    """One engine in processes of its own, struck again and again."""

    def __init__(self, model: str, parallel: Mapping[str, int], hosts: Sequence[tuple[str, ...]]) -> None:
        world_size = parallel.get("tp_size", 1) * parallel.get("pp_size", 1)
        command = [sys.executable, __file__, "-m", model, "--drive", json.dumps(parallel)]
        self._processes = []
        for rank in range(world_size if hosts else 1):
            torchrun = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": ADDRESS, "MASTER_PORT": 29600}
            self._processes.append(
                subprocess.Popen(
                    [*(hosts[rank] if hosts else ()), *command],
                    env={**os.environ, **({k: str(v) for k, v in torchrun.items()} if hosts else {})},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        self._pids = self._expect("ready")["pids"]

    def _expect(self, *events: str) -> dict[str, Any]:
        output = self._processes[0].stdout
        assert output is not None
        for line in output:
            said: dict[str, Any] = json.loads(line)
            if said["event"] in events:
                return said
            assert said["event"] == "waiting", said
        raise AssertionError(f"the driver ended; expected {events}")

    def _order(self, line: str) -> None:
        orders = self._processes[0].stdin
        assert orders is not None
        orders.write(line + "\n")
        orders.flush()

    def strike(self, kind: str, rng: random.Random) -> dict[str, Any]:
        """One trial -> what happened and how long it took."""
        self._order("go")
        begun = self._expect("running")["at"]
        moment = rng.uniform(0.0, LATEST_STRIKE_S)
        time.sleep(moment)
        victim = rng.choice(self._pids)
        if kind == "cut":
            set_cable("down")
        else:
            os.kill(victim, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
        struck = time.monotonic()
        lost = self._expect("lost", "survived")
        left = wait_until_gone(self._pids)
        if kind == "cut":
            set_cable("up")
        repaired = time.monotonic()
        recovered = self._expect("recovered")
        self._pids = self._expect("ready")["pids"]
        return {
            "kind": kind,
            "moment_s": struck - begun,
            "noticed_s": lost["at"] - struck,
            "recovered_s": recovered["at"] - repaired,
            "message": lost.get("message"),
            "left": left,
            "ok": lost["event"] == "lost"
            and lost["at"] - struck < NOTICED_S
            and not left
            and recovered["same"]
            and recovered["at"] - repaired < RECOVERED_S,
        }

    def close(self) -> None:
        if self._processes[0].poll() is None:
            self._order("")
        for process in self._processes:
            process.wait(timeout=60)
        assert not wait_until_gone(self._pids), "ranks outlived their engine"


def wait_until_gone(pids: Sequence[int], limit_s: float = NOTICED_S) -> list[int]:
    """Those that still run after the limit; a zombie does not."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + limit_s
    while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def namespaces() -> list[str]:
    return [f"ridgeline{os.getpid()}{side}" for side in "ab"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def set_cable(state: str) -> None:
    ip("-n", namespaces()[0], "link", "set", "cable", state)


@contextmanager
def two_hosts() -> Iterator[list[tuple[str, ...]]]:
    """Two network namespaces joined by a cable -> the beginning of a command for each."""
    names = namespaces()
    try:
        for name in names:
            ip("netns", "add", name)
        near, far = names
        ip("link", "add", "cable", "netns", near, "type", "veth", "peer", "name", "cable", "netns", far)
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", NETWORK.format(number), "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def left_behind() -> set[str]:
    """What a failure could leave: files in shared memory, listening TCP ports."""
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line
    ]
    return {*os.listdir("/dev/shm"), *listening}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="smollm2")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--drive", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive is not None:
        drive(options.model, options.drive)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # take the namespaces away then too
    rng, before, results = random.Random(options.seed), left_behind(), []
    turns = [(place, parallel) for place in options.places for parallel in ({"tp_size": 2}, {"pp_size": 2})]
    for number, (place, parallel) in enumerate(turns):
        num_trials = options.trials // len(turns) + (number < options.trials % len(turns))
        with two_hosts() if place == "two hosts" else nothing() as hosts:
            trials = Trials(options.model, parallel, hosts)
            try:
                for trial in range(num_trials):
                    kind = PLACES[place][trial % len(PLACES[place])]
                    results.append({"place": place, **parallel, **trials.strike(kind, rng)})
                    print(json.dumps(results[-1]), flush=True)
            finally:
                trials.close()
    left = left_behind() - before
    passed = sum(result["ok"] for result in results)
    print(f"{passed} of {len(results)} recovered; left behind: {sorted(left) or 'nothing'}")
    if options.out:
        options.out.write_text(json.dumps({"trials": results, "left_behind": sorted(left)}, indent=1) + "\n")
    sys.exit(passed < len(results) or bool(left))


@contextmanager
def nothing() -> Iterator[list[tuple[str, ...]]]:
    yield []


if __name__ == "__main__":
    main()
