"""The rungs as data: what each switch changes, what it needs, and what it is there to improve.

A configuration is the options of the first rung with those of later ones laid over them, in order; nothing
else decides how the engine runs. So the climb is a growing list of rungs, and "this switch taken away from
the top" is the same list without one. `weights` is the one option that is not the engine's: the form that the
matrices are put into when the model is loaded, see `ladder.measure`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ridgeline.bench.workload import Uniform, Workload

Options = Mapping[str, Any]

WINDOW_TOKENS = 256
"""Length of the text whose logits are compared with the first rung's."""

AIMS: dict[str, tuple[str, bool]] = {
    "output_tok_s": ("throughput", True),
    "itl_p99_s": ("ITL P99", False),
    "kv_cache_bytes": ("KV memory", False),
}
"""What a rung may be there for: words, and whether more is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One switch."""

    name: str
    summary: str
    """One sentence: what it does."""
    options: Options
    """What it changes, beside what the rungs before it changed."""
    needs: tuple[str, ...] = ()
    """Names of rungs without which it cannot be."""
    aim: str = "output_tok_s"
    """The key of AIMS that decides whether it is a gain or a loss."""
    cost: float = 1.0
    """How long it takes beside the others, roughly: only the estimate of the time left uses it."""
    slow_start: bool = False
    """Takes most of a minute before the first token; a quick climb leaves it out."""


RUNGS: tuple[Rung, ...] = (
    Rung(
        name="naive loop",
        summary="torch in float32, one request at a time; every token computes the whole text again and "
        "attention writes out all its scores.",
        options={
            "executor": "eager",
            "weights": "float",
            "dtype": "float32",
            "attention": "naive",
            "kv_cache": False,
            "kv_layout": "contiguous",
            "batching": "none",
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,
        },
        cost=16.0,
    ),
    Rung(
        name="KV cache",
        summary="K and V of earlier tokens are kept, so a step computes only the new token.",
        options={"kv_cache": True},
        cost=4.0,
    ),
    Rung(
        name="bfloat16",
        summary="Weights and arithmetic in 16 bits: half the bytes, but slow where the processor has no "
        "instructions for it.",
        options={"dtype": "bfloat16"},
        cost=4.0,
    ),
    Rung(
        name="static batching",
        summary="Several requests share each step, so weights are read once for all; the batch is padded and "
        "lasts until its longest answer ends.",
        options={"batching": "static"},
        cost=3.0,
    ),
    Rung(
        name="continuous batching",
        summary="Requests join and leave at every step, without padding.",
        options={"batching": "continuous"},
        cost=3.0,
    ),
    Rung(
        name="paged cache",
        summary="The cache is handed out in blocks of 32 tokens as they fill, so more requests fit in the "
        "same memory than with room for the longest reserved for each.",
        options={"kv_layout": "paged"},
        needs=("KV cache",),
        cost=3.0,
    ),
    Rung(
        name="chunked prefill",
        summary="Prompts are computed in parts of at most 128 tokens a step, so running answers do not wait "
        "for a newcomer's whole prompt.",
        options={"enable_chunked_prefill": True, "max_num_batched_tokens": 128},
        needs=("KV cache", "continuous batching"),
        aim="itl_p99_s",
        cost=3.0,
    ),
    Rung(
        name="prefix cache",
        summary="Full blocks with the same tokens are computed once and shared.",
        options={"enable_prefix_caching": True},
        needs=("KV cache", "continuous batching", "paged cache"),
        cost=3.0,
    ),
    Rung(
        name="flash attention",
        summary="Attention in tiles with an online softmax; the scores are never in memory as a whole.",
        options={"attention": None},
        cost=3.0,
    ),
    Rung(
        name="torch.compile",
        summary="The whole step as one compiled graph, fused by inductor.",
        options={"executor": "compiled"},
        cost=15.0,
        slow_start=True,
    ),
    Rung(
        name="native kernels",
        summary="The same step replayed by this package's C++ kernels, one call a step; weights still in "
        "floating point, K and V in float32, no fusion.",
        options={"executor": "native", "fusion": "none", "kv_cache_dtype": "float32"},
    ),
    Rung(
        name="INT8 weights",
        summary="Matrices in blocks of 32 eight-bit integers with a scale (Q8_0); products in integers.",
        options={"weights": "int8", "dtype": None},
        needs=("native kernels",),
    ),
    Rung(
        name="INT4 weights",
        summary="Matrices in blocks of four-bit integers; a file that is already quantized so is used as it "
        "is.",
        options={"weights": "int4", "dtype": None},
        needs=("native kernels",),
    ),
    Rung(
        name="fusion",
        summary="Norms, activations and matrices that share an input are joined into one instruction.",
        options={"fusion": None},
        needs=("native kernels",),
    ),
    Rung(
        name="float16 KV",
        summary="K and V are stored in 16 bits.",
        options={"kv_cache_dtype": "float16"},
        needs=("KV cache", "native kernels"),
        aim="kv_cache_bytes",
    ),
    Rung(
        name="INT8 KV",
        summary="K and V are stored as eight-bit integers with a scale per token and head.",
        options={"kv_cache_dtype": "int8"},
        needs=("KV cache", "native kernels"),
        aim="kv_cache_bytes",
    ),
    Rung(
        name="tensor parallel",
        summary="Two processes with half of the threads, the heads and every matrix each; twice a layer they "
        "add up what they computed. For models that are too large for one device.",
        options={"tp_size": 2},
        needs=("native kernels", "INT4 weights"),
    ),
    Rung(
        name="pipeline parallel",
        summary="Two processes with half of the layers and of the threads each, and two steps under way at a "
        "time.",
        options={"tp_size": 1, "pp_size": 2},
        needs=("native kernels", "INT4 weights"),
    ),
)


