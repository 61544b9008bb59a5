"""Plans and predictions over several ranks: by hand with made-up rates and links, and against real ranks."""

from __future__ import annotations

import json

import pytest

from ridgeline.cli.main import main as ridgeline
from ridgeline.config import EngineConfig, ParallelConfig
from ridgeline.engine.memory import cache_of_rank, plan_cache
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.load import describe_model, load_model
from ridgeline.models.shard import plan_cuts, shard_model
from ridgeline.models.synth import synthesize
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.program import COLLECTIVES, Opcode, StepShape
from ridgeline.profiling.links import LINKS, SHARED_MEMORY, Link, describe_link, measure_link
from ridgeline.profiling.parallel import ParallelPredictor, ranks_of
from ridgeline.profiling.plan import plan_memory, plan_ranks, tokens_in
from ridgeline.profiling.roofline import Predictor
from tests.unit.test_roofline import LIMITS, Rates

FREE = Link("free", 0.0, 1e12)
SLOW = Link("slow", 1e-3, 0.001)


class Proportional(Rates):
    """What a matrix takes is proportional to its size, and nothing else takes time."""

    def linear(self, format, *, among):
        return {
            t: r.__class__(0.0, 0.0, 0.0, r.weight_s) for t, r in super().linear(format, among=among).items()
        }

    def attention(self, **kernel):
        grid = super().attention(**kernel)
        return {size: rate.__class__(0.0, rate.pair_s) for size, rate in grid.items()}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("m") / "even.gguf"
    return synthesize(
        "smollm2-135m", "Q8_0", path=path, num_layers=4, vocab_size=512, num_heads=8, num_kv_heads=4
    )


def config_of(path, tp_size=1, pp_size=1, **options):
    options = {"executor": "native", "max_model_len": 512, "kv_cache_tokens": 1024} | options
    return EngineConfig.from_options(str(path), tp_size=tp_size, pp_size=pp_size, **options)


def predictor_of(path, tp_size, pp_size, link):
    config = config_of(path, tp_size, pp_size)
    return ParallelPredictor(describe_model(path), config, LIMITS, Proportional(), link)


def linear_and_attention_s(predictor, shape):
    names = ("linear", "attention")
    return sum(e.predicted_s for e in predictor.estimates(shape) if e.name.startswith(names))


def test_the_measured_link_says_nothing_on_stderr(capfd):
    """The other rank leaves the last sum a moment after this one, and must not find it aborted."""
    for _ in range(3):
        link = measure_link(2)
        assert link.name == SHARED_MEMORY and link.gb_s > 0
    assert capfd.readouterr().err == ""


def test_what_crosses_a_link_by_hand():
    link = Link("x", 1e-5, 2.0)
    assert link.seconds(Opcode.ALL_REDUCE, 8000, 4) == pytest.approx(6 * (1e-5 + 2000 / 2e9))
    assert link.seconds(Opcode.ALL_GATHER, 8000, 4) == pytest.approx(3 * (1e-5 + 2000 / 2e9))
    assert link.seconds(Opcode.SEND, 8000, 4) == pytest.approx(1e-5 + 8000 / 2e9)
    assert link.seconds(Opcode.RECEIVE, 8000, 4) == link.seconds(Opcode.ALL_REDUCE, 0, 4) == 0
    measured = Link("m", 1e-5, 2.0, is_ring=False)
    assert measured.seconds(Opcode.ALL_REDUCE, 8000, 4) == pytest.approx(1e-5 + 8000 / 2e9)
    assert describe_link("Ethernet-10") is LINKS["ethernet10"]
    with pytest.raises(ConfigError, match=r"--link tape: no data sheet; known: nvlink"):
        describe_link("tape")


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_do_the_work_of_one(model_path, tp_size, pp_size):
    """With a free link and rates in proportion, ranks that share a machine gain and lose nothing."""
    alone = Predictor.for_model(describe_model(model_path), config_of(model_path), LIMITS, Proportional())
    together = predictor_of(model_path, tp_size, pp_size, Link(SHARED_MEMORY, 0.0, 1e12))
    for shape in (StepShape.prefill(64), StepShape.decode(4, 96)):
        whole = linear_and_attention_s(alone, shape)
        parts = [linear_and_attention_s(p, shape) for p in together.predictors]
        # Each is as slow as if it had the machine a fraction of the time.
        assert sum(parts) / len(parts) == pytest.approx(whole, rel=1e-9)
        apart = predictor_of(model_path, tp_size, pp_size, FREE)
        assert sum(linear_and_attention_s(p, shape) for p in apart.predictors) == pytest.approx(whole)


def test_a_stage_is_its_slowest_rank_and_a_token_passes_all(model_path):
    p = predictor_of(model_path, 2, 2, SLOW)
    shape = StepShape.decode(1, 64)
    stages = p.stages_s(shape)
    assert stages == [
        max(p.predictors[0].ops_s(shape), p.predictors[1].ops_s(shape)),
        max(p.predictors[2].ops_s(shape), p.predictors[3].ops_s(shape)),
    ]
    overhead = p.predictors[-1].overhead_s(shape)
    assert p.decode_s(1, 64) == pytest.approx(sum(stages) + overhead)
    assert p.prefill_s(300, chunk=200) == pytest.approx(p.step_s([(200, 200)], 0) + p.step_s([(100, 300)], 1))
    half = StepShape.decode(4, 64)
    pace = max(sum(p.stages_s(half)), 2 * max(p.stages_s(half)))
    assert p.decode_s(8, 64) == pytest.approx(pace + 2 * p.predictors[-1].overhead_s(half))


