"""The settings that only the native executor has: storage, fusion, packed cache, instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from ridgeline.config import EngineConfig
from ridgeline.engine.engine import LLMEngine
from ridgeline.errors import ConfigError
from ridgeline.library import ISAS, usable_isas
from ridgeline.models.load import load_model
from ridgeline.models.synth import synthesize
from ridgeline.ops.batch import ForwardBatch
from ridgeline.quant.formats import FORMATS
from tests.tiny import tiny_model

PROMPT = tuple(range(3, 60))


class Row:
    def __init__(self) -> None:
        self.token_ids, self.start, self.block_ids = PROMPT, 0, (1, 0)
        self.num_logits, self.num_padding = len(PROMPT), 0


def engine(model, **options) -> LLMEngine:
    options = {"executor": "native", "max_model_len": 128, "kv_cache_dtype": "float32"} | options
    return LLMEngine(EngineConfig.from_options("tiny", **options), model, None)


def logits(model, **options) -> np.ndarray:
    llm = engine(model, **options)
    try:
        return np.array(llm.executor.forward(ForwardBatch.from_rows([Row()], block_size=32)))
    finally:
        llm.close()


@pytest.mark.parametrize(("dtype", "format"), [("float16", "F16"), ("bfloat16", "BF16"), ("float32", "F32")])
def test_dtype_is_how_matrices_are_stored(dtype, format):
    model = tiny_model("llama")
    llm = engine(model, dtype=dtype)
    stored = {w.format.name for w in llm.executor.program.weights if len(w.shape) > 1}
    llm.close()
    assert stored == {format}
    rounded = {
        name: w.converted(FORMATS[format]).converted(FORMATS["F32"]) if len(w.shape) > 1 else w
        for name, w in model.weights.items()
    }
    exact = logits(type(model)(model.config, rounded, None))
    np.testing.assert_array_equal(logits(model, dtype=dtype), exact)
    assert (dtype == "float32") == bool(np.array_equal(exact, logits(model)))


@pytest.mark.parametrize("fusion", ["none", "residual", "merged_linears, gated_linear"])
def test_fusion_by_name_changes_the_program_and_no_bit(fusion):
    model = tiny_model("gemma3")
    llm = engine(model, fusion=fusion)
    assert len(llm.executor.program.instructions) > len(engine(model).executor.program.instructions)
    llm.close()
    np.testing.assert_array_equal(logits(model, fusion=fusion), logits(model))


def test_fusion_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="unknown fusion rules.*'faster'.*known"):
        engine(tiny_model("llama"), fusion="faster")
    with pytest.raises(ConfigError, match="fusion='none' is a setting of executor='native'"):
        engine(tiny_model("llama"), executor="eager", kv_cache_dtype=None, fusion="none")


def test_the_packed_cache_is_written_once_and_follows_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = synthesize("tiny-llama", "Q4_0", path=tmp_path / "m.gguf")
    folder = tmp_path / "cache/ridgeline/packed"
    plain = logits(load_model(path))
    assert not folder.exists()
    for _ in range(2):
        np.testing.assert_array_equal(logits(load_model(path), packed_cache=True), plain)
        assert len(list(folder.iterdir())) == 1
    np.testing.assert_array_equal(
        logits(load_model(path), packed_cache=True, dtype="float16"),
        logits(load_model(path), dtype="float16"),
    )
    assert len(list(folder.iterdir())) == 2
    synthesize("tiny-llama", "Q4_0", seed=5, path=path)
    changed = logits(load_model(path), packed_cache=True)
    assert not np.array_equal(changed, plain) and len(list(folder.iterdir())) == 3


def test_the_instruction_set_can_be_chosen(monkeypatch):
    model = tiny_model("llama")
    for isa in usable_isas():
        monkeypatch.setenv("RIDGELINE_ISA", isa)
        llm = engine(model)
        assert llm.executor.isa == isa
        llm.close()
    monkeypatch.setenv("RIDGELINE_ISA", "mmx")
    with pytest.raises(ConfigError, match=f"'mmx' is not available here; available: .*{ISAS[-1]}"):
        engine(model)
