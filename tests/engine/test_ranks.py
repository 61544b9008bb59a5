"""Engines over several rank processes: launch, agreement, failures of every kind, and what is left behind.

That sharded arithmetic is right is tested in `test_parallel_math`; here the ranks are real processes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ridgeline.config import EngineConfig, ParallelConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.engine.executors.parallel import ParallelExecutor
from ridgeline.errors import ConfigError, RankError
from ridgeline.llm import LLM
from ridgeline.models.synth import synthesize
from ridgeline.sampling_params import SamplingParams
from tests.tiny import tiny_model
from tests.unit.test_launch import NOTICED_S, is_running, wait_until_gone

ROOT = Path(__file__).parents[2]
PROMPTS = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 7, 40, 90)]
SHORT = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=1900, temperature=0.0, ignore_eos=True)
OPTIONS = {"max_model_len": 2048, "kv_cache_tokens": 8192, "max_num_batched_tokens": 64, "num_threads": 1}
WORLDS = {"tp2": {"tp_size": 2}, "pp2": {"pp_size": 2}, "tp2pp2": {"tp_size": 2, "pp_size": 2}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("ranks") / "tiny.gguf"
    synthesize("tiny-llama", "Q8_0", path=path, num_layers=4, intermediate_size=128)
    return str(path)


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    with LLM(model, executor="eager", dtype="float64", **OPTIONS) as llm:
        return tokens(llm.generate(PROMPTS, SHORT))


def group_of(llm: LLM) -> ParallelExecutor:
    assert isinstance(llm.engine.executor, ParallelExecutor)
    return llm.engine.executor


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("executor", "collectives"),
    [("native", "shared"), ("native", "gloo"), ("eager", "shared"), ("eager", "gloo")],
)
def test_ranks_agree_and_give_the_tokens_of_one_process(
    model, expected, monkeypatch, world, executor, collectives
):
    monkeypatch.setenv("RIDGELINE_COLLECTIVES", collectives)
    options = {"executor": executor} | ({"dtype": "float64"} if executor == "eager" else {})
    if executor == "native":
        with LLM(model, **OPTIONS, **options) as llm:
            expected = tokens(llm.generate(PROMPTS, SHORT))
    with LLM(model, **OPTIONS, **options, **WORLDS[world]) as llm:
        assert tokens(llm.generate(PROMPTS, SHORT)) == expected
        group = group_of(llm)
        checksums = group.checksums()
        assert len(checksums) == ParallelConfig(**WORLDS[world]).world_size
        assert len(set(checksums)) == 1 and checksums[0] != 0
        traffic = group.communication()
        for place, ops in zip(group._places, traffic, strict=True):
            assert ("all_reduce" in ops) == (place.tp_size > 1)
            assert ("send" in ops) == (not place.is_last_stage)
            assert ("receive" in ops) == (not place.is_first_stage)
            assert all(t.num_calls > 0 and t.num_bytes > 0 and t.seconds > 0 for t in ops.values())
        for usage in group.memory():
            assert 0 < usage["pss_bytes"] <= usage["rss_bytes"] <= usage["peak_rss_bytes"] < 4 << 30


def test_plans_in_flight_are_answered_in_their_order(model, monkeypatch):
    """Three plans are posted before the first result is asked for, and a question in between."""
    with LLM(model, executor="native", **OPTIONS) as llm:
        plans = []
        submit = llm.engine.executor.submit
        monkeypatch.setattr(llm.engine.executor, "submit", lambda plan: plans.append(plan) or submit(plan))
        llm.generate(PROMPTS[:1], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
        single = [submit(plan).result() for plan in plans]
    with LLM(model, executor="native", pp_size=2, **OPTIONS) as llm:
        handles = [llm.engine.executor.submit(plan) for plan in plans]
        assert len(set(group_of(llm).checksums())) == 1
        assert [handle.result() for handle in handles] == single


@pytest.mark.parametrize("world", ["tp2", "pp2"])
def test_ranks_lost_at_random_moments_are_replaced(model, world):
    rng = random.Random(6)
    with LLM(model, executor="native", **OPTIONS, **WORLDS[world]) as llm:
        expected = tokens(llm.generate(PROMPTS, SHORT))
        for trial in range(5):
            number = (signal.SIGKILL, signal.SIGSTOP)[trial % 2]
            pids = group_of(llm).pids
            victim = rng.choice(pids)
            killed = []

            def strike(victim=victim, number=number, killed=killed):
                os.kill(victim, number)
                killed.append(time.monotonic())

            timer = threading.Timer(rng.uniform(0.0, 0.2), strike)
            timer.start()
            with pytest.raises(RankError, match=f"pid {victim}"):
                llm.generate(PROMPTS, LONG)
            assert time.monotonic() - killed[0] < NOTICED_S
            wait_until_gone(pids, 1.0)
            assert tokens(llm.generate(PROMPTS, SHORT)) == expected
        pids = group_of(llm).pids
    assert not any(map(is_running, pids))


def test_a_model_in_memory_cannot_be_opened_by_ranks():
    with pytest.raises(ConfigError, match="save it"):
        LLMEngine(EngineConfig.from_options("tiny", tp_size=2), tiny_model("llama"), None)


def test_what_cannot_be_cut_is_said_before_anything_starts(model):
    with pytest.raises(ConfigError, match="tp_size=5"):
        LLM(model, executor="native", tp_size=5, **OPTIONS)


SCRIPT = """
import os, sys, time
from ridgeline.llm import LLM
from ridgeline.sampling_params import SamplingParams
from tests.engine.test_ranks import OPTIONS, PROMPTS, SHORT, LONG, tokens
from ridgeline.errors import RankError
model, *flags = sys.argv[1:]
llm = LLM(model, executor="native", tp_size=2, **OPTIONS)
print("pids", *llm.engine.executor.pids, flush=True)
"""


def run_script(
    body: str, model: str, *, prefix: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen:
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", SCRIPT + body, model],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_pids(driver: subprocess.Popen) -> list[int]:
    word, *pids = driver.stdout.readline().split() or ("nothing",)
    assert word == "pids", driver.communicate(timeout=10)
    return [int(pid) for pid in pids]


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("print(tokens(llm.generate(PROMPTS[0], SHORT)))", None),
        ("raise ValueError('of the user')", None),
        ("llm.generate(PROMPTS, LONG)", signal.SIGINT),
        ("llm.generate(PROMPTS, LONG)", signal.SIGTERM),
        ("llm.generate(PROMPTS, LONG)", signal.SIGKILL),
    ],
    ids=["exits without close", "raises", "ctrl-C", "TERM", "KILL"],
)
def test_nothing_is_left_behind_however_the_driver_ends(model, body, number):
    shared_before = set(os.listdir("/dev/shm"))
    driver = run_script(body, model)
    try:
        pids = read_pids(driver)
        if number is not None:
            time.sleep(0.3)
            driver.send_signal(number)
        _, stderr = driver.communicate(timeout=60)
    finally:
        driver.kill()
    wait_until_gone(pids, 2.0)
    assert set(os.listdir("/dev/shm")) <= shared_before
    if number is None:
        assert driver.returncode == int("raise" in body), stderr
        assert ("ValueError: of the user" in stderr) == ("raise" in body)
        assert "ResourceWarning" not in stderr


def torchrun_environment(rank: int, host: str, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": str(port)}


GENERATE = "print(tokens(llm.generate(PROMPTS, SHORT)))"


@pytest.fixture(scope="module")
def native_tokens(model) -> list[list[int]]:
    with LLM(model, executor="native", **OPTIONS) as llm:
        return tokens(llm.generate(PROMPTS, SHORT))


def test_torchrun_on_one_host(model, native_tokens, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}{GENERATE}\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            model,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("pids") and lines[1:] == [str(native_tokens)]  # once, by the driver


def test_torchrun_with_another_number_of_processes(model):
    driver = run_script(GENERATE, model, **torchrun_environment(0, "127.0.0.1", 29400) | {"WORLD_SIZE": "3"})
    _, stderr = driver.communicate(timeout=60)
    assert "ConfigError" in stderr and "tp_size * pp_size is 2" in stderr


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a cable, with an address each; calls `ip` in the first as `link(...)`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    names = [f"rl{os.getpid()}{side}" for side in "ab"]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        ip("netns", "add", names[1])
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.6.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        prefixes = [("ip", "netns", "exec", name) for name in names]
        yield prefixes, lambda state: ip("-n", names[0], "link", "set", "cable", state)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


SURVIVE = """
print(tokens(llm.generate(PROMPTS, SHORT)), flush=True)
while True:
    try:
        llm.generate(PROMPTS, LONG)
    except RankError as error:
        print("lost", str(error).splitlines()[0], flush=True)
        break
