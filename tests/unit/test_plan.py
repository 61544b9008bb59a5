"""A plan is arithmetic over headers: checked against what an engine really allocates."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ridgeline import LLM
from ridgeline.cli.main import main as ridgeline
from ridgeline.cli.terminal import read_bytes
from ridgeline.config import EngineConfig
from ridgeline.errors import CheckpointError, ConfigError
from ridgeline.models.load import describe_model, load_model
from ridgeline.models.synth import describe_preset, synthesize
from ridgeline.profiling.plan import in_format, measure_peak, measure_process, plan_memory

OPTIONS = {"max_num_seqs": 4, "max_model_len": 256, "kv_cache_tokens": 1024}


def main(arguments):
    """Run a command that must end well."""
    with pytest.raises(SystemExit) as end:
        ridgeline(arguments)
    if end.value.code:
        raise end.value


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def model_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("m") / f"{request.param}.gguf"
    return synthesize(request.param, "Q4_0", path=path, num_layers=2, vocab_size=512)


def test_a_header_is_enough(model_path, tmp_path):
    loaded, described = load_model(model_path), describe_model(model_path)
    assert described.config == loaded.config
    shown = [{n: (w.format.name, w.shape) for n, w in m.weights.items()} for m in (loaded, described)]
    assert shown[0] == shown[1]
    whole = model_path.read_bytes()
    data_start = min(entry.offset for entry in loaded.checkpoint.tensors.values())
    (tmp_path / "header.gguf").write_bytes(whole[:data_start])
    assert describe_model(tmp_path / "header.gguf").config == loaded.config
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path / "header.gguf")


def test_a_config_is_enough(tmp_path):
    synthesize("smollm2-135m", "BF16", path=tmp_path / "hf", num_layers=2, vocab_size=512)
    whole = describe_model(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    alone = describe_model(tmp_path / "hf" / "config.json")
    assert alone.config == whole.config
    assert {w.format.name for w in alone.weights.values()} == {"BF16"}


@pytest.mark.parametrize("like", ["tiny-llama", "tiny-gemma3", "smollm2-135m"])
def test_a_preset_needs_no_file(like, tmp_path):
    small = {"num_layers": 2, "vocab_size": 512}
    written = describe_model(synthesize(like, "Q4_0", path=tmp_path / "m.gguf", **small))
    described = describe_preset(like, "Q4_0", **small)
    # A GGUF file keeps norm_eps in float32, and Gemma's norm weights with the offset added.
    as_in_gguf = {name: getattr(written.config, name) for name in ("norm_eps", "norm_offset")}
    assert replace(described.config, **as_in_gguf) == written.config
    shown = [{n: (w.format.name, w.shape) for n, w in m.weights.items()} for m in (written, described)]
    assert shown[0] == shown[1]
    with pytest.raises(ConfigError, match="format"):
        describe_preset(like, "Q9_9")


def test_weights_and_cache_are_what_the_engine_allocates(model_path):
    plan = plan_memory(describe_model(model_path), EngineConfig.from_options(str(model_path), **OPTIONS))
    with LLM(str(model_path), **OPTIONS) as llm:
        native = llm.engine.executor.native
        assert plan.weight_bytes == native.packed_bytes
        assert plan.cache_bytes == native.pages.nbytes == llm.engine.layout.num_bytes
        llm.generate({"prompt_token_ids": list(range(1, 200))})
        assert native.scratch_bytes < plan.activation_bytes


def test_what_fits_follows_from_the_memory(model_path):
    plan = plan_memory(describe_model(model_path), EngineConfig.from_options(str(model_path), **OPTIONS))
    assert plan.tokens_in(plan.total_bytes) == 1024
    assert plan.tokens_in(plan.total_bytes + 10 * plan.cache_token_bytes) == 1034
    assert plan.tokens_in(0) == 0


def test_other_formats_weigh_what_they_say(model_path):
    model = describe_model(model_path)
    config = EngineConfig.from_options(str(model_path), **OPTIONS)
    sizes = [plan_memory(in_format(model, f), config).weight_bytes for f in ("F32", "F16", "Q8_0", "Q4_0")]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.9 * sizes[1] > 3 * sizes[2]
    tied = in_format(model, "Q8_0").weights
    assert (tied.get("lm_head") is tied["embed_tokens"]) == model.config.tie_embeddings


def test_the_peak_of_a_process_is_predicted():
    """The bar is 5 % on the real model, whose file this is."""
    from ridgeline.models.locate import locate_model

    path = str(locate_model("smollm2"))
    config = EngineConfig.from_options(path, **OPTIONS)
    plan = plan_memory(describe_model(path), config, process_bytes=measure_process(path))
    assert plan.total_bytes == pytest.approx(measure_peak(path, OPTIONS), rel=0.05)


def test_the_command(model_path, capsys):
    main(["plan", "-m", str(model_path), "--device", "h100", "--context", "128", "--json"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["fits"] and document["is_bound"] and document["num_sequences_that_fit"] > 1000
    main(["plan", "-m", str(model_path), "--device", "t4", "--memory", "20MB", "--formats", "Q4_0,F16"])
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "F16" in out and "Q2_K" not in out


def test_sizes_as_people_write_them():
    assert read_bytes("16GiB", "--memory") == 16 * 2**30
    assert read_bytes("1.5 GB", "--memory") == 1_500_000_000
    assert read_bytes("42", "--memory") == 42
    with pytest.raises(ConfigError, match=r"--memory lots: expected a size such as 16GiB"):
        read_bytes("lots", "--memory")
