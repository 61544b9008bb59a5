"""AsyncEngine over an engine of plain Python with known answers: output token i is the prompt's length + i."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from ridgeline.engine.async_engine import AsyncEngine
from ridgeline.errors import EngineDeadError, RequestError
from ridgeline.request import CompletionOutput, RequestMetrics, RequestOutput
from ridgeline.sampling_params import SamplingParams


class FakeTokenizer:
    def encode(self, text, *, add_special_tokens=True):
        self.thread = threading.current_thread().name
        return list(text.encode())


class FakeEngine:
    """The methods of LLMEngine. Notes which thread calls them and how often it steps."""

    def __init__(self, *, step_s=0.0, fail_at=None):
        self.tokenizer = FakeTokenizer()
        self.running: dict[str, tuple[RequestOutput, SamplingParams]] = {}
        self.aborted: list[str] = []
        self.threads: set[str] = set()
        self.num_steps = 0
        self.closed = False
        self.step_s = step_s
        self.fail_at = fail_at

    def add_request(self, prompt, params=None, *, request_id, priority=0, arrival_time=None):
        self.threads.add(threading.current_thread().name)
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if not ids:
            raise RequestError(f"bad prompt: {prompt!r}")
        if ids == [666]:
            raise ZeroDivisionError("a bug")
        if request_id in self.running:
            raise RequestError(f"request id {request_id!r} is already in use")
        output = RequestOutput(request_id, None, ids, [CompletionOutput(0)], RequestMetrics(arrival_time))
        self.running[request_id] = output, params or SamplingParams()
        return request_id

    def abort(self, request_id):
        if request_id not in self.running:
            return None
        self.aborted.append(request_id)
        output, _ = self.running.pop(request_id)
        output.finished, output.outputs[0].finish_reason = True, "abort"
        return output

    @property
    def has_unfinished(self):
        return bool(self.running)

    def step(self):
        self.threads.add(threading.current_thread().name)
        self.num_steps += 1
        time.sleep(self.step_s)
        if self.num_steps == self.fail_at:
            raise RuntimeError("the executor fell over")
        outputs = []
        for request_id, (output, params) in list(self.running.items()):
            choice = output.outputs[0]
            choice.token_ids.append(len(output.prompt_token_ids) + len(choice.token_ids))
            choice.text += "x"
            if len(choice.token_ids) == params.max_tokens:
                output.finished, choice.finish_reason = True, "length"
                del self.running[request_id]
            outputs.append(output)
        return outputs

    def close(self):
        self.closed = True


def run(engine, scenario):
    async def inside():
        async with asyncio.timeout(20), AsyncEngine(engine) as async_engine:
            return await scenario(async_engine)

    return asyncio.run(inside())


def tokens(max_tokens):
    return SamplingParams(max_tokens=max_tokens)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_outputs_are_cumulative_copies_and_the_prompt_comes_along():
    engine = FakeEngine(step_s=0.005)

    async def scenario(async_engine):
        return [output async for output in async_engine.generate("abc", tokens(5))]

    outputs = run(engine, scenario)
    assert [o.outputs[0].token_ids for o in outputs] == [[3, 4, 5, 6, 7][: i + 1] for i in range(5)]
    assert [o.finished for o in outputs] == [False] * 4 + [True]
    assert outputs[-1].prompt == "abc" and outputs[-1].outputs[0].finish_reason == "length"


def test_one_thread_owns_the_engine_and_another_tokenizes():
    engine = FakeEngine()

    async def scenario(async_engine):
        async for _ in async_engine.generate("abc", tokens(2)):
            pass
        return async_engine._thread

    thread = run(engine, scenario)
    assert engine.threads == {"ridgeline-engine"}
    assert engine.tokenizer.thread not in ("MainThread", "ridgeline-engine")
    assert engine.closed and not thread.is_alive()


def test_an_idle_engine_sleeps():
    engine = FakeEngine()

    async def scenario(async_engine):
        async for _ in async_engine.generate({"prompt_token_ids": [1]}, tokens(3)):
            pass
        before, cpu = engine.num_steps, time.process_time()
        await asyncio.sleep(0.2)
        assert engine.num_steps == before == 3
        assert time.process_time() - cpu < 0.1

    run(engine, scenario)


def test_a_slow_consumer_gets_the_newest_state_and_misses_nothing():
    engine = FakeEngine()

    async def scenario(async_engine):
        seen = []
        async for output in async_engine.generate({"prompt_token_ids": [1]}, tokens(50)):
            seen.append(output.outputs[0].token_ids)
            await asyncio.sleep(0.02)
        assert len(seen) < 50
        assert seen[-1] == list(range(1, 51))

    run(engine, scenario)


def test_every_step_false_wakes_only_for_the_end():
    engine = FakeEngine(step_s=0.002)

    async def scenario(async_engine):
        prompts = [{"prompt_token_ids": [1] * length} for length in (1, 2, 3)]
        return [pair async for pair in async_engine.generate_all(prompts, tokens(4), every_step=False)]

    outputs = run(engine, scenario)
    assert sorted(index for index, _ in outputs) == [0, 1, 2]
    assert all(o.finished and o.outputs[0].token_ids[0] == index + 1 for index, o in outputs)


@pytest.mark.parametrize("prompt", ["", {"prompt_token_ids": []}, {}, 5, {"prompt_token_ids": [666]}])
def test_a_bad_request_is_its_callers_error_and_nobody_elses(prompt):
    engine = FakeEngine(step_s=0.001)

    async def scenario(async_engine):
        good = async_engine.generate({"prompt_token_ids": [1]}, tokens(20))
        await anext(good)
        with pytest.raises((RequestError, ZeroDivisionError)):
            await anext(async_engine.generate(prompt))
        last = [o async for o in good][-1]
        assert last.outputs[0].token_ids == list(range(1, 21))
        async_engine.check_health()

    run(engine, scenario)


def test_prompts_are_served_all_or_none():
    engine = FakeEngine(step_s=0.001)

    async def scenario(async_engine):
        prompts = [{"prompt_token_ids": [1]}, {"prompt_token_ids": []}]
        with pytest.raises(RequestError):
            await anext(async_engine.generate_all(prompts, tokens(10_000)))
        await until(lambda: not engine.running)
        assert len(engine.aborted) == 1

    run(engine, scenario)


def test_a_request_id_in_use_is_refused_and_the_first_goes_on():
    engine = FakeEngine(step_s=0.001)

    async def scenario(async_engine):
        first = async_engine.generate({"prompt_token_ids": [1]}, tokens(30), request_id="mine")
        await anext(first)
        with pytest.raises(RequestError, match="already in use"):
            await anext(async_engine.generate({"prompt_token_ids": [1]}, request_id="mine"))
        assert len([o async for o in first][-1].outputs[0].token_ids) == 30
        assert engine.aborted == []

    run(engine, scenario)


@pytest.mark.parametrize("leave", ["close", "cancel"])
def test_leaving_aborts_the_request(leave):
    engine = FakeEngine(step_s=0.001)

    async def scenario(async_engine):
        started = asyncio.Event()

        async def consume():
            async with aclosing(async_engine.generate({"prompt_token_ids": [1]}, tokens(100_000))) as outputs:
                async for _ in outputs:
                    started.set()
                    if leave == "close":
                        break

        task = asyncio.create_task(consume())
        await started.wait()
        if leave == "cancel":
            task.cancel()
        await asyncio.wait([task])
        await until(lambda: not engine.running)
        assert engine.aborted == ["req-0"]
        assert async_engine._routes == {} and async_engine._open == set()

    run(engine, scenario)


def test_leaving_after_the_end_aborts_nothing():
    engine = FakeEngine()

    async def scenario(async_engine):
        async for _ in async_engine.generate({"prompt_token_ids": [1]}, tokens(3)):
            pass

    run(engine, scenario)
    assert engine.aborted == []


def test_abort_ends_the_iteration_with_finish_reason_abort():
    engine = FakeEngine(step_s=0.001)

    async def scenario(async_engine):
        last = None
        async for output in async_engine.generate({"prompt_token_ids": [1]}, tokens(100_000), request_id="r"):
            last = output
            async_engine.abort("r")
        assert last is not None and last.finished and last.outputs[0].finish_reason == "abort"
        async_engine.abort("never heard of")
        await asyncio.sleep(0.01)
        async_engine.check_health()

    run(engine, scenario)


def test_an_exception_in_a_step_ends_every_request_and_all_that_follow(caplog):
    engine = FakeEngine(step_s=0.001, fail_at=5)

    async def scenario(async_engine):
        async def consume(length):
            return [o async for o in async_engine.generate({"prompt_token_ids": [1] * length}, tokens(100))]

        ended = await asyncio.gather(*(consume(i) for i in (1, 2, 3)), return_exceptions=True)
        for error in ended:
            assert isinstance(error, EngineDeadError) and "RuntimeError: the executor fell over" in str(error)
        for call in (
            async_engine.check_health,
            lambda: async_engine.abort("req-0"),
        ):
            with pytest.raises(EngineDeadError, match="fell over"):
                call()
        with pytest.raises(EngineDeadError, match="fell over"):
            await anext(async_engine.generate({"prompt_token_ids": [1]}))

    run(engine, scenario)
    assert "the executor fell over" in caplog.text
    assert engine.closed


def test_what_came_before_an_error_is_delivered_before_it(caplog):
    engine = FakeEngine(fail_at=4)

    async def scenario(async_engine):
        seen = []
        with pytest.raises(EngineDeadError):
            async for output in async_engine.generate({"prompt_token_ids": [1]}, tokens(100)):
                seen.append(output.outputs[0].token_ids)
                time.sleep(0.05)  # keeps the event loop from taking outputs until the engine has died
        assert seen[-1] == [1, 2, 3]

    run(engine, scenario)


def test_shutdown_ends_what_is_running():
    engine = FakeEngine(step_s=0.001)

    async def scenario():
        async_engine = AsyncEngine(engine)
        with pytest.raises(EngineDeadError, match="not started"):
            await anext(async_engine.generate({"prompt_token_ids": [1]}))
        async_engine.start()
        outputs = async_engine.generate({"prompt_token_ids": [1]}, tokens(100_000))
        await anext(outputs)
        await async_engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            async for _ in outputs:
                pass
        await async_engine.shutdown()

    asyncio.run(scenario())
    assert engine.closed and engine.running == {}


def test_many_requests_at_once_keep_their_outputs_apart():
    engine = FakeEngine()

    async def scenario(async_engine):
        async def consume(length):
            outputs = [
                o async for o in async_engine.generate({"prompt_token_ids": [1] * length}, tokens(length))
            ]
            return outputs[-1].outputs[0].token_ids

        return await asyncio.gather(*(consume(length) for length in range(1, 101)))

    assert run(engine, scenario) == [list(range(i, 2 * i)) for i in range(1, 101)]