def combined(rungs: Iterable[Rung]) -> dict[str, Any]:
    """The options of a list of rungs, later ones over earlier ones."""
    options: dict[str, Any] = {}
    for rung in rungs:
        options |= rung.options
    return options


def missing(rung: Rung, present: Sequence[Rung]) -> list[str]:
    """Names of what a rung needs and `present` lacks."""
    names = {other.name for other in present}
    return [name for name in rung.needs if name not in names]


def without(rung: Rung, rungs: Sequence[Rung]) -> list[Rung]:
    """`rungs` without one of them, and without those that need it, directly or through others."""
    kept: list[Rung] = []
    gone = {rung.name}
    for other in rungs:
        if other.name in gone or gone.intersection(other.needs):
            gone.add(other.name)
        else:
            kept.append(other)
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one climb measures, on all rungs alike."""

    workload: Workload
    repeats: int
    rung_s: float = 6.0
    """A repeat begins only while a rung has run for less than this."""
    slow_starts: bool = True
    limit_s: float = 600.0
    """A rung that takes longer, loading included, is ended."""
    options: Options = field(default_factory=dict)
    """Engine options of every rung, over the rungs' own."""


def _mix(
    name: str, num_requests: int, prompts: Uniform, outputs: Uniform, shared: int, running: int
) -> Workload:
    return Workload(
        name=name,
        num_requests=num_requests,
        prompt_lens=prompts,
        output_lens=outputs,
        shared_prefix_len=shared,
        max_concurrency=running,
        seed=4,
    )


FULL = Plan(workload=_mix("ladder", 12, Uniform(32, 160), Uniform(8, 24), 64, 8), repeats=5)
QUICK = Plan(
    workload=_mix("ladder-quick", 8, Uniform(16, 64), Uniform(4, 8), 32, 6),
    repeats=5,
    rung_s=1.0,
    slow_starts=False,
)
"""A system prompt that all requests share, prompts and answers of different lengths, more requests than run
at once: a mix in which every switch has something to do, small enough for the naive loop."""
