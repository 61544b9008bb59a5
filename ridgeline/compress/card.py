"""The card: what a quantized model is, what it cost, and how alternatives did, as data and as text.

A card is a result document (`bench.result`) of kind "quantize": everything that is shown is in it, so that
the terminal, the model card beside the weights and later pages are made from the same figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ridgeline.bench.result import Metric, make_document
from ridgeline.compress.judge import BASE, SPEEDS, Judged
from ridgeline.compress.sizes import CLASSES, is_linear
from ridgeline.models.load import LoadedModel

Row = Mapping[str, Any]
"""One model of a card: name, seconds, tensors, void, and what `Judged.document` says."""

NUM_WORST = 8
MIN_WINDOWS = 8
"""Fewer do not carry a standard error."""
FEW_WINDOWS = " From so few windows the errors are rough, and differences of some percent are no verdict."
HEADERS = (
    *("model", "bits", "linears", "embedding", "MiB", "smaller", "perplexity", "change", "KL"),
    *("same top-1", "flips", "decode tok/s", "prefill tok/s", "made in"),
)
NUM_TEXT_COLUMNS = 1
LEGEND = (
    "bits: per weight, scales and all, of the whole model, of the layers' linears, and of embedding and "
    "head; smaller: than float32; change: of perplexity, with the standard error of the paired difference; "
    "KL: mean KL(base || model) per token in nats; same top-1: share of tokens with the same likeliest one; "
    "flips: right to wrong / wrong to right; speeds: median of the turns, and × base in the same turn"
)


@dataclass(frozen=True, slots=True)
class Made:
    """One quantized model as the quantizer reports it."""

    recipe: Mapping[str, Any]
    tensors: Sequence[Mapping[str, Any]]
    """the quantizer's report of each tensor"""
    seconds: Mapping[str, float]
    """by part of the work, "total" included"""
    void: str | None
    """why its quality proves nothing; None: it does"""


def void_reason(base: LoadedModel, model: LoadedModel) -> str | None:
    """Where a file is quantized already, the same format again is exact and is no result.

    Says so if half of the linears' weights are in the quantized format that the base's file has them in.
    """
    again = total = 0
    for name, weight in model.weights.items():
        if is_linear(name, weight):
            total += weight.num_elements
            before = base.weights[name].format
            again += weight.num_elements * (weight.format is before and before.block_size > 1)
    if not total or again < total / 2:
        return None
    return (
        f"{again / total:.0%} of the linears' weights come from a file that has them in the same format: "
        "rounding them again is exact and proves nothing"
    )


def row_document(name: str, judged: Judged, made: Made | None = None) -> dict[str, Any]:
    """One row of a card, or of a Pareto front; the base has no `made`."""
    row: dict[str, Any] = {"name": name} | judged.document()
    if made is not None:
        row |= {
            "recipe": dict(made.recipe),
            "seconds": dict(made.seconds),
            "tensors": [dict(tensor) for tensor in made.tensors],
            "void": made.void,
        }
    return row


def base_row(judged: Judged, quality: Mapping[str, Any] | None) -> dict[str, Any]:
    """The row of the float model; its perplexity is in the quality of any candidate."""
    known = None if quality is None else {"perplexity": quality["reference_perplexity"]}
    return row_document(BASE, judged) | {"quality": known}