sys.stdin.readline()  # the cable is back
for _ in range(20):
    try:
        print(tokens(llm.generate(PROMPTS, SHORT)), flush=True)
        break
    except RankError as error:
        print("still lost", str(error).splitlines()[0], file=sys.stderr, flush=True)
"""


def test_two_hosts_and_a_cut_cable(model, native_tokens, two_hosts):
    prefixes, link = two_hosts
    ends = [
        subprocess.Popen(
            [*prefix, sys.executable, "-c", SCRIPT + SURVIVE, model],
            cwd=ROOT,
            env={**os.environ, **torchrun_environment(rank, "10.77.6.1", 29500)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, prefix in enumerate(prefixes)
    ]
    driver, agent = ends
    try:
        pids = read_pids(driver)
        assert driver.stdout.readline().strip() == str(native_tokens)
        time.sleep(0.5)
        link("down")
        cut = time.monotonic()
        assert driver.stdout.readline().startswith("lost rank 1")
        assert time.monotonic() - cut < NOTICED_S
        wait_until_gone(pids)  # on both sides of the cut
        link("up")
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.stdout.readline().strip() == str(native_tokens), driver.communicate(timeout=60)
        for end in ends:
            _, stderr = end.communicate(timeout=60)
            assert end.returncode == 0, stderr
    finally:
        for end in ends:
            end.kill()
            end.communicate()
