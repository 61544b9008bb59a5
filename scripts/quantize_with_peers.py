"""One quantization by another tool, in that tool's own environment: no Ridgeline in here.

    VENV/bin/python scripts/quantize_with_peers.py TOOL --base DIR --tokens tokens.json --seed 0 --out DIR

`compare_quantizers.py` calls it once for each tool and seed, and judges what it leaves behind in DIR:

- weights: config.json and model.safetensors, each matrix as the float32 values that the tool computes with;
- checkpoint: the same model in the tool's own file format (not from bitsandbytes);
- logits.npy (bitsandbytes alone): float32 [W, L - 1, V] for the evaluation windows, since what LLM.int8()
  does to the activations cannot be seen in the weights;
- run.json: versions, and the seconds of the quantization alone, without imports and loading.

Environments, CPU builds, in each `pip install torch==2.13.0` first and alone. One for llmcompressor==0.14.0.1
and bitsandbytes==0.50.2; another for gptqmodel==7.7.0, which wants a newer torch and is content with this:
`pip install transformers accelerate safetensors threadpoolctl device-smi protobuf pypcre tokenicer logbar
ninja datasets defuser torchao setuptools wheel`, then
`pip install --no-deps --no-build-isolation gptqmodel==7.7.0`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BITS = 4
GROUP_SIZE = 64
Values = dict[str, torch.Tensor]
Spent = dict[str, float]


def clock() -> tuple[float, float]:
    """Now, on the wall and on all cores of this process."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> Spent:
    wall, cpu = clock()
    return {"seconds": round(wall - started[0], 1), "cpu_seconds": round(cpu - started[1], 1)}


def load(base: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options).eval()


def llmcompressor(modifier: Any, base: Path, windows: list[list[int]], out: Path) -> tuple[Values, Spent]:
    """Any recipe of one modifier -> the values of the quantized matrices."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot

    model = load(base)
    data = {}
    if modifier.requires_calibration_data:
        batches = [{"input_ids": torch.tensor([w]), "attention_mask": torch.ones(1, len(w))} for w in windows]
        loader = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        data = {"dataset": loader, "num_calibration_samples": len(windows), "max_seq_length": len(windows[0])}
    started = clock()
    oneshot(model=model, tokenizer=str(base), recipe=[modifier], **data)
    spent = since(started)
    values: Values = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            with torch.no_grad():
                values[f"{name}.weight"] = fake_quantize(
                    module.weight, module.weight_scale, module.weight_zero_point, scheme.weights
                )
    model.save_pretrained(out / "checkpoint", save_compressed=True)
    return values, spent


def llmcompressor_modifier(kind: str) -> Any:
    """W4A16, asymmetric, g64: RTN, or GPTQ with its defaults (damp 0.01, blocks of 128, static act-order)."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(num_bits=BITS, symmetric=False, strategy="group", group_size=GROUP_SIZE)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = GPTQModifier if kind == "gptq" else QuantizationModifier
    return modifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


def gptqmodel(base: Path, windows: list[list[int]], out: Path) -> tuple[Values, Spent]:
    """GPTQ with its own defaults (damp 0.05, group-aware order); asymmetric, g64."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # read at import; with its default of one it refuses to start
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, sym=False, desc_act=False)
    model = GPTQModel.load(str(base), config)
    examples = [{"input_ids": [w], "attention_mask": [[1] * len(w)]} for w in windows]
    started = clock()
    model.quantize(examples, batch_size=1)
    spent = since(started)
    model.save(str(out / "checkpoint"))
    return dequantize_gptq(out / "checkpoint"), spent


def dequantize_gptq(checkpoint: Path) -> Values:
    """The matrices of a GPTQ directory: w = s * (q - z).

    Version 1 has 1 subtracted from each z, as GPTQModel does it from whole words: a z of 0 borrows.
    """
    tensors: Values = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    offset = 0x11111111 if config.get("checkpoint_format", "gptq") == "gptq" else 0
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    mask = (1 << BITS) - 1
    values: Values = {}
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        words, zeros = tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"] + offset
        q = ((words[:, None, :] >> shifts[None, :, None]) & mask).reshape(-1, words.shape[1])  # [K, N]
        z = ((zeros[:, :, None] >> shifts) & mask).reshape(len(zeros), -1)  # [R, N]
        group = tensors[f"{name}.g_idx"].long()
        scales = tensors[f"{name}.scales"].float()
        values[f"{name}.weight"] = (scales[group] * (q - z[group]).float()).T.contiguous()
    return values


def bitsandbytes(base: Path, windows: list[list[int]], out: Path) -> tuple[Values, Spent]:
    """LLM.int8() at threshold 6.0 on all matrices but the head: logits of the windows and their seconds.

    In train() mode it would silently multiply float activations.
    """
    import numpy as np
    from bitsandbytes.nn import Linear8bitLt
    from transformers import BitsAndBytesConfig

    model = load(
        base,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0),
        device_map="cpu",
    )
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, Linear8bitLt)}
    assert matrices and not any(m.training or m.state.has_fp16_weights for m in matrices.values())
    values = {
        f"{name}.weight": m.weight.data.float() * (m.weight.SCB.float()[:, None] / 127)
        for name, m in matrices.items()
    }
    started = clock()
    logits = []
    for window in windows:
        with torch.inference_mode():
            logits.append(model(torch.tensor([window[:-1]])).logits[0].float().numpy())
        print(f"window {len(logits)} of {len(windows)}: {since(started)['seconds']} s", flush=True)
    spent = since(started)
    np.save(out / "logits.npy", np.stack(logits))
    return values, spent


TOOLS: dict[str, Callable[[Path, list[list[int]], Path], tuple[Values, Spent]]] = {
    "llmcompressor-gptq": lambda *a: llmcompressor(llmcompressor_modifier("gptq"), *a),
    "llmcompressor-rtn": lambda *a: llmcompressor(llmcompressor_modifier("rtn"), *a),
    "gptqmodel": gptqmodel,
    "bitsandbytes": bitsandbytes,
}
PACKAGES = ("llmcompressor", "compressed-tensors", "gptqmodel", "bitsandbytes", "transformers", "torch")


def write_values(base: Path, values: Values, out: Path) -> None:
    """The base model with these matrices in place of its own."""
    tensors = load_file(base / "model.safetensors")
    assert values and all(values[name].shape == tensors[name].shape for name in values)
    out.mkdir()
    shutil.copy(base / "config.json", out)
    merged = {name: values.get(name, tensor).float().contiguous() for name, tensor in tensors.items()}
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--windows", type=int, default=4, help="of the evaluation, for bitsandbytes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokens = json.loads(args.tokens.read_text(encoding="utf-8"))
    is_evaluation = args.tool == "bitsandbytes"
    windows = tokens["evaluation"][: args.windows] if is_evaluation else tokens["calibration"][args.seed]
    args.out.mkdir(parents=True)
    values, spent = TOOLS[args.tool](args.base, windows, args.out)
    write_values(args.base, values, args.out / "weights")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    run = {"tool": args.tool, **spent, "threads": torch.get_num_threads(), "versions": versions}
    (args.out / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(run))


if __name__ == "__main__":
    main()