def test_time_on_the_link_by_hand(model_path):
    """4 layers in 2 stages: of the first 2 · n + 1 sums and a message, of the last 2 · n sums and the logits."""
    p = predictor_of(model_path, 2, 2, SLOW)
    model = describe_model(model_path)
    hidden, vocab = 4 * model.config.hidden_size, 4 * model.config.vocab_size
    cuts = plan_cuts(model, ParallelConfig(tp_size=2, pp_size=2))
    shape = StepShape.decode(3, 64)
    names = tuple(opcode.name.lower() for opcode in COLLECTIVES)
    for rank, predictor in zip(p.ranks, p.predictors, strict=True):
        spent = sum(e.predicted_s for e in predictor.estimates(shape) if e.name.startswith(names))
        num_sums = 2 * len(cuts.layers[rank.place.pp_rank]) + rank.place.is_first_stage
        expected = num_sums * 2 * (1e-3 + 3 * hidden / 2 / 1e6)
        expected += (1e-3 + 3 * vocab / 2 / 1e6) if rank.place.is_last_stage else 1e-3 + 3 * hidden / 1e6
        assert spent == pytest.approx(expected)
        message = 3 * (vocab if rank.place.is_last_stage else 0) + 3 * hidden
        assert p.communication_bytes(shape)[rank.place.rank] == 3 * hidden * num_sums + message


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (3, 1), (1, 2), (2, 2)])
def test_memory_of_ranks_is_what_they_allocate(model_path, tp_size, pp_size):
    from ridgeline.distributed.collectives import SharedMemory, SharedRegion
    from ridgeline.engine.executors.native import NativeExecutor

    config = config_of(model_path, tp_size, pp_size, max_num_seqs=4)
    plans = plan_ranks(describe_model(model_path), config)
    whole, resolved = load_model(model_path), config.resolve(load_model(model_path).config, unavailable={})
    region = SharedRegion(config.parallel)
    for rank, plan in zip(ranks_of(describe_model(model_path), config), plans, strict=True):
        collectives = SharedMemory(region.name, rank.place)
        shard = shard_model(whole, rank.place)
        executor = NativeExecutor(resolved, shard, rank.layout, collectives)
        native: NativeProgram = executor.native
        assert plan.weight_bytes == native.packed_bytes
        assert plan.cache_bytes == native.pages.nbytes
        assert plan.cache_token_bytes == CacheLayout.bytes_per_token(shard.config, "float16")
        executor.close()
        collectives.close()
    region.close()
    alone = plan_memory(describe_model(model_path), config_of(model_path, max_num_seqs=4))
    if (tp_size, pp_size) == (2, 1):
        assert max(p.weight_bytes for p in plans) < 0.51 * alone.weight_bytes
    assert sum(p.cache_bytes for p in plans) == alone.cache_bytes


def test_the_cache_of_ranks(model_path):
    """All have the same blocks; a size in bytes is for the largest, the free memory for all together."""
    model = describe_model(model_path).config
    cuts = plan_cuts(describe_model(model_path), ParallelConfig(tp_size=3))
    ranks = cuts.configs()
    assert [r.num_kv_heads for r in ranks] == [2, 1, 1]
    options = {"kv_cache_tokens": None, "kv_cache_memory_bytes": 1 << 20, "kv_cache_dtype": "float16"}
    config = config_of(model_path, **options).resolve(model, unavailable={})
    layout = plan_cache(config, model, ranks=ranks)
    largest = cache_of_rank(layout, ranks[0])
    block = largest.num_bytes // largest.num_blocks
    assert (1 << 20) - block < largest.num_bytes <= 1 << 20
    assert cache_of_rank(layout, ranks[1]).num_bytes == largest.num_bytes // 2
    assert plan_cache(config, model).num_blocks == layout.num_blocks // 2


def test_what_fits_on_all():
    plans = [_plan(fixed=100, token=2), _plan(fixed=200, token=1)]
    assert tokens_in(plans, 500, together=False) == 200
    assert tokens_in(plans, 600, together=True) == 100
    assert tokens_in(plans, 250, together=True) == 0


def _plan(*, fixed, token):
    from ridgeline.profiling.plan import MemoryPlan

    return MemoryPlan(fixed, 40, 0, 0, token, 40 // token)


def test_the_commands(model_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            ridgeline([*arguments, "-m", str(model_path), "--device", "h100"])
        assert not end.value.code
        return capsys.readouterr().out

    options = ("--tp", "2", "--pp", "2", "--max-model-len", "512", "--kv-cache-tokens", "1024")
    document = json.loads(run("plan", *options, "--context", "128", "--json").splitlines()[-1])
    assert document["link"]["name"] == "NVLink 4" and document["fits"]
    assert [r["layers"] for r in document["ranks"]] == [[0, 2], [0, 2], [2, 4], [2, 4]]
    hidden, vocab = 4 * 576, 4 * 512
    first, last = 5 * hidden + hidden, hidden + 4 * hidden + vocab
    assert [r["communication_bytes_per_token"] for r in document["ranks"]] == [first, first, last, last]
    assert document["plan"]["total_bytes"] == max(r["total_bytes"] for r in document["ranks"])
    text = run("plan", *options, "--link", "ethernet1")
    assert "4 ranks over Ethernet, 1 Gbit/s" in text and "exchanged per token" in text

    roof = json.loads(run("roofline", *options, "--json").splitlines()[-1])
    rows = next(rows for name, rows in roof["ops"].items() if name.startswith("decode"))
    assert any(row["name"].startswith("all_reduce") and row["bound_s"] > 0 for row in rows)
    slow = json.loads(run("roofline", *options, "--link", "ethernet1", "--json").splitlines()[-1])
    assert slow["grid"]["tpot"][0]["predicted_s"] > 5 * roof["grid"]["tpot"][0]["predicted_s"]
    assert "over PCIe 5.0 x16" in run("roofline", *options, "--link", "pcie5")
