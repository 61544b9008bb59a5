"""What fits, before anything is loaded: weights, KV cache, activations, and how many tokens that leaves.

Everything is arithmetic over shapes and formats, so a config.json or the header of a GGUF file is enough. The
one part that is not, the Python process with its tokenizer, is measured in a process that loads nothing else.
The peak of a real run is measured in the same way, with the cache filled, to tell how good the plan is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ridgeline.config import EngineConfig, KVCacheDType
from ridgeline.engine.executors.native import stored_weights
from ridgeline.engine.memory import plan_cache
from ridgeline.engine.scheduler import largest_plan
from ridgeline.errors import ConfigError
from ridgeline.kvcache.layout import CacheLayout
from ridgeline.library import load_library
from ridgeline.logs import logger
from ridgeline.models.decoder import record_decoder
from ridgeline.models.load import LoadedModel
from ridgeline.ops.fuse import fuse, rules_named
from ridgeline.ops.packing import Packer, input_bits, kernel_name
from ridgeline.ops.program import Opcode, Program
from ridgeline.profiling.links import SHARED_MEMORY, Link
from ridgeline.profiling.machine import MachineLimits
from ridgeline.profiling.parallel import ParallelPredictor, ranks_of
from ridgeline.profiling.rates import KernelRates
from ridgeline.profiling.roofline import Predictor
from ridgeline.quant.formats import FORMATS
from ridgeline.quant.weight import Weight

ALTERNATIVES = ("F32", "F16", "Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
BLOCK_FALLBACKS = {"Q6_K": "Q8_0", "Q4_K": "Q5_0", "Q3_K": "Q4_0", "Q2_K": "Q4_0"}
"""For rows that are no whole number of super-blocks, as llama.cpp's quantizer does."""
KV_ALTERNATIVES: tuple[KVCacheDType, ...] = ("float32", "float16", "int8")
ACTIVATION_COLUMNS = 32
"""Of a quantized activation block in csrc/matmul.h, with its bytes for narrow and for wide codes."""
NARROW_BLOCK_BYTES, WIDE_BLOCK_BYTES = 64, 80


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one engine with its settings, the cache full."""

    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    """Planned buffers and the kernels' scratch memory, for the largest step."""
    process_bytes: int
    """Python, the package and the tokenizer; 0 for a described device."""
    cache_token_bytes: int
    num_cache_tokens: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes + self.process_bytes

    def tokens_in(self, memory_bytes: int) -> int:
        """How many tokens the cache could hold if all of `memory_bytes` were this engine's."""
        fixed = self.total_bytes - self.cache_bytes
        return max((memory_bytes - fixed) // self.cache_token_bytes, 0)


@dataclass(frozen=True, slots=True)
class Alternative:
    """The same model with all matrices in another format."""

    format: str
    weight_bytes: int
    num_tokens: int
    """That fit in the memory."""
    decode_tok_s: float
    prefill_s: float


def plan_memory(
    model: LoadedModel,
    config: EngineConfig,
    *,
    process_bytes: int = 0,
    layout: CacheLayout | None = None,
) -> MemoryPlan:
    """For a described or loaded model; `config` may be unresolved. Reads no weights.

    For a rank: its shard, and the `layout` of its part of the cache.
    """
    resolved = config.resolve(model.config, unavailable={})
    assert resolved.max_model_len and resolved.scheduler.max_num_batched_tokens
    layout = layout or plan_cache(resolved, model.config)
    max_logits = resolved.scheduler.max_num_seqs
    max_tokens = min(largest_plan(resolved.scheduler, resolved.parallel.pp_size), layout.num_slots)
    if resolved.executor == "native":
        isa, library = load_library()
        weights = stored_weights(resolved, model)
        recorded = record_decoder(
            model.config, weights, max_model_len=resolved.max_model_len, shard=model.shard
        )
        program = fuse(recorded, rules_named(resolved.fusion))
        weight_bytes = Packer(library, 1).num_bytes(program.weights)
        scratch = _scratch_bytes(program, max_tokens, isa) + _exchange_bytes(model, resolved)
    else:
        program = record_decoder(
            model.config, model.weights, max_model_len=resolved.max_model_len, shard=model.shard
        )
        element = {"float64": 8, "float32": 4}.get(resolved.dtype or "float32", 2)
        weight_bytes, scratch = sum(element * w.num_elements for w in program.weights), 0
    return MemoryPlan(
        weight_bytes=weight_bytes,
        cache_bytes=layout.num_bytes,
        activation_bytes=program.activation_bytes(max_tokens=max_tokens, max_logits=max_logits) + scratch,
        process_bytes=process_bytes,
        cache_token_bytes=CacheLayout.bytes_per_token(model.config, layout.dtype),
        num_cache_tokens=layout.num_slots,
    )


def plan_ranks(model: LoadedModel, config: EngineConfig, *, process_bytes: int = 0) -> list[MemoryPlan]:
    """`plan_memory` of every rank of `config.parallel`, by number, each a process of its own."""
    return [
        plan_memory(rank.shard, config, process_bytes=process_bytes, layout=rank.layout)
        for rank in ranks_of(model, config)
    ]


def tokens_in(plans: Sequence[MemoryPlan], memory_bytes: int, *, together: bool) -> int:
    """How many tokens the cache could hold if ranks had `memory_bytes` together, or each of them."""
    if not together:
        return min(plan.tokens_in(memory_bytes) for plan in plans)
    fixed = sum(plan.total_bytes - plan.cache_bytes for plan in plans)
    return max((memory_bytes - fixed) // sum(plan.cache_token_bytes for plan in plans), 0)


def _exchange_bytes(model: LoadedModel, config: EngineConfig) -> int:
    """Of the shared memory in which a rank meets others: its stage's, and one or two rings of messages."""
    if model.shard is None:
        return 0
    place = model.shard.place
    _, library = load_library()
    tokens = largest_plan(config.scheduler, config.parallel.pp_size)
    message_bytes = 4 * tokens * model.config.hidden_size

    def region(tp_size: int, pp_size: int) -> int:
        return int(library.rl_region_bytes(tp_size, pp_size, message_bytes))

    num_links = (not place.is_first_stage) + (not place.is_last_stage)
    return region(place.tp_size, 1) + num_links * (region(1, 2) - region(1, 1))


def _scratch_bytes(program: Program, max_tokens: int, isa: str) -> int:
    """Inputs of linears in other forms, and rotated queries, in csrc/interpreter.cpp: each at its largest."""
    narrow = wide = changed = outliers = queries = 0
    for instruction in program.instructions:
        if instruction.opcode is Opcode.ATTENTION:
            queries = max(queries, 4 * program.buffers[instruction.outputs[0]].columns)
        if instruction.opcode is not Opcode.LINEAR or program.buffers[instruction.inputs[0] or 0].rows != "T":
            continue
        columns = program.buffers[instruction.read_buffers[0]].columns
        weights = [program.weights[w] for w in instruction.matrices]
        bits = {input_bits(kernel_name(w), isa) for w in weights}
        blocks = -(-columns // ACTIVATION_COLUMNS)
        if 16 in bits:
            wide = max(wide, WIDE_BLOCK_BYTES * blocks)
        if 8 in bits:
            narrow = max(narrow, NARROW_BLOCK_BYTES * blocks)
        rounding = weights[0].activation
        has_norm = len(instruction.weights) > 6 and instruction.weights[6] is not None
        if has_norm or "order" in weights[0].buffers or (rounding and 32 in bits):
            changed = max(changed, 4 * columns)
        if rounding and rounding.outlier_threshold and bits != {32}:
            outliers = max(outliers, 4 * (columns + 1))
    return max_tokens * (narrow + wide + changed + outliers + queries)


def in_format(model: LoadedModel, format: str) -> LoadedModel:
    """The model with every matrix in another format, without values."""
    made: dict[int, Weight] = {}
    for weight in model.weights.values():
        fmt = weight.format if len(weight.shape) == 1 else FORMATS[format]
        if weight.shape[-1] % fmt.block_size:
            fmt = FORMATS[BLOCK_FALLBACKS[format]]
        made[id(weight)] = Weight(weight.name, fmt, weight.shape, {})
    return replace(model, weights={name: made[id(weight)] for name, weight in model.weights.items()})


def alternatives(
    model: LoadedModel,
    config: EngineConfig,
    limits: MachineLimits,
    rates: KernelRates | None,
    *,
    memory_bytes: int,
    context: int,
    process_bytes: int = 0,
    formats: Sequence[str] = ALTERNATIVES,
    link: Link | None = None,
) -> list[Alternative]:
    """Every format: what it weighs, what fits beside it, and how fast it should be for one sequence.

    Over several ranks (with the `link` between them): the heaviest rank, and what fits on all; a format that
    cannot be cut so is left out.
    """
    found = []
    for format in formats:
        other = in_format(model, format)
        predictor: Predictor | ParallelPredictor
        if link is None:
            plans = [plan_memory(other, config, process_bytes=process_bytes)]
            predictor = Predictor.for_model(other, config, limits, rates)
        else:
            try:
                plans = plan_ranks(other, config, process_bytes=process_bytes)
            except ConfigError as error:
                logger.info("%s is left out: %s", format, error)
                continue
            predictor = ParallelPredictor(other, config, limits, rates, link)
        found.append(
            Alternative(
                format=format,
                weight_bytes=max(plan.weight_bytes for plan in plans),
                num_tokens=tokens_in(
                    plans, memory_bytes, together=link is None or link.name == SHARED_MEMORY
                ),
                decode_tok_s=1 / predictor.decode_s(1, context),
                prefill_s=predictor.prefill_s(context),
            )
        )
    return found


def measure_process(model: str) -> int:
    """Bytes of a process that has the engine and the tokenizer of `model`, but only a tiny model in it."""
    return int(_child("process", model, {})["bytes"])


def measure_rank_process() -> int:
    """The same of a rank, which has no tokenizer: one of two that share a tiny model."""
    return max(int(peak) for peak in _child("rank", "", {})["ranks"])


def measure_peak(model: str, options: Mapping[str, Any]) -> int:
    """Peak bytes of a process that loads `model`, fills its whole cache, and generates."""
    return int(_child("peak", model, options)["bytes"])


def measure_rank_peaks(model: str, options: Mapping[str, Any]) -> list[int]:
    """The same of each rank of a parallel engine."""
    return [int(peak) for peak in _child("peak", model, options)["ranks"]]


def _child(what: str, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "ridgeline.profiling.plan", what, model, json.dumps(dict(options))]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ConfigError(f"{model}: the measuring process failed: {reason[-1]}")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def _run_child(what: str, model: str, options: dict[str, Any]) -> None:
    """Load as much as is asked for, then print the peak."""
    from ridgeline.engine.engine import LLMEngine
    from ridgeline.engine.executors.parallel import ParallelExecutor
    from ridgeline.models.load import open_checkpoint
    from ridgeline.models.locate import locate_model
    from ridgeline.models.synth import synthesize
    from ridgeline.profiling.probe import probe_engine
    from ridgeline.sampling_params import SamplingParams
    from ridgeline.tokenizer import load_tokenizer

    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    if what == "rank":
        options = {"tp_size": 2, "num_threads": 1, "kv_cache_tokens": 64, "max_model_len": 64}
        with tempfile.TemporaryDirectory() as folder:
            path = synthesize("tiny-llama", "Q4_0", path=Path(folder) / "tiny.gguf")
            engine = LLMEngine.from_config(EngineConfig.from_options(str(path), **options))
        engine.add_request({"prompt_token_ids": [1, 2, 3]}, params)
    elif what == "process":
        checkpoint = open_checkpoint(locate_model(model))
        with ThreadPoolExecutor(1) as background:
            engine = probe_engine(num_threads=None, tokenizer=background.submit(load_tokenizer, checkpoint))
        engine.add_request({"prompt_token_ids": [1, 2, 3]}, params)
    else:
        engine = LLMEngine.from_config(EngineConfig.from_options(model, **options))
        room, length = engine.layout.num_slots, engine.scheduler.max_request_tokens
        while room >= engine.layout.block_size:  # prompts of other tokens each, so that none is shared
            prompt = [(room + i) % engine.model.config.vocab_size for i in range(min(room, length) - 8)]
            engine.add_request({"prompt_token_ids": prompt}, params)
            room -= min(room, length)
    while engine.has_unfinished:
        engine.step()
    status = Path("/proc/self/status").read_text()
    field = "VmHWM:" if what == "peak" else "VmRSS:"
    document: dict[str, Any] = {"bytes": 1024 * int(status.split(field)[1].split()[0])}
    if isinstance(engine.executor, ParallelExecutor):
        document["ranks"] = [rank["peak_rss_bytes"] for rank in engine.executor.memory()]
    engine.close()
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    _run_child(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
