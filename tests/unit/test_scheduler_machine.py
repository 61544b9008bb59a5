"""The scheduler as a state machine: whatever is added, aborted and stepped, every answer is the right one."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ridgeline.errors import RequestError
from tests.fake_executor import Simulation

MAX_MODEL_LEN = 28


@st.composite
def simulations(draw) -> Simulation:
    """Every combination of switches that EngineConfig.resolve allows, in sizes that are just too small."""
    batching = draw(st.sampled_from(("continuous", "continuous", "none", "static")))
    kv_cache = draw(st.sampled_from((True, True, True, False)))
    chunked = kv_cache and batching != "static" and draw(st.booleans())
    max_num_seqs = 1 if batching == "none" else draw(st.integers(1, 5))
    window = draw(st.sampled_from((None, None, 1, 3, 6)))
    return Simulation(
        num_blocks=draw(st.integers(3, 14)),
        block_size=draw(st.integers(2, 4)),
        batching=batching,
        max_num_seqs=max_num_seqs,
        budget=draw(st.integers(max_num_seqs if chunked else MAX_MODEL_LEN, 40)),
        chunked=chunked,
        prefix=kv_cache and batching == "continuous" and draw(st.booleans()),
        kv_cache=kv_cache,
        window=window,
        num_sinks=draw(st.sampled_from((0, 1, 3))) if window else 0,
        max_model_len=MAX_MODEL_LEN,
        eos=draw(st.sampled_from(((), (7,), tuple(range(8))))),
        hash_function=draw(st.sampled_from((Simulation.__init__.__kwdefaults__["hash_function"], _constant))),
    )


def _constant(parent: bytes, token_ids) -> bytes:
    return b"same"


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(simulation=simulations())
    def begin(self, simulation):
        self.simulation = simulation

    @rule(
        shared=st.integers(0, 16),
        own=st.lists(st.integers(0, 3), max_size=8),
        priority=st.integers(-1, 1),
        max_tokens=st.sampled_from((1, 2, 5, 20, None)),
        min_tokens=st.integers(0, 1),
        prompt_logprobs=st.sampled_from((None, None, None, 0)),
        stop_token_ids=st.sampled_from(((), (), (11, 12, 13))),
    )
    def add(self, shared, own, **params):
        """Many prompts share their first tokens."""
        try:
            self.simulation.add([i % 3 for i in range(shared)] + own, **params)
        except RequestError as error:
            assert str(shared + len(own)) in str(error) or "empty" in str(error)

    @rule(choice=st.integers(0, 1000))
    def abort(self, choice):
        """Any request: waiting, running, preempted or over."""
        live = [n for n, r in self.simulation.requests.items() if r.finish_reason is None]
        if live:
            self.simulation.abort(live[choice % len(live)])

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.simulation.step()

    @rule(choice=st.integers(0, 1000))
    def abort_in_flight(self, choice):
        """An abort between deciding and recording."""
        plan = self.simulation.scheduler.schedule()
        sampled = self.simulation.execute(plan)
        if plan.rows:
            self.simulation.abort(plan.rows[choice % len(plan.rows)].request_id)
        self.simulation.scheduler.update(plan, sampled)

    @invariant()
    def holds(self):
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check_invariants()

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.run()


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
TestScheduler = SchedulerMachine.TestCase
