"""The look of the course's plots."""

import pytest

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")

from ridgeline.course import figure  # noqa: E402


def labels(values):
    drawing, axes = figure("A line", x="tokens", y="ms")
    axes.loglog(values, values)
    drawing.canvas.draw()
    shown = [label.get_text() for label in axes.get_xticklabels() if label.get_text()]
    mpl.pyplot.close(drawing)
    return shown


def test_a_short_logarithmic_axis_is_labelled_at_1_2_and_5_as_plain_numbers():
    assert {"20", "50", "100", "200", "500"} <= set(labels([16, 64, 512]))


def test_a_long_one_at_powers_of_ten_only():
    shown = labels([1, 100, 1_000_000])
    assert {"1", "10", "1,000"} <= set(shown) and not {"2", "5", "20"} & set(shown)


def test_panels_share_their_labels_and_titles_are_theirs():
    drawing, (left, right) = figure("Two", panels=2, x="x", y="y")
    assert (left.get_xlabel(), right.get_ylabel()) == ("x", "y")
    mpl.pyplot.close(drawing)
