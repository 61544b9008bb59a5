"""One look for all plots of the course: `figure()` gives axes with a title, labels and a quiet grid."""

from __future__ import annotations

from functools import cache
from typing import Any

COLORS = ("#1f6feb", "#e16f24", "#2da44e", "#a475f9", "#cf222e", "#6e7781")
"""Distinct for readers with colour-blindness in this order: blue, orange, green, violet, red, grey."""
LIMIT = "#6e7781"
"""Of lines that show a limit or a prediction; drawn dashed."""
MAX_LABELLED_RANGE = 2000
"""A logarithmic axis that goes over more than this factor is labelled at powers of ten only."""
_STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d0d7de",
    "grid.linewidth": 0.6,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "font.size": 10,
    "figure.dpi": 100,
}


def figure(
    title: str, *, x: str = "", y: str = "", panels: int = 1, size: tuple[float, float] | None = None
) -> tuple[Any, Any]:
    """(figure, axes) of matplotlib in the course's style; `axes` is a list where there are several panels.

    `x` and `y` are the labels, with units. With panels side by side, each gets its own title later.
    """
    import matplotlib.pyplot as plt
    from matplotlib import rcParams
    from matplotlib.rcsetup import cycler

    rcParams.update(_STYLE)  # type: ignore[arg-type]
    rcParams["axes.prop_cycle"] = cycler(color=COLORS)
    drawing, axes = plt.subplots(
        1,
        panels,
        subplot_kw={"axes_class": _plain_axes()},
        figsize=size or (7.2 if panels == 1 else 5.2 * panels, 4.0),
    )
    every = [axes] if panels == 1 else list(axes)
    for axis in every:
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_axisbelow(True)
    if panels == 1:
        axes.set_title(title)
    else:
        drawing.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    drawing.set_layout_engine("tight")
    return drawing, axes if panels == 1 else every


@cache
def _plain_axes() -> type[Any]:
    """Axes whose logarithmic scales are labelled with plain numbers (matplotlib's own labels collide)."""
    from matplotlib.axes import Axes

    class PlainAxes(Axes):
        def set_xscale(self, value: Any, **options: Any) -> None:
            super().set_xscale(value, **options)
            _label_plainly(self.xaxis)

        def set_yscale(self, value: Any, **options: Any) -> None:
            super().set_yscale(value, **options)
            _label_plainly(self.yaxis)

    return PlainAxes


def _label_plainly(axis: Any) -> None:
    """At 1, 2 and 5 of each decade, at powers of ten where there are many; at powers of any other base."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() != "log":
        return
    base = axis.get_transform().base

    def plain(value: float, position: int | None = None) -> str:
        low, high = axis.get_view_interval()
        between = f"{value:e}"[0] != "1" and base == 10
        return "" if between and high > MAX_LABELLED_RANGE * low else f"{value:,.10g}"

    axis.set_major_locator(LogLocator(base, subs=(1, 2, 5) if base == 10 else (1,)))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())
