"""Checkpoints against the programs whose formats they are: ours loaded by them, theirs by us.

The peers need an environment of their own:

    python3 -m venv VENV && VENV/bin/pip install torch==2.13.0 && VENV/bin/pip install transformers==5.17 \
        compressed-tensors==0.20.0 bitsandbytes==0.50.2 accelerate pillow datasets ninja wheel
    VENV/bin/pip install --no-deps optimum logbar tokenicer device-smi pypcre torchao defuser threadpoolctl
    BUILD_CUDA_EXT=0 VENV/bin/pip install --no-deps --no-build-isolation gptqmodel==7.7.0
    .venv/bin/python scripts/compare_checkpoints.py --peers VENV/bin/python --out checkpoints.json

Compared are the dequantized weights and the logits. `--fixtures DIR` makes what tests/checkpoint reads: the
linears that peers packed, with the values that they dequantize them to. What runs in the environment of the
peers imports nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = list(range(5, 45))
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# name: kind, bits, group size (None: row), symmetric, extras
OURS: dict[str, tuple[str, int, int | None, bool, dict[str, Any]]] = {
    "gptq 4 g32 sym": ("gptq", 4, 32, True, {}),
    "gptq 4 g32 asym": ("gptq", 4, 32, False, {}),
    "gptq 4 g32 asym v2": ("gptq", 4, 32, False, {"version": 2}),
    "gptq 4 g32 act-order": ("gptq", 4, 32, True, {"order": True}),
    "gptq 8 row": ("gptq", 8, None, True, {}),
    "gptq 3 g32": ("gptq", 3, 32, True, {}),
    "gptq 2 g32": ("gptq", 2, 32, True, {}),
    "awq 4 g32": ("awq", 4, 32, False, {}),
    "compressed-tensors W4A16 g32 asym": ("compressed-tensors", 4, 32, False, {}),
    "compressed-tensors W4A16 g32 sym, int8 embedding": ("compressed-tensors", 4, 32, True, {"embed": 8}),
    "compressed-tensors W3A16 g32": ("compressed-tensors", 3, 32, True, {}),
    "compressed-tensors W2A16 g32": ("compressed-tensors", 2, 32, False, {}),
    "compressed-tensors W8A16 row": ("compressed-tensors", 8, None, True, {"embed": 8}),
    "compressed-tensors W8A8 dynamic": ("compressed-tensors", 8, None, True, {"activation": "dynamic"}),
    "compressed-tensors W8A8 static": ("compressed-tensors", 8, None, True, {"activation": "static"}),
    "bitsandbytes int8": ("bitsandbytes", 8, None, True, {"activation": "outliers"}),
    "hf F32": ("hf", 4, 32, True, {}),
}
REAL = (
    "gptq 4 g32 sym",
    "awq 4 g32",
    "compressed-tensors W4A16 g32 sym, int8 embedding",
    "compressed-tensors W8A8 dynamic",
)
SAME, HALF = 1e-4, 0.1
"""Of the largest logit: float32 on both sides, and where the peer computes in half precision."""


# What runs in the environment of the peers.


def peer_load(path: Path, kind: str) -> None:
    """Logits and dequantized linears of one directory, as peers.npz in it.

    `exact_logits`: float32 products of the weights that the peer dequantized (its own are in half precision),
    or inputs rounded in our 127 steps a side (compressed-tensors has 127.5).
    """
    import torch
    import transformers

    options: dict[str, Any] = {}
    if kind == "gptq":
        options["quantization_config"] = transformers.GPTQConfig(bits=4, backend="torch")
    elif kind == "awq":
        options["quantization_config"] = transformers.AwqConfig(backend="torch_awq")
    elif kind == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options).eval()

    def logits() -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([TOKENS])).logits[0].float().numpy()

    results = {"logits": logits()}
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] not in LINEARS:
            continue
        if kind == "gptq":
            module.scales.data = module.scales.data.float()
            found[name] = module.dequantize_weight().T.float()
        elif kind == "awq":
            found[name] = _awq_values(module)
        elif kind == "bitsandbytes":
            scale = getattr(module.weight, "SCB", None)
            scale = module.state.SCB if scale is None else scale
            found[name] = module.weight.data.float() * scale.float()[:, None] / 127
        else:
            found[name] = module.weight.data.float()
    arrays = {name: value.detach().contiguous().numpy() for name, value in found.items()}
    if kind in ("gptq", "awq"):
        for name, weight in found.items():
            plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            plain.weight.data = weight.detach().contiguous()
            model.set_submodule(name, plain)
    if kind == "compressed-tensors":
        from compressed_tensors.quantization.lifecycle import forward

        def in_127_steps(value: Any, **_: Any) -> tuple[Any, Any]:
            scale = value.abs().amax(-1, keepdim=True) / 127
            return scale, torch.zeros_like(scale)

        forward.compute_dynamic_scales_and_zp, theirs = in_127_steps, forward.compute_dynamic_scales_and_zp
        results["exact_logits"] = logits()
        forward.compute_dynamic_scales_and_zp = theirs
    elif kind != "bitsandbytes":
        results["exact_logits"] = logits()
    np.savez(path / "peers.npz", **results, **arrays)


def _awq_values(module: Any) -> Any:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, module.group_size).T


def peer_make(base: Path, out: Path) -> None:
    """Directories written by the peers, from a plain one; each with the values that they mean (peers.npz)."""
    import torch
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    def load(**options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options).eval()

    token = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    tensor = {"num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}
    for name, weights, inputs in (
        ("W4A16 g32 asym", {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}, None),
        ("W3A16 g32 sym", {"num_bits": 3, "group_size": 32, "strategy": "group", "symmetric": True}, None),
        ("W2A16 row asym", {"num_bits": 2, "strategy": "channel", "symmetric": False}, None),
        ("W8A16 tensor", {"num_bits": 8, "strategy": "tensor", "symmetric": True}, None),
        ("W8A8 dynamic", {"num_bits": 8, "strategy": "channel", "symmetric": True}, token),
        ("W8A8 static", {"num_bits": 8, "strategy": "channel", "symmetric": True}, tensor),
    ):
        model = load()
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
        apply_quantization_config(model, config)
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is None:
                continue
            values, args = module.weight.data, module.quantization_scheme.weights
            if args.strategy == "group":
                grouped = values.unflatten(1, (-1, args.group_size))
                low, high = grouped.amin(2), grouped.amax(2)
            elif args.strategy == "channel":
                low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
            else:
                low, high = values.min().reshape(1), values.max().reshape(1)
            scale, zero = calculate_qparams(low, high, args)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
            if inputs is tensor:
                module.input_scale.data.fill_(0.06)  # nothing is cut off: -128 is theirs only
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        directory = out / f"compressed-tensors {name}"
        model.save_pretrained(directory)
        compressor.update_config(str(directory))
        peer_load(directory, "compressed-tensors")

    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    load(quantization_config=config).save_pretrained(out / "bitsandbytes int8")
    peer_load(out / "bitsandbytes int8", "bitsandbytes")


def peer_fixtures(out: Path) -> None:
    """One linear of each kind, packed and dequantized by its own program: NAME.npz."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    torch.manual_seed(0)
    n, k, size = 32, 64, 32
    values = torch.randn(n, k) * 0.05

    def grid(bits: int, symmetric: bool) -> tuple[Any, Any]:
        grouped = values.unflatten(1, (-1, size))
        if symmetric:
            scale = grouped.abs().amax(2) / (2 ** (bits - 1) - 0.5)
            return scale.half().float(), torch.full_like(scale, 2 ** (bits - 1))
        low, high = grouped.amin(2), grouped.amax(2)
        scale = ((high - low) / (2**bits - 1)).half().float()
        return scale, (-low / scale).round().clamp(1, 2**bits - 1)

    def save(name: str, settings: dict[str, Any], parts: dict[str, Any], expected: Any) -> None:
        arrays = {key: value.detach().contiguous().numpy() for key, value in parts.items()}
        out.mkdir(parents=True, exist_ok=True)
        expected = expected.detach().float().contiguous().numpy()
        np.savez_compressed(out / f"{name}.npz", settings=json.dumps(settings), expected=expected, **arrays)

    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for ordered in (False, True) if bits in (3, 4) else (False,):
                scale, zero = grid(bits, symmetric)
                g_idx = torch.arange(k, dtype=torch.int32) // size
                g_idx = g_idx[torch.randperm(k)] if ordered else g_idx
                linear = torch.nn.Linear(k, n, bias=False)
                linear.weight.data = values
                packed = TorchLinear(
                    bits=bits, group_size=size, sym=symmetric, desc_act=ordered, in_features=k,
                    out_features=n, bias=False, pack_dtype=torch.int32, register_buffers=True,
                )  # fmt: skip
                packed.pack_original(linear, scale, zero, g_idx)
                packed.qzero_format(format=2)
                packed.post_init()
                packed.scales.data = packed.scales.data.float()  # it multiplies in the dtype of the scales
                expected = packed.dequantize_weight().T
                packed.scales.data = packed.scales.data.half()
                name = f"gptq{bits}-{'sym' if symmetric else 'asym'}{'-order' if ordered else ''}"
                for version in (2, 1):
                    if version == 1:
                        packed.qzeros.data = packed.qzeros.data.clone()
                        convert_gptq_v2_to_v1_format_module(packed, _Bits(bits))
                    parts = {key: getattr(packed, key) for key in ("qweight", "qzeros", "scales", "g_idx")}
                    settings = {
                        "quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric,
                        "desc_act": ordered, "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
                    }  # fmt: skip
                    save(f"{name}-v{version}", settings, parts, expected)

    scale, zero = grid(4, False)
    codes = (values.unflatten(1, (-1, size)) / scale[:, :, None] + zero[:, :, None]).round().clamp(0, 15)
    codes = codes.flatten(1).T.int()
    qweight, qzeros = pack_awq(codes.contiguous(), zero.T.contiguous().int(), 4)
    settings = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": size, "zero_point": True}
    half = scale.T.contiguous().half()
    expected = dequantize_gemm(qweight, qzeros, half.float(), 4, size).T
    save("awq4", settings, {"qweight": qweight, "qzeros": qzeros, "scales": half}, expected)

    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            for kind in ("pack-quantized", "int-quantized") if bits in (4, 8) else ("pack-quantized",):
                weights = {
                    "num_bits": bits, "group_size": size, "strategy": "group", "symmetric": symmetric,
                    "type": "int",
                }  # fmt: skip
                inputs = {"num_bits": 8, "strategy": "token", "dynamic": True, "type": "int"}
                group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
                group |= {"input_activations": inputs} if kind == "int-quantized" else {}
                scheme = QuantizationScheme(**group)
                scale, zero = grid(bits, symmetric)
                state = {"weight": values, "weight_scale": scale}
                state["weight_zero_point"] = (zero - 2 ** (bits - 1)).to(torch.int8)
                compressor = BaseCompressor.get_value_from_registry(kind)
                parts = compressor.compress(state, scheme)
                expected = compressor.decompress(parts, scheme)["weight"]
                settings = {
                    "quant_method": "compressed-tensors", "format": kind, "ignore": [],
                    "quantization_status": "compressed", "config_groups": {"group_0": group},
                }  # fmt: skip
                name = f"ct{bits}-{'sym' if symmetric else 'asym'}-{kind.partition('-')[0]}"
                save(name, settings, parts, expected)


