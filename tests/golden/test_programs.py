"""The recorded Program of each architecture: its text, and its counts by hand and by torch's own counter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ridgeline.config import ParallelConfig
from ridgeline.distributed.groups import RankPlace
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.models.decoder import record_decoder
from ridgeline.models.shard import shard_model
from ridgeline.ops.batch import ForwardBatch
from ridgeline.ops.fuse import RULES, fuse
from ridgeline.ops.native import NativeProgram
from ridgeline.ops.program import Opcode, StepShape
from tests.tiny import ARCHITECTURES, tiny_config, tiny_model


class Row(NamedTuple):
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    num_logits: int
    num_padding: int


def record(name):
    model = tiny_model(name)
    return model.config, record_decoder(model.config, model.weights, max_model_len=128)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_text_is_the_recorded_one(name):
    file = Path(__file__).parent / f"program_{name}.txt"
    text = record(name)[1].text() + "\n"
    if os.environ.get("RIDGELINE_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize(
    "place",
    [RankPlace(0, 2, 0, 1), RankPlace(1, 2, 0, 1), RankPlace(0, 1, 0, 2), RankPlace(0, 1, 1, 2)],
    ids=["tp2_rank0", "tp2_rank1", "pp2_stage0", "pp2_stage1"],
)
def test_text_of_a_rank_is_the_recorded_one(place, request):
    """Twice a layer a sum, the embedding and the head by rows of the vocabulary, messages between stages."""
    shard = shard_model(tiny_model("llama"), place)
    program = record_decoder(shard.config, shard.weights, max_model_len=128, shard=shard.shard)
    file = Path(__file__).parent / f"program_llama_{request.node.callspec.id}.txt"
    text = f"{program.text()}\n{program.communication_bytes(StepShape.decode(1, 50))} bytes a decoded token\n"
    if os.environ.get("RIDGELINE_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_parts_of_a_model_do_the_work_of_the_whole():
    """FLOPs add up, and so do weight bytes but for the vectors that every rank has."""
    model = tiny_model("sinks")
    whole = record_decoder(model.config, model.weights, max_model_len=128)
    vectors = sum(w.num_bytes for w in whole.weights if len(w.shape) == 1)
    for tp_size, pp_size in ((2, 1), (3, 1), (1, 2), (4, 2)):
        programs = []
        for rank in range(tp_size * pp_size):
            place = RankPlace.of(rank, ParallelConfig(tp_size=tp_size, pp_size=pp_size))
            shard = shard_model(model, place)
            programs.append(record_decoder(shard.config, shard.weights, max_model_len=128, shard=shard.shard))
        for shape in (StepShape.prefill(50), StepShape.decode(3, 61)):
            assert sum(p.flops(shape) for p in programs) == whole.flops(shape)
        repeated = (tp_size - 1) * vectors
        assert sum(p.weight_bytes() for p in programs) == whole.weight_bytes() + repeated


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flops_and_bytes_by_hand(name):
    config, program = record(name)
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * q_size + 2 * kv_size + 3 * config.intermediate_size)
    head = config.hidden_size * config.vocab_size
    for shape in (StepShape.prefill(50), StepShape.decode(3, 61)):
        num_tokens, num_logits = shape.num_tokens, shape.num_logits
        expected = 2 * (config.num_layers * layer * num_tokens + head * num_logits)
        for index in range(config.num_layers):
            window = config.sliding_window if index in config.window_layers else None
            for num_new, seq_len in shape.sequences:
                for position in range(seq_len - num_new, seq_len):
                    keys = np.arange(position + 1)
                    if window is not None:
                        keys = keys[(keys > position - window) | (keys < config.num_sinks)]
                    expected += 4 * q_size * len(keys)
        assert program.flops(shape) == expected
    numbers = head * (1 if config.tie_embeddings else 2) + config.num_layers * layer
    matrices = [w for w in program.weights if len(w.shape) == 2]
    assert sum(w.num_elements for w in matrices) == numbers
    assert sum(w.num_bytes for w in matrices) == 4 * numbers


def test_flops_equal_torch_s_counter():
    """Decode of one token over naive attention, where every pair that is computed is also visible."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from ridgeline.kvcache.layout import CacheLayout
    from ridgeline.models.decoder import bind_decoder, decoder
    from ridgeline.ops.batch import ForwardBatch
    from ridgeline.ops.torch_ops import TorchBatch, TorchOps
    from tests.ops.test_attention import Row

    model = tiny_model("llama")
    config, program = record("llama")
    layout = CacheLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype="float32",
        block_size=32,
        num_blocks=8,
    )
    ops = TorchOps(layout, dtype="float32", device="cpu", attention="naive")
    weights = bind_decoder(ops, config, model.weights, max_model_len=128)
    rows = [Row((1,), 40, (0, 1)), Row((2,), 40, (2, 3)), Row((3,), 40, (4, 5))]
    batch = TorchBatch.from_host(ForwardBatch.from_rows(rows, block_size=32), "cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(ops, config, weights, batch)
    assert counter.get_total_flops() == program.flops(StepShape.decode(3, 41))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_buffers_that_live_at_the_same_time_share_no_memory(name, fused):
    _, program = record(name)
    program = fuse(program) if fused else program
    plan = program.plan_buffers()
    last_use = {i: n for n, instruction in enumerate(program.instructions) for i in instruction.read_buffers}
    last_use[program.output] = len(program.instructions)
    born = {o: n for n, instruction in enumerate(program.instructions) for o in instruction.outputs}
    used = [b for b in program.buffers if b.index in born]
    for a in used:
        arena_rows, arena_columns = plan.arenas[plan.place[a.index]]
        assert arena_rows == a.rows and arena_columns >= a.columns
        for b in used:
            overlap = born[a.index] <= last_use[b.index] and born[b.index] <= last_use[a.index]
            if a.index < b.index and overlap:
                assert plan.place[a.index] != plan.place[b.index], (a, b)
    assert program.activation_bytes(max_tokens=10, max_logits=2) < sum(
        4 * b.columns * (10 if b.rows == "T" else 2) for b in used
    )


def test_a_feature_is_an_instruction_and_nothing_else():
    """Gemma's extras appear in its Program and only there."""
    count = {name: [i.opcode for i in record(name)[1].instructions] for name in ARCHITECTURES}
    assert Opcode.SCALE in count["gemma3"] and Opcode.SCALE not in count["llama"]
    assert count["gemma3"].count(Opcode.RMS_NORM) == tiny_config("gemma3").num_layers * 6 + 1
    assert count["sinks"].count(Opcode.ROPE) == tiny_config("sinks").num_layers * 3


def test_every_fusion_rule_can_be_left_out_and_is_needed():
    """Each rule alone shortens some Program; all of them leave about five instructions a layer."""
    programs = {name: record(name)[1] for name in ARCHITECTURES}
    for rule in RULES:
        rest = [other for other in RULES if other != rule]
        assert any(len(fuse(p, rest).instructions) > len(fuse(p).instructions) for p in programs.values()), (
            rule
        )
    assert fuse(programs["llama"], []) == programs["llama"]
    layers = tiny_config("llama").num_layers
    assert len(fuse(programs["llama"]).instructions) == 5 * layers + 4  # embed, angles, gather, head
    with pytest.raises(ConfigError, match="unknown fusion rules.*known: scaled_embedding"):
        fuse(programs["llama"], ["nonsense"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fusion_changes_no_bit(name):
    """Logits of a prefill and of a ragged step, with all rules, with none, and with each left out."""
    config, program = record(name)
    layout = CacheLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype="float16",
        block_size=32,
        num_blocks=8,
    )
    rng = np.random.default_rng(0)
    steps = [[(0, 50, (3, 1)), (0, 7, (0,))], [(50, 1, (3, 1)), (7, 2, (0,))]]

    def logits(rules, max_tokens=64):
        native = NativeProgram(
            fuse(program, rules), layout, max_tokens=max_tokens, max_logits=4, num_threads=2
        )
        found = []
        for rows in steps:
            tokens = [tuple(int(i) for i in rng.integers(0, config.vocab_size, new)) for _, new, _ in rows]
            batch = ForwardBatch.from_rows(
                [Row(t, start, blocks, 1, 0) for t, (start, _, blocks) in zip(tokens, rows, strict=True)],
                block_size=32,
            )
            found.append(native.step(batch).copy())
        native.close()
        return np.concatenate(found)

    expected = None
    for rules in (None, [], *([r for r in RULES if r != left_out] for left_out in RULES)):
        rng = np.random.default_rng(0)
        found = logits(rules)
        expected = found if expected is None else expected
        np.testing.assert_array_equal(found, expected)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(logits(None, max_tokens=3), expected)  # buffers grow to what comes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fusion_changes_neither_flops_nor_weights(name):
    _, program = record(name)
    fused, shape = fuse(program), StepShape(((3, 9), (1, 40)), 2)
    assert fused.flops(shape) == program.flops(shape)
    assert fused.weight_bytes() == program.weight_bytes()
    used = {w for instruction in fused.instructions for w in instruction.read_weights}
    assert used == {w for instruction in program.instructions for w in instruction.read_weights}
