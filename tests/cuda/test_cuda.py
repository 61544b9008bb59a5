"""On a GPU, where there is one: the same tokens as on the CPU, and the commands that know CUDA.

CI has no GPU and skips all of it. `pytest tests/cuda` is the check for a machine that has one.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ridgeline.cli.main import main
from ridgeline.config import EngineConfig, ParallelConfig
from ridgeline.distributed.groups import RankPlace
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError
from ridgeline.models.synth import synthesize
from ridgeline.ops.batch import ForwardBatch, Row
from ridgeline.profiling.trace import record_requests
from ridgeline.sampling_params import SamplingParams
from tests.engine.test_equivalence import WAYS, engine, mixed, run
from tests.engine.test_quantized import SCHEMES, quantized_model
from tests.tiny import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")

CUDA_WAYS = {
    way: WAYS[way] for way in ("batched", "chunked", "preempted, prefix cache", "naive", "flash", "no cache")
} | {"int8 cache": {"kv_cache_dtype": "int8"}}


@pytest.mark.parametrize("way", CUDA_WAYS)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_tokens_are_those_of_the_cpu(name, way):
    model = tiny_model(name)
    requests = mixed(model)
    expected = run(engine(model, **CUDA_WAYS[way]), requests)
    found = run(engine(model, device="cuda", **CUDA_WAYS[way]), requests)
    assert [t for t, _ in found] == [t for t, _ in expected]
    most = (
        1e-5 if way == "int8 cache" else 1e-9
    )  # its scales are float32, and the GPU rounds a division otherwise
    np.testing.assert_allclose([lp for _, lp in found], [lp for _, lp in expected], rtol=0, atol=most)


@pytest.mark.parametrize("name", ["gemma3", "sinks"])
def test_compiled_gives_them_too_from_one_graph(name):
    model = tiny_model(name)
    requests = mixed(model)
    expected = [tokens for tokens, _ in run(engine(model), requests)]
    options = {"executor": "compiled", "device": "cuda", "max_num_seqs": 16, "max_num_batched_tokens": 64}
    llm = engine(model, **options)
    assert [tokens for tokens, _ in run(llm, requests)] == expected
    stats = llm.executor.compile_stats()
    assert (stats.num_graphs, stats.num_graph_breaks, stats.num_recompiles) == (1, 0, 0)


def logits(model, **options) -> np.ndarray:
    """Of every token of one text."""
    llm = engine(model, **options)
    rng = np.random.default_rng(3)
    tokens = [int(token) for token in rng.integers(0, model.config.vocab_size, 90)]
    row = Row(tokens, 0, list(range(-(-90 // llm.layout.block_size))), 90)
    return llm.executor.forward(ForwardBatch.from_rows([row], block_size=llm.layout.block_size))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_models_have_the_logits_of_the_cpu(scheme):
    model = quantized_model(scheme)
    expected = logits(model)
    np.testing.assert_allclose(logits(model, device="cuda"), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("float16", 5e-3), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("attention", ["naive", "flash", "sdpa"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_smaller_dtypes_are_as_near_as_their_digits(name, attention, dtype, most):
    expected = logits(tiny_model(name))
    found = logits(tiny_model(name), device="cuda", dtype=dtype, attention=attention)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < most


def test_cuda_means_eager_in_bfloat16_with_a_cache_within_the_memory_of_the_gpu():
    config = EngineConfig.from_options("tiny", device="cuda", max_num_seqs=2**20)
    llm = LLMEngine(config, tiny_model("llama"), None)
    assert (llm.config.executor, llm.config.dtype) == ("eager", "bfloat16")
    assert llm.layout.num_bytes <= torch.cuda.mem_get_info()[1] / 2


@pytest.mark.parametrize("executor", ["eager", "compiled"])
def test_a_cache_that_does_not_fit_is_told(executor):
    with pytest.raises(ConfigError, match="do not fit on the GPU.*lower kv_cache_tokens"):
        engine(tiny_model("llama"), executor=executor, device="cuda", kv_cache_tokens=2**34)
    again = engine(tiny_model("llama"), device="cuda")
    assert run(again, [([1, 2, 3], SamplingParams(max_tokens=2))])


def test_a_profile_has_the_time_of_kernels():
    llm = engine(tiny_model("llama"), device="cuda")
    recorded = record_requests(llm, prompt_len=20, output_len=6, batch_size=2)
    for step in recorded.steps:
        device_s = sum(op.self_s for op in step.torch_ops)
        assert 0 < device_s < step.wall_s
        assert any("mm" in op.name for op in step.torch_ops)


def test_nccl_of_one_rank():
    from ridgeline.distributed.torch_collectives import TorchCollectives, make_store

    place = RankPlace.of(0, ParallelConfig())
    store = make_store("127.0.0.1", None, world_size=1)
    ours = TorchCollectives(store, place, backend="nccl", local_host="127.0.0.1")
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = torch.randn(5, 64, device="cuda", dtype=dtype)
            before = x.clone()
            assert torch.equal(ours.all_reduce(x), before) and torch.equal(x, before)
            assert torch.equal(ours.all_gather(x, columns=64), before)
        counted = {op: traffic.num_bytes for op, traffic in ours.counters().items()}
        assert counted == dict.fromkeys(("all_reduce", "all_gather"), 5 * 64 * (4 + 8 + 2))
    finally:
        ours.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here, and NCCL wants one for each rank")
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}])
def test_ranks_give_the_tokens_of_one_process(sizes, tmp_path):
    assert generated(tmp_path, **sizes) == generated(tmp_path)


def generated(tmp_path, **sizes) -> list[list[int]]:
    path = tmp_path / "tiny.gguf"
    if not path.exists():
        synthesize("tiny-llama", "F32", path=path)
    options = {"device": "cuda", "dtype": "float64", "max_model_len": 128, "kv_cache_tokens": 1024}
    llm = LLMEngine.from_config(EngineConfig.from_options(str(path), **options, **sizes))
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return [tokens for tokens, _ in run(llm, [([1, 2, 3], greedy), (list(range(40)), greedy)])]


def test_more_ranks_than_gpus_are_refused(tmp_path):
    path = synthesize("tiny-llama", "F32", path=tmp_path / "tiny.gguf")
    ranks = torch.cuda.device_count() + 1
    options = {"device": "cuda", "max_model_len": 128, "pp_size": ranks, "kv_cache_tokens": 1024}
    with pytest.raises(ConfigError, match="CUDA devices and needs one for each of its ranks"):
        LLMEngine.from_config(EngineConfig.from_options(str(path), **options))


def document(capsys, *command: str) -> dict:
    """What a command with --json ends with."""
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--json"])
    assert stopped.value.code in (0, None)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_machine_measures_the_gpu(capsys):
    limits = document(capsys, "machine", "--device", "cuda")["limits"]
    assert limits["name"] == torch.cuda.get_device_properties(0).name
    assert limits["read"][0][1] > 100  # GB/s
    assert min(limits["int8_gop_s"], limits["fp32_gflop_s"]) > 1000
    assert 1e-6 < limits["barrier_s"] < 1e-3


def test_a_plan_for_the_gpu_is_what_its_memory_then_holds(capsys, tmp_path):
    path = synthesize("tiny-llama", "Q4_0", path=tmp_path / "tiny.gguf", vocab_size=20_000)
    flags = ("--kv-cache-tokens", "65536", "--max-model-len", "1024")
    planned = document(capsys, "plan", "-m", str(path), "--device", "cuda", *flags)
    assert planned["memory_bytes"] == torch.cuda.get_device_properties(0).total_memory
    before = torch.cuda.memory_allocated()
    options = {"device": "cuda", "kv_cache_tokens": 65536, "max_model_len": 1024}
    llm = LLMEngine.from_config(EngineConfig.from_options(str(path), **options))
    held = torch.cuda.memory_allocated() - before
    assert planned["plan"]["cache_bytes"] == llm.layout.num_bytes
    assert planned["plan"]["weight_bytes"] + planned["plan"]["cache_bytes"] == pytest.approx(held, rel=0.05)