class _Bits:
    """What GPTQModel's conversion asks a QuantizeConfig for."""

    def __init__(self, bits: int) -> None:
        import torch

        self.bits, self.pack_dtype = bits, torch.int32


# What runs in ours.


def our_logits(model: Any) -> np.ndarray:
    from ridgeline.config import EngineConfig
    from ridgeline.engine.engine import LLMEngine
    from ridgeline.engine.scheduler import PlanRow
    from ridgeline.ops.batch import ForwardBatch

    config = EngineConfig.from_options(
        "m", executor="eager", dtype="float32", kv_cache_dtype="float32", max_model_len=256, max_num_seqs=1
    )
    engine = LLMEngine(config, model, None)
    blocks = tuple(range(-(-len(TOKENS) // 32)))
    row = PlanRow("r", tuple(TOKENS), 0, blocks, num_logits=len(TOKENS))
    logits = np.array(engine.executor.forward(ForwardBatch.from_rows([row], block_size=32)), np.float64)
    engine.close()
    return logits


def quantized(model: Any, bits: int, size: int | None, symmetric: bool, extras: dict[str, Any]) -> Any:
    """Round to nearest, for the comparison only."""
    from dataclasses import replace

    import torch

    from ridgeline.compress.grids import Grid, rtn
    from ridgeline.quant.groups import pack_groups
    from ridgeline.quant.weight import ActivationQuant, Weight

    kinds = {
        "dynamic": ActivationQuant(),
        "static": ActivationQuant(static_scale=0.05),
        "outliers": ActivationQuant(outlier_threshold=6.0),
    }
    rng = np.random.default_rng(0)
    weights = dict(model.weights)
    for name, weight in model.weights.items():
        is_head = name in ("embed_tokens", "lm_head")
        if len(weight.shape) != 2 or (is_head and "embed" not in extras):
            continue
        grid = Grid(8 if is_head else bits, 32 if is_head else size, symmetric=is_head or symmetric)
        groups = rtn(torch.from_numpy(weight.dequantize().astype(np.float32)), grid)
        if groups.zeros is not None:
            groups = replace(groups, zeros=np.maximum(groups.zeros, 1))
        fmt, rows = pack_groups(groups)
        buffers = {"data": rows}
        if extras.get("order") and not is_head:
            order = rng.permutation(weight.shape[1]).reshape(-1, grid.group_size or weight.shape[1])
            buffers["order"] = np.sort(order, axis=1).reshape(-1).astype(np.int32)
        activation = None if is_head else kinds.get(extras.get("activation", ""))
        weights[name] = Weight(name, fmt, weight.shape, buffers, activation)
    if model.weights["lm_head"] is model.weights["embed_tokens"]:
        weights["lm_head"] = weights["embed_tokens"]
    return replace(model, weights=weights)


def compared(directory: Path) -> dict[str, Any]:
    """Our reading of a directory against what the peers read in it."""
    from ridgeline.models.load import load_model
    from ridgeline.models.registry import SPECS

    model = load_model(directory)
    theirs = np.load(directory / "peers.npz")
    names = SPECS[model.config.arch].names
    error = 0.0
    for name, weight in model.weights.items():
        if name.rpartition(".")[2] in LINEARS:
            expected = theirs[names.to_hf(name).removesuffix(".weight")]
            error = max(error, float(np.abs(weight.dequantize() - expected).max() / np.abs(expected).max()))
    ours, logits = our_logits(model), theirs["logits"].astype(np.float64)
    difference = np.abs(ours - logits)
    exact = np.abs(ours - theirs["exact_logits"]) if "exact_logits" in theirs else None
    same = SAME * np.abs(logits).max()
    return {
        "weights_relative": error,
        "exact_logits_max": None if exact is None else float(exact.max()),
        "exact_tokens": None if exact is None else int(np.argmax([*(exact.max(1) > same), True])),
        "logits_max": float(difference.max()),
        "logits_largest": float(np.abs(logits).max()),
        "same_argmax": float((ours.argmax(1) == logits.argmax(1)).mean()),
        "rounded_inputs": any(w.activation is not None for w in model.weights.values()),
        "bytes": sum(f.stat().st_size for f in directory.glob("*.safetensors")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peers", help="python of the peers' environment")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--fixtures", type=Path)
    parser.add_argument("--models", default="tiny-llama,tiny-llama tied,smollm2")
    parser.add_argument("--only", default="", help="cases whose name has this in it; --out keeps the others")
    parser.add_argument("--role", choices=("load", "make", "fixtures"), help="inside the peers' environment")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    if options.role == "load":
        for path, kind in zip(options.arguments[::2], options.arguments[1::2], strict=True):
            peer_load(Path(path), kind)
        return
    if options.role == "make":
        peer_make(*map(Path, options.arguments))
        return
    if options.role == "fixtures":
        peer_fixtures(Path(options.arguments[0]))
        return

    def peers(*arguments: object) -> None:
        environment = os.environ | {
            "GPTQMODEL_CPU_WORKERS": "2",
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": "",
        }
        command = [options.peers, __file__, "--role", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")

    if options.fixtures:
        peers("fixtures", options.fixtures)
        return

    from ridgeline.models.load import load_model
    from ridgeline.models.locate import locate_model
    from ridgeline.models.save import save_model
    from ridgeline.models.synth import synthesize

    work = options.work or Path(tempfile.mkdtemp())
    results: dict[str, Any] = {"ours": {}, "theirs": {}}
    if options.out and options.out.exists():
        results = json.loads(options.out.read_text())
    results["made"] = time.strftime("%Y-%m-%d")
    for label in options.models.split(","):
        if label == "smollm2":
            model, names = load_model(locate_model("smollm2")), list(REAL)
        else:
            tied = label.endswith("tied")
            source = synthesize("tiny-llama", "F32", path=work / f"{label} source", tie_embeddings=tied)
            model, names = load_model(source), list(OURS)
        directories = {}
        names = [name for name in names if options.only in name]
        for name in names:
            kind, bits, size, symmetric, extras = OURS[name]
            changed = quantized(model, bits, 64 if label == "smollm2" and size else size, symmetric, extras)
            directories[name] = work / f"{label} {name}"
            version = extras.get("version")
            save_model(changed, directories[name], kind=kind, gptq_version=version, overwrite=True)
        peers("load", *(part for name in names for part in (directories[name], OURS[name][0])))
        for name, directory in directories.items():
            results["ours"][f"{label}: {name}"] = compared(directory)
            print(f"{label}: {name}", results["ours"][f"{label}: {name}"], flush=True)
    if (work / "tiny-llama source").exists() and not options.only:
        peers("make", work / "tiny-llama source", work / "theirs")
        for directory in sorted((work / "theirs").iterdir()):
            results["theirs"][directory.name] = compared(directory)
            print(directory.name, results["theirs"][directory.name], flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    for side in ("ours", "theirs"):
        for name, found in results[side].items():
            # A rounded input that lies between two steps may go the other way, and all later tokens see it.
            if found["rounded_inputs"]:
                wrong = found["exact_tokens"] == 0
            else:
                limits = {"exact_logits_max": SAME, "logits_max": HALF}
                wrong = any((found[n] or 0) > limit * found["logits_largest"] for n, limit in limits.items())
            if found["weights_relative"] > 1e-6 or wrong:
                print(f"DIFFERS: {side} {name}: {found}", file=sys.stderr)


if __name__ == "__main__":
    main()
