"""The front and the best, against every pair compared by hand."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ridgeline.bench.result import load_document
from ridgeline.cli.pareto import BEGIN, END, page_part
from ridgeline.compress.pareto import Limits, Point, answer, best, draw, front, plot, points_of, table

ROOT = Path(__file__).parents[2]
MIB = 2**20


def point(name, size, kl, *, speed=None, void=None):
    return Point(
        name=name,
        num_bytes=size * MIB,
        ratio=4.0,
        bits=8.0,
        linear_bits=4.5,
        kl=kl,
        kl_error=kl / 10,
        perplexity=20.0,
        change=kl,
        change_error=None,
        changes=(kl,),
        top1_agreement=0.9,
        decode_tok_s=speed,
        prefill_tok_s=speed,
        seconds=1.0,
        void=void,
    )


POINTS = [
    point("tiny", 40, 0.5, speed=400),
    point("void", 50, 0.0, void="exact"),
    point("small", 60, 0.1, speed=300),
    point("bad", 70, 0.2, speed=500),
    point("good", 90, 0.01, speed=200),
    point("same size", 90, 0.02, speed=210),
]


def test_the_front_is_what_nothing_beats():
    assert front(POINTS) == {"tiny", "small", "good"}
    rng = np.random.default_rng(0)
    points = [point(f"p{i}", *rng.integers(1, 9, 2).tolist()) for i in range(40)]
    for p in points:
        beaten = any(
            q.num_bytes <= p.num_bytes and q.kl <= p.kl and (q.num_bytes < p.num_bytes or q.kl < p.kl)
            for q in points
        )
        assert (p.name in front(points)) is not beaten


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"max_kl": 0.3}, "small"),
        ({"max_kl": 0.05}, "good"),
        ({"max_kl": 0.001}, None),
        ({"max_size": 80}, "small"),
        ({"min_speed": 205}, "same size"),
        ({"min_speed": 450}, "bad"),
        ({"max_size": 65, "min_speed": 350}, "tiny"),
        ({"max_kl": 0.3, "min_speed": 400}, "bad"),
        ({}, "good"),
    ],
)
def test_the_best_under_a_limit(limits, name):
    chosen = best(POINTS, Limits(**limits))
    assert (None if chosen is None else chosen.name) == name
    text = answer(POINTS, Limits(**limits))
    assert text.startswith("On the front" if not limits else "No recipe" if name is None else "Best under")
    assert name is None or name in text


def row(name, seed, size, kl, change):
    quality = {"kl_mean": kl, "kl_error": kl / 10, "perplexity": 20 * (1 + change), "top1_agreement": 0.9}
    quality |= {"perplexity_change": change, "perplexity_change_error": None}
    sizes = {"num_bytes": size * MIB, "ratio": 2.0, "bits": 5.0, "linear_bits": 4.0}
    return {
        "name": name,
        "seed": seed,
        "sizes": sizes,
        "quality": quality,
        "speed": {},
        "seconds": {"total": 2.0, "linears": 1.0},
        "void": None,
    }


def test_seeds_are_one_point():
    changes = (0.1, 0.16, 0.13)
    rows = [row("gptq", seed, 70, change, change) for seed, change in enumerate(changes)]
    points = points_of([row("int8", None, 130, 0.001, 0.005), *rows])
    assert [p.name for p in points] == ["gptq", "int8"]
    gptq = points[0]
    assert gptq.kl == pytest.approx(statistics.fmean(changes)) and gptq.changes == changes
    assert gptq.change_error is None and gptq.decode_tok_s is None and gptq.seconds == 2.0
    header, first, second = table(points)
    cells = dict(zip(header, first, strict=True))
    assert cells["over seeds"] == "+10.00% to +16.00%" and cells["change"] == "+13.00%"
    assert dict(zip(header, second, strict=True))["over seeds"] == ""


def test_the_plot_shows_every_letter_once():
    close = [replace(p, num_bytes=p.num_bytes) for p in POINTS for _ in range(2)]
    lines = plot(close)
    drawn = "".join(line.partition("|")[2] for line in lines[1:-2])
    shown = [chr(ord("a") + i) for i, p in enumerate(close) if p.kl > 0]
    assert sorted(drawn.replace(" ", "")) == shown
    assert lines[1].strip().startswith("0.5000") and lines[-1].split() == ["40", "MiB", "90", "MiB"]
    assert plot(POINTS[:1]) == []
    # a larger KL is higher, a larger model further right
    where = {c: (i, line.index(c)) for i, line in enumerate(plot(POINTS)[1:-2]) for c in "acde" if c in line}
    assert where["a"][0] < where["c"][0] < where["e"][0] and where["a"][1] < where["c"][1] < where["d"][1]


def test_the_drawing_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    draw(POINTS, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    draw(POINTS, tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert "<svg" in text


def test_the_page_shows_the_committed_result():
    """Nothing in the table is typed by hand."""
    page, result = ROOT / "docs/quantization.md", ROOT / "docs/results/pareto.json"
    part = page.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert part == (page_part(load_document(result)).strip() if result.exists() else "")
