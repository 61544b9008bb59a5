"""Ranks under the whole engine: everything at once gives the tokens of one process, and failures stay theirs."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

from ridgeline.config import EngineConfig, LoadConfig
from ridgeline.engine.async_engine import AsyncEngine
from ridgeline.engine.engine import LLMEngine
from ridgeline.engine.executors.parallel import ParallelExecutor
from ridgeline.errors import RankError
from ridgeline.models.load import load_model
from ridgeline.models.save import save_model
from ridgeline.models.synth import synthesize
from ridgeline.sampling_params import SamplingParams
from tests.tiny import model_of, tiny_config

CROWDED = {
    "max_model_len": 256,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 32,
    "kv_cache_tokens": 256,
    "enable_prefix_caching": True,
    "num_threads": 1,
}
"""Chunks of 32 tokens, prompts with a common beginning, and a cache that is too small for six answers."""
WORLDS = {
    "tp2": {"tp_size": 2},
    "tp3": {"tp_size": 3},
    "pp2": {"pp_size": 2},
    "tp2pp2": {"tp_size": 2, "pp_size": 2},
}


def prompts(count=8):
    rng = random.Random(0)
    prefix = [rng.randrange(97) for _ in range(40)]
    return [prefix + [rng.randrange(97) for _ in range(1 + 3 * i)] for i in range(count)]


def params_of(index):
    """Greedy and sampled, with seeds of their own."""
    return SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.8 * (index % 2), seed=index)


def serve(engine):
    """All at once; a preemption at least -> tokens."""
    ids = [engine.add_request({"prompt_token_ids": p}, params_of(i)) for i, p in enumerate(prompts())]
    done = {}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None
            if output.finished:
                done[output.request_id] = output.outputs[0].token_ids
    return [done[i] for i in ids]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory for each architecture of tests.tiny, with how it is loaded again."""

    def save(name):
        config, load = tiny_config(name), LoadConfig()
        if name == "llama":
            config = tiny_config(name, o_bias=True)  # config.json has one setting for all biases
        if name == "gemma3":
            config = tiny_config(name, attn_scale=config.head_dim**-0.5)
        if name == "sinks":  # a window and sinks are options of loading
            load = LoadConfig(sliding_window=config.sliding_window, num_sinks=config.num_sinks)
            config = tiny_config(name, sliding_window=None, window_layers=(), num_sinks=0)
        path = tmp_path_factory.mktemp(name)
        save_model(model_of(config), path, kind="hf")
        return path, load

    found = {}
    return lambda name: found.setdefault(name, save(name))


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("llama", "tp2"),
        ("llama", "pp2"),
        ("gemma3", "tp3"),
        ("gemma3", "tp2pp2"),
        ("sinks", "tp2pp2"),
        ("sinks", "pp2"),
    ],
)
def test_everything_at_once_in_float64(saved, name, world):
    """Batching, chunks, prefix hits, preemption, sampling: the tokens of one process."""
    path, load = saved(name)
    options = CROWDED | {"executor": "eager", "dtype": "float64", "kv_cache_dtype": "float64"}
    options |= {"sliding_window": load.sliding_window, "num_sinks": load.num_sinks}
    one = LLMEngine(EngineConfig.from_options(str(path), **options), load_model(path, load), None)
    expected = serve(one)
    assert one.scheduler.num_preemptions > 0 or name == "sinks"
    many = LLMEngine(
        EngineConfig.from_options(str(path), **options, **WORLDS[world]), load_model(path, load), None
    )
    assert isinstance(many.executor, ParallelExecutor)
    assert serve(many) == expected
    assert len(set(many.executor.checksums())) == 1
    many.scheduler.check_invariants()
    many.close()


@pytest.fixture(scope="module")
def tiny_int4(tmp_path_factory):
    path = tmp_path_factory.mktemp("int4") / "tiny.gguf"
    return synthesize("tiny-llama", "Q4_0", path=path, num_layers=4, intermediate_size=128)


@pytest.mark.parametrize("world", ["pp2", "tp2"])
def test_int4_weights_and_an_int8_cache_on_native(tiny_int4, world):
    """Stages give the same bits as one process; sums over ranks round otherwise, and here nothing is that close."""
    options = CROWDED | {"executor": "native", "kv_cache_dtype": "int8"}
    config = EngineConfig.from_options(str(tiny_int4), **options)
    expected = serve(LLMEngine(config, load_model(tiny_int4), None))
    many = LLMEngine(config.with_options(**WORLDS[world]), load_model(tiny_int4), None)
    found = serve(many)
    assert len(set(many.executor.checksums())) == 1
    many.close()
    same = sum(
        a == b for one, other in zip(expected, found, strict=True) for a, b in zip(one, other, strict=True)
    )
    if world == "pp2":
        assert found == expected
    else:
        assert same >= 0.5 * sum(map(len, expected))


@pytest.mark.parametrize("world", ["tp2", "pp2"])
def test_what_waits_survives_a_lost_rank(tiny_int4, world):
    config = EngineConfig.from_options(
        str(tiny_int4),
        executor="native",
        max_num_seqs=2,
        max_model_len=256,
        kv_cache_tokens=1024,
        num_threads=1,
        **WORLDS[world],
    )
    engine = LLMEngine(config, load_model(tiny_int4), None)
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    alone = {}
    for prompt in prompts(4):
        engine.add_request({"prompt_token_ids": prompt}, long, request_id=str(len(prompt)))
        while engine.has_unfinished:
            for output in engine.step():
                alone[output.request_id] = list(output.outputs[0].token_ids)
    for prompt in prompts(4):
        engine.add_request({"prompt_token_ids": prompt}, long, request_id=str(len(prompt)))
    for _ in range(5):
        engine.step()
    os.kill(engine.executor.pids[1], signal.SIGKILL)
    finished = {}
    while engine.has_unfinished:
        finished |= {o.request_id: o for o in engine.step() if o.finished}
    failed = [i for i, output in finished.items() if output.error is not None]
    assert len(finished) == 4 and len(failed) == 2
    for request_id, output in finished.items():
        if request_id in failed:
            assert output.outputs[0].finish_reason == "error" and "rank 1" in output.error
        else:
            assert output.outputs[0].token_ids == alone[request_id]
    engine.scheduler.check_invariants()
    assert engine.scheduler.manager.pool.num_free == engine.scheduler.manager.pool.num_blocks
    engine.close()


def test_a_stream_ends_with_the_error_and_the_next_is_served(tiny_int4):
    config = EngineConfig.from_options(
        str(tiny_int4), executor="native", max_model_len=2048, kv_cache_tokens=4096, num_threads=1, tp_size=2
    )

    async def run():
        async with AsyncEngine(LLMEngine(config, load_model(tiny_int4), None)) as engine:
            long = SamplingParams(temperature=0, max_tokens=1900, ignore_eos=True)
            prompt = {"prompt_token_ids": [1, 2, 3]}
            with pytest.raises(RankError, match="rank 0"):
                async for output in engine.generate(prompt, long):
                    if len(output.outputs[0].token_ids) == 3:
                        os.kill(engine.engine.executor.pids[0], signal.SIGKILL)
            engine.check_health()
            short = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
            return [o async for o in engine.generate(prompt, short)][-1]

    output = asyncio.run(run())
    assert output.finished and len(output.outputs[0].token_ids) == 5
