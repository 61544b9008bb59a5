"""What goes from process to process every step comes out equal, and in few bytes."""

from __future__ import annotations

import pickle

import pytest

from ridgeline.engine.executors.parallel import Answer
from ridgeline.engine.scheduler import PlanRow, SamplingRow, StepPlan
from ridgeline.request import Sampled
from ridgeline.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.5, logit_bias={3: 1.5}, stop=["end"], stop_token_ids=[7], logprobs=2)
ROW = PlanRow("r", (5, 6), 30, (0, 4), 1, samples=True, sampling=SamplingRow(PARAMS, 1, 2, (7,)))


@pytest.mark.parametrize(
    "message",
    [
        PARAMS,
        SamplingParams(),
        StepPlan(3, (ROW, PlanRow("s", (), 0, (), 0, num_padding=2)), ("p",), ("f",)),
        Answer(4, {"r": Sampled(5, -0.25, 2, ((5, -0.25),), (((1, -0.5, 1),),))}),
    ],
)
def test_a_pickle_gives_the_same_object(message):
    assert pickle.loads(pickle.dumps(message)) == message


def test_a_value_is_not_sent_with_its_name():
    assert b"num_padding" not in pickle.dumps(ROW) and b"min_p" not in pickle.dumps(PARAMS)
    assert b"token_id" not in pickle.dumps(Sampled(5, -0.25))
