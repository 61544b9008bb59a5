"""SamplingParams: what is refused and with which words, what is brought to one form, and that it travels."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields
from fractions import Fraction
from typing import Any

import pytest

from ridgeline.errors import RequestError
from ridgeline.sampling_params import SamplingParams

NAN, INF = math.nan, math.inf

REFUSED: dict[str, list[Any]] = {
    "n": [0, -1, 1.0, "1", None, True, 10**6],
    "temperature": [-0.1, NAN, INF, -INF, "1", None, False, 10**400],
    "top_k": [-2, 1.5, None, True],
    "top_p": [0, -0.1, 1.0001, NAN, INF, None],
    "min_p": [-0.1, 1.1, NAN, None],
    "typical_p": [0.0, 1.1, NAN, None],
    "repetition_penalty": [0, -1.0, 1e-39, 1e39, NAN, INF, None],
    "presence_penalty": [-2.1, 2.1, NAN, None],
    "frequency_penalty": [-2.1, 2.1, NAN, None],
    "logit_bias": [
        {1: 101},
        {1: -101},
        {1: NAN},
        {1: "2"},
        {1: True},
        {-1: 1},
        {"a": 1},
        {"²": 1},
        {1.5: 1},
        [1],
    ],
    "seed": [2**64, -(2**63) - 1, 1.0, "7", True],
    "stop": ["", [""], ["a", ""], [1], 5, b"a", {"a"}],
    "stop_token_ids": [[-1], [1.0], ["1"], [True], "12", 5, [2**40]],
    "include_stop_str_in_output": [1, "true", None],
    "ignore_eos": [0, None],
    "min_tokens": [-1, 17, 1.0, None],
    "max_tokens": [0, -1, 2.0, "9"],
    "logprobs": [-1, 1.0, True],
    "prompt_logprobs": [-1, "5"],
    "skip_special_tokens": [1, None],
}
ACCEPTED: dict[str, list[Any]] = {
    "n": [1, 16384],
    "temperature": [0, 0.0, 5e-324, 1e300],
    "top_k": [0, 1, 10**9],
    "top_p": [5e-324, 1],
    "min_p": [0, 1],
    "typical_p": [0.2, 1],
    "repetition_penalty": [0.001, 1000],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "logit_bias": [None, {}, {0: -100, 5: 100}],
    "seed": [None, 0, 2**64 - 1, -(2**63)],
    "stop": [("a", "\n\n")],
    "stop_token_ids": [(0, 5)],
    "include_stop_str_in_output": [True],
    "ignore_eos": [True],
    "min_tokens": [0, 16],
    "max_tokens": [1, None],
    "logprobs": [None, 0, 300],
    "prompt_logprobs": [None, 0],
    "skip_special_tokens": [False],
}


def make(**given: Any) -> SamplingParams:
    return SamplingParams(**given)


def test_the_tables_name_every_field() -> None:
    assert set(REFUSED) == set(ACCEPTED) == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in REFUSED.items() for v in values])
def test_a_wrong_value_is_refused_and_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        make(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name}: expected ")
    assert "; given " in message
    assert len(message) < 250


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ACCEPTED.items() for v in values])
def test_a_value_at_the_border_is_kept(name: str, value: Any) -> None:
    assert getattr(make(**{name: value}), name) == value


def test_values_are_brought_to_one_form() -> None:
    params = make(
        temperature=0, top_p=Fraction(1, 2), top_k=-1, seed=-1, stop="x", stop_token_ids=[3, 4],
        logit_bias={"7": 1, 8: -2},
    )  # fmt: skip
    assert params.is_greedy and type(params.temperature) is float
    assert params.top_p == 0.5 and type(params.top_p) is float
    assert params.top_k == 0
    assert params.seed is None
    assert params.stop == ("x",)
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {7: 1.0, 8: -2.0}
    assert make(stop=None, stop_token_ids=None) == make()


def test_numbers_of_numpy_become_plain_ones() -> None:
    np = pytest.importorskip("numpy")
    params = make(seed=np.int64(7), temperature=np.float32(0.5), stop_token_ids=[np.int32(2)])
    assert (type(params.seed), type(params.temperature), type(params.stop_token_ids[0])) == (int, float, int)


def test_the_bias_of_the_caller_is_copied() -> None:
    biases = {1: 2.0}
    params = make(logit_bias=biases)
    biases[1] = 1000.0
    assert params.logit_bias == {1: 2.0}


def test_min_tokens_may_be_max_tokens_and_has_no_limit_without_it() -> None:
    assert make(min_tokens=3, max_tokens=3).min_tokens == 3
    assert make(min_tokens=10**6, max_tokens=None).max_tokens is None
    with pytest.raises(RequestError, match="min_tokens: expected at most max_tokens=3; given 4"):
        make(min_tokens=4, max_tokens=3)


def test_it_travels_as_json_and_as_pickle() -> None:
    params = make(stop=["a", "b"], logit_bias={5: 1.5}, seed=3, logprobs=2, stop_token_ids=[9])
    assert SamplingParams(**json.loads(json.dumps(asdict(params)))) == params
    assert pickle.loads(pickle.dumps(params)) == params


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        make().n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "given", [{"repetition_penalty": 1.1}, {"presence_penalty": -0.5}, {"frequency_penalty": 0.5}]
)
def test_penalties_need_history(given: dict[str, float]) -> None:
    assert make(**given).needs_history
    assert not make(logit_bias={1: 1.0}, temperature=0.5, top_p=0.5).needs_history


@pytest.mark.parametrize("given", [{"logit_bias": {256: 1.0}}, {"stop_token_ids": [0, 256]}])
def test_a_token_that_the_model_does_not_have_is_named(given: dict[str, Any]) -> None:
    make(**given).check_vocabulary(257)
    (name,) = given
    with pytest.raises(RequestError, match=f"{name}: expected token ids from 0 to 255 .*; given 256"):
        make(**given).check_vocabulary(256)


def test_it_is_imported_without_numpy() -> None:
    code = "import sys, ridgeline.sampling_params; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
