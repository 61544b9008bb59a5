"""Checkers of INF-34, multi-GPU serving."""

from __future__ import annotations

from typing import Any

from ridgeline.config import EngineConfig
from ridgeline.course.exercises import exercise
from ridgeline.models.synth import describe_preset
from ridgeline.ops.program import StepShape
from ridgeline.profiling.links import LINKS, describe_link
from ridgeline.profiling.machine import describe_device
from ridgeline.profiling.parallel import ParallelPredictor
from ridgeline.profiling.roofline import Predictor

BF16_BYTES = 2


def _config(tp_size: int) -> EngineConfig:
    return EngineConfig.from_options(
        "described", executor="native", max_model_len=4096, kv_cache_tokens=400_000, tp_size=tp_size
    )


def _split_in_two(link: str) -> ParallelPredictor:
    model, device = describe_preset("llama-8b", "BF16"), describe_device("h100")
    return ParallelPredictor(model, _config(2), device, None, describe_link(link))


@exercise(difficulty=2, importance=3, minutes=5)
def bytes_per_token(answer: Any, lesson: Any) -> str | None:
    """What a tp rank of the shape of Llama 3.1 8B gets for one token, from the Program of a rank."""
    program = _split_in_two("nvlink").predictors[0].program
    right = program.communication_bytes(StepShape.decode(1, 100), element_size=BF16_BYTES)
    config = describe_preset("llama-8b").config
    layers, hidden, vocabulary = config.num_layers, config.hidden_size, config.vocab_size
    if answer == right:
        return None
    if answer == 2 * right:
        return "a number in BF16 has two bytes"
    if answer == right - vocabulary * BF16_BYTES:
        return "the logits of the token are exchanged too"
    if answer == right - hidden * BF16_BYTES:
        return "nearly: the vocabulary is split too, so a token's embedding has to reach the other ranks"
    if answer == ((layers + 1) * hidden + vocabulary) * BF16_BYTES:
        return "how many sums does a layer need? Attention ends with one; what about the MLP?"
    return "count: sums in each layer, one after the embedding, and the logits; two bytes a number"


@exercise(difficulty=2, importance=2, minutes=5)
def useful_links(answer: Any, lesson: Any) -> str | None:
    """Links over which two H100s write one answer of an 8B model faster than one does."""
    alone = Predictor.for_model(describe_preset("llama-8b", "BF16"), _config(1), describe_device("h100"))
    alone_s = alone.decode_s(1, 1024)
    right = {name for name in LINKS if _split_in_two(name).decode_s(1, 1024) < alone_s}
    try:
        given = set(answer)
    except TypeError:
        return "a set of names is wanted"
    if unknown := given - set(LINKS):
        return f"no such link: {', '.join(sorted(map(str, unknown)))}; there are {', '.join(LINKS)}"
    if given == right:
        return None
    if missing := right - given:
        return (
            f"{len(missing)} more of them are fast enough; in decode, messages are short: look at latencies"
        )
    return (
        f"{len(given - right)} of these are too slow: two devices take longer over them than one device alone"
    )


@exercise(difficulty=1, importance=3, minutes=5)
def what_to_do(answer: Any, lesson: Any) -> str | None:
    """Copy or split, in three situations."""
    ways = ("copy", "tp", "pp")
    if (
        not isinstance(answer, dict)
        or set(answer) != {"a", "b", "c"}
        or not set(answer.values()) <= set(ways)
    ):
        return 'a dict with "a", "b" and "c" is wanted, each "copy", "tp" or "pp"'
    if answer["a"] != "copy":
        return "(a): the model fits one device and nobody waits for a single answer; why talk at all?"
    if answer["b"] == "copy":
        return "(b): with one user at a time the second copy has nothing to do"
    if answer["b"] == "pp":
        return "(b): what did the pipeline do for a single stream?"
    if answer["c"] == "copy":
        return "(c): 141 GB of weights do not fit one of these devices"
    if answer["c"] == "tp":
        return "(c): 161 sums a token over Ethernet: what did the table say about that?"
    return None
