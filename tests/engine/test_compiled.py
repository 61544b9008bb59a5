"""torch.compile: the same tokens as eager, one graph, no breaks, and no recompile over batches and lengths."""

from __future__ import annotations

import numpy as np
import pytest

from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.sampling_params import SamplingParams
from tests.engine.test_equivalence import mixed, run
from tests.tiny import tiny_model


@pytest.mark.parametrize("name", ["gemma3", "sinks"])
def test_compiled_equals_eager_without_recompiling(name):
    model = tiny_model(name)

    def engine(executor):
        options = {"dtype": "float64", "max_model_len": 160, "max_num_seqs": 16, "max_num_batched_tokens": 64}
        return LLMEngine(EngineConfig.from_options("tiny", executor=executor, **options), model, None)

    compiled = engine("compiled")
    compiled.add_request({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2))
    while compiled.has_unfinished:
        compiled.step()
    warm = compiled.executor.compile_stats()
    assert (warm.num_graphs, warm.num_graph_breaks) == (1, 0)
    assert warm.compile_s > 0

    rng = np.random.default_rng(0)
    requests = mixed(model)
    requests += [
        ([int(i) for i in rng.integers(0, 97, n)], SamplingParams(temperature=0.0, max_tokens=n % 9 + 1))
        for n in range(1, 17)
    ]
    assert [t for t, _ in run(compiled, requests)] == [t for t, _ in run(engine("eager"), requests)]
    for request in requests[:4]:  # and one at a time: batch sizes from 1 up
        compiled.add_request({"prompt_token_ids": request[0]}, request[1])
        while compiled.has_unfinished:
            compiled.step()
    after = compiled.executor.compile_stats()
    assert (after.num_graphs, after.num_graph_breaks, after.num_recompiles) == (1, 0, 0)
