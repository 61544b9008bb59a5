"""Figures, ratios in turns, claims and their verdicts."""

from itertools import count

import pytest

from ridgeline.course.claims import Claim, show_range, within
from ridgeline.course.figures import Figure, measure, ratio


def test_a_figure_is_the_median_with_its_quartiles():
    figure = Figure([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (figure, figure.low, figure.high, figure.spread) == (3.0, 2.0, 4.0, 2.0)
    assert f"{figure:.1f}" == "3.0" and figure.samples == (5.0, 1.0, 3.0, 2.0, 4.0)
    alone = Figure([7.0])
    assert (alone.low, alone.high) == (7.0, 7.0)


def test_ratio_takes_turns_and_swaps_their_order():
    calls = []
    found = ratio(lambda: calls.append("a") or 6.0, lambda: calls.append("b") or 2.0, repeats=4, warmups=0)
    assert "".join(calls) == "abbaabba" and found == 3.0


def test_ratio_pairs_neighbours_so_that_drift_cancels():
    clock = count(1)
    drifting = lambda factor: factor * next(clock)  # noqa: E731
    found = ratio(lambda: drifting(2.0), lambda: drifting(1.0), repeats=40, warmups=0)
    assert abs(found - 2) < 0.2


def test_what_returns_nothing_is_timed():
    seconds = measure(lambda: None, repeats=3)
    assert 0 <= seconds < 0.1 and len(seconds.samples) == 3


@pytest.mark.parametrize(
    ("value", "limits", "inside"),
    [
        (5, (5, 10), True),
        (4.9, (5, 10), False),
        (1e9, (5, None), True),
        (-3, (None, 0), True),
        (1, (1, 1), True),
    ],
)
def test_within(value, limits, inside):
    assert within(value, limits) is inside


def test_ranges_read_as_words():
    assert show_range((5, 10), "x") == "5 to 10 x"
    assert show_range((4, None), "%") == "at least 4 %"
    assert show_range((None, 4)) == "at most 4"
    assert show_range((1, 1)) == "exactly 1"


def test_a_verdict_is_about_what_people_say_not_about_the_band():
    claim = Claim("c", "a cache helps", 3.0, 2.9, 3.2, "x", (5, 10), (2, 20), "the prompt is short")
    assert claim.expected and not claim.holds
    assert claim.verdict == "does not hold here, because the prompt is short"
    assert claim.band_is_wide_enough()
    narrow = Claim("c", "", 3.0, 2.0, 4.0, "x", (5, 10), (2.5, 3.5), "")
    assert not narrow.band_is_wide_enough()
