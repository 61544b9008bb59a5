"""The statistics behind docs/quantizers.md, on numbers small enough to do by hand."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts/compare_quantizers.py"
    spec = importlib.util.spec_from_file_location("compare_quantizers", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_quantizers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(kl: list[float], loss: float = 0.0) -> dict[str, Any]:
    """A run whose windows each lose `loss` nats of log-likelihood."""
    windows = {"base": [-3.0] * len(kl), "model": [-3.0 - loss] * len(kl), "kl": kl, "top1": [0.5] * len(kl)}
    return {"seconds": 10.0 * (1 + loss), "cpu_seconds": 20.0, "windows": windows}


def test_difference_is_paired_by_window(script: ModuleType) -> None:
    # Windows differ by far more than the candidates do: only the paired difference is sure.
    ours, theirs = [run([1.0, 5.0, 9.0])], [run([1.1, 5.2, 9.3])]
    mean, error = script.difference(ours, theirs, "kl")
    assert mean == pytest.approx(-0.2)
    assert error == pytest.approx(0.1 / math.sqrt(3))


def test_difference_counts_the_spread_of_seeds(script: ModuleType) -> None:
    ours = [run([1.0, 1.0]), run([3.0, 3.0])]  # mean 2, variance of the mean 2 / 2
    mean, error = script.difference(ours, [run([2.0, 2.0])], "kl")
    assert mean == pytest.approx(0.0)
    assert error == pytest.approx(1.0)


def test_difference_uses_the_windows_that_both_have(script: ModuleType) -> None:
    mean, _ = script.difference([run([1.0, 2.0, 100.0, 100.0])], [run([0.0, 0.0])], "kl")
    assert mean == pytest.approx(1.5)


def test_figures(script: ModuleType) -> None:
    f = script.figures([run([0.1, 0.3], loss=math.log(1.1)), run([0.2, 0.2], loss=0.0)])
    assert f.perplexity == pytest.approx((10.0, 0.0))
    assert f.kl == pytest.approx((0.2, 0.2))
    assert f.seconds == 10.0
    assert script.figures([run([0.1, 0.3])], 1).kl == pytest.approx((0.1,))


@pytest.mark.parametrize(
    ("excesses", "expected"),
    [
        (((2.5, 1.0), (-9.0, 1.0)), "**worse**"),
        (((1.0, 1.0), (-9.0, 1.0)), "the same within errors"),
        (((-1.0, 1.0), (0.0, 0.0)), "no worse"),
        (((-1.0, 1.0), (-3.0, 1.0)), "better"),
    ],
)
def test_verdict(script: ModuleType, excesses: tuple[tuple[float, float], ...], expected: str) -> None:
    assert script.verdict(*excesses) == expected


def test_page_has_every_candidate_that_ran(script: ModuleType) -> None:
    peer = run([0.2] * 16, loss=0.1) | {"tool": "llmcompressor-rtn", "versions": {"llmcompressor": "9.9"}}
    peer["windows"]["kl"][0] = 0.36
    result = {
        "date": "today",
        "environment": {"cpu": {"model": "a CPU"}, "threads": 2, "ridgeline": "0", "python": "3"},
        "runs": {"llmcompressor-rtn-0": peer, "rtn-0": run([0.1] * 16), "bitsandbytes-0": run([0.1] * 4)},
    }
    page = script.page(result)
    assert "llmcompressor 9.9" in page and "perplexity\n  20.086" in page
    assert "| llm-compressor, RTN | 1 | 16 | +10.52 | 0.2100 | 50.0 | 11.0 | 20.0 |" in page
    assert "| bitsandbytes, LLM.int8() | 1 | 4 | +0.00 | 0.1000 | 50.0 | – | – |" in page
    assert "| `rtn-int4-g64` | llm-compressor, RTN | 16 | -9.52" in page
