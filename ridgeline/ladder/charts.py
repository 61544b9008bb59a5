"""Horizontal bars as SVG, written by hand: no plotting library, and a page that holds its own pictures.

A bar goes from `low` to `high`; on a logarithmic axis equal factors have equal lengths, so a waterfall of
speed-ups is bars that begin where the one before ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = {"start": "#6b7280", "gain": "#2a7f62", "none": "#9ca3af", "loss": "#b3423a", "not run": "#d1d5db"}
_ROW, _BAR, _LEFT, _WIDTH, _RIGHT, _TOP = 24, 16, 170, 420, 200, 44


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    high: float
    text: str
    """Written behind the bar."""
    kind: str = "none"
    """A key of COLOURS."""
    low: float | None = None
    """None: the start of the axis."""


def bar_chart(title: str, bars: Sequence[Bar], *, log: bool = False) -> str:
    """One chart as an <svg> element. On a log axis, bars without a positive end are only their text."""
    ends = [b.high for b in bars] + [b.low for b in bars if b.low is not None]
    positive = [end for end in ends if end > 0]
    start = min(positive, default=1.0) / 1.5 if log else 0.0
    stop = max(positive, default=1.0)

    def place(value: float) -> float:
        if log:
            return _WIDTH * math.log(max(value, start) / start) / math.log(stop / start)
        return _WIDTH * value / stop

    height = _TOP + _ROW * len(bars) + 10
    width = _LEFT + _WIDTH + _RIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12" role="img" aria-label="{escape(title)}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for i, bar in enumerate(bars):
        y = _TOP + _ROW * i
        low, high = sorted((place(bar.low if bar.low is not None else start), place(bar.high)))
        lines += [
            f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{_LEFT + low:.1f}" y="{y}" width="{max(high - low, 1):.1f}" height="{_BAR}" '
            f'fill="{COLOURS[bar.kind]}"/>',
            f'<text x="{_LEFT + high + 6:.1f}" y="{y + 12}">{escape(bar.text)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