def card_document(
    model: str,
    judged: Mapping[str, Judged],
    made: Mapping[str, Made],
    *,
    settings: Mapping[str, Any],
    seed: int,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """The card of the first of `made`; the others are its alternatives. `judged` has BASE too."""
    rows = [row_document(name, judged[name], made[name]) for name in made]
    first = judged[next(iter(made))]
    kl = () if first.quality is None else (Metric("kl", "nats", "lower", first.quality.kl_of_windows),)
    return make_document(
        "quantize",
        metrics=(*kl, *first.speeds.values()),
        settings={"model": model} | dict(settings),
        seeds=(seed,),
        details={
            "model": model,
            "base": base_row(judged[BASE], rows[0]["quality"]),
            "rows": rows,
            **details,
        },
    )


def cells(row: Row) -> tuple[str, ...]:
    """One row under HEADERS; the base is shown as the float32 model that it is judged as."""
    sizes, quality, is_base = row["sizes"], row.get("quality") or {}, row["name"] == BASE
    bits = (32.0,) * 3 if is_base else (sizes["bits"], sizes["linear_bits"], sizes["table_bits"])
    num_bytes = sizes["float32_bytes" if is_base else "num_bytes"]
    seconds = row.get("seconds", {}).get("total")
    return (
        "base, float32" if is_base else row["name"] + (" (void)" if row.get("void") else ""),
        *(f"{value:.2f}" for value in bits),
        f"{num_bytes / 2**20:,.1f}",
        f"× {sizes['float32_bytes'] / num_bytes:.2f}",
        _given(quality, "perplexity", "{:.3f}"),
        _with_error(quality, "perplexity_change", "{:+.2%}", "{:.2%}"),
        _with_error(quality, "kl_mean", "{:.5f}", "{:.5f}"),
        _given(quality, "top1_agreement", "{:.2%}"),
        f"{quality['num_right_to_wrong']} / {quality['num_wrong_to_right']}"
        if "flip_rate" in quality
        else "",
        *(_speed(row, name, is_base=is_base) for name in reversed(SPEEDS)),
        f"{seconds:,.1f} s" if seconds else "",
    )


def _given(values: Mapping[str, Any], name: str, form: str) -> str:
    return form.format(values[name]) if values.get(name) is not None else ""


def _with_error(values: Mapping[str, Any], name: str, form: str, error_form: str) -> str:
    error = values.get(name.removesuffix("_mean") + "_error")
    return _given(values, name, form) + ("" if error is None else " ± " + error_form.format(error))


def _speed(row: Row, name: str, *, is_base: bool) -> str:
    if name not in row["speed"]:
        return ""
    ratio = "" if is_base else f" (× {row['speed_ratio'][name]:.2f})"
    return f"{row['speed'][name]['median']:,.0f}{ratio}"


def table(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """HEADERS and rows, the base first, without columns that say nothing."""
    details = document["details"]
    return without_empty([HEADERS, *map(cells, (details["base"], *details["rows"]))])


def without_empty(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows without the columns that are empty below the header."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [tuple(row[i] for i in kept) for row in rows]


def bytes_table(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """MiB by class of tensor for each model, and the formats."""
    rows: list[tuple[str, ...]] = [("model", *(f"{kind} MiB" for kind in CLASSES), "formats")]
    for row in document["details"]["rows"]:
        sizes = row["sizes"]
        formats = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sizes["by_format"].items())
        rows.append((row["name"], *(f"{sizes['by_class'][kind] / 2**20:.2f}" for kind in CLASSES), formats))
    return rows


def worst_tensors(row: Row, count: int = NUM_WORST) -> tuple[str, list[Mapping[str, Any]]]:
    """The key and the tensors with the largest output error, or weight error where no inputs were seen."""
    for key in ("output_error", "weight_error"):
        known = [tensor for tensor in row["tensors"] if tensor.get(key) is not None]
        if known:
            return key, sorted(known, key=lambda tensor: -tensor[key])[:count]
    return "", []


def worst_table(row: Row, count: int = NUM_WORST) -> list[tuple[str, ...]]:
    """`worst_tensors` with a header; empty where nothing is known."""
    key, worst = worst_tensors(row, count)
    header = ("tensor", "format", key.replace("_", " "))
    return [header, *((t["name"], t["format"], f"{t[key]:.4f}") for t in worst)] if worst else []


def notes(document: Mapping[str, Any]) -> Iterator[str]:
    """What one has to know about the figures, one sentence or two each."""
    details = document["details"]
    base = details["base"]["sizes"]
    stored = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in base["by_format"].items())
    line = f"Base: {details['model']} in float32"
    if base["num_bytes"] < base["float32_bytes"]:
        first = details["rows"][0]
        ratio = base["num_bytes"] / first["sizes"]["num_bytes"]
        line += (
            f"; its file holds {stored} ({base['bits']:.2f} bits per weight), dequantized. "
            f"{first['name']} is {ratio:.2f} times smaller than that file"
        )
    yield line + "."
    if details.get("evaluation"):
        evaluation, quality = details["evaluation"], details["rows"][0]["quality"]
        yield (
            f"Quality: {quality['num_tokens']:,} tokens of {evaluation['text']} in "
            f"{quality['num_windows']} windows of {quality['context']}, executor {evaluation['executor']}."
            + (FEW_WINDOWS if quality["num_windows"] < MIN_WINDOWS else "")
        )
    if details.get("calibration"):
        calibration = details["calibration"]
        yield (
            f"Calibration: {calibration['num_samples']} × {calibration['length']} tokens of "
            f"{calibration['text']}, seed {calibration['seed']}."
        )
    for row in details["rows"]:
        if row["void"]:
            yield f"{row['name']} is void: {row['void']}."
        grown = [t for t in row["tensors"] if t.get("damp") and t["damp"] > row["recipe"].get("damp", 1)]
        if grown:
            yield (
                f"{row['name']}: damping had to grow for {len(grown)} tensors, most for "
                f"{max(grown, key=lambda t: t['damp'])['name']}."
            )
        if dead := sum(t.get("num_dead") or 0 for t in row["tensors"]):
            yield f"{row['name']}: {dead} input columns were never active in the calibration text."


def markdown_table(rows: Sequence[Sequence[str]], *, num_text: int = NUM_TEXT_COLUMNS) -> str:
    """The first `num_text` columns to the left, the rest to the right."""
    header, *body = rows
    rule = ["---" if i < num_text else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body)) + "\n"


def model_card(document: Mapping[str, Any]) -> str:
    """README.md of the quantized model."""
    details = document["details"]
    first = details["rows"][0]
    output = details.get("output") or {}
    parts = [
        f"# {details['model']} quantized: {first['name']}",
        f"{first['recipe'].get('summary', '')}. Made by Ridgeline {document['environment']['ridgeline']} "
        f"on {document['created'][:10]} with\n\n    ridgeline {' '.join(document['command'][1:])}",
    ]
    if "path" in output:
        parts.append(f"Try it: `ridgeline chat -m {output['path']}`")
    parts += [
        markdown_table(table(document)) + f"\n{LEGEND}.",
        "\n".join(f"- {note}" for note in notes(document)),
        "## Bytes\n\n" + markdown_table(bytes_table(document)),
    ]
    worst = worst_table(first)
    if worst:
        parts.append(f"## Worst tensors of {first['name']}\n\n" + markdown_table(worst, num_text=2))
    cpu = document["environment"]["cpu"]["model"]
    parts.append(f"Machine: {cpu}, {document['environment']['threads']} threads.")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"
