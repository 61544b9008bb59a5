"""A statement, the number that was measured for it, and what follows.

`claimed` is what people say; `band` is what the notebook asserts of this engine on any machine that it runs
on. The verdict compares the number with the first, the run fails outside the second.
"""

from __future__ import annotations

from dataclasses import dataclass

Range = tuple[float | None, float | None]
"""(least, most); None is no limit on that side."""
MIN_BAND_PER_SPREAD = 1.5


def within(value: float, limits: Range) -> bool:
    """least <= value <= most."""
    least, most = limits
    return (least is None or value >= least) and (most is None or value <= most)


def show_range(limits: Range, unit: str = "") -> str:
    """ "5 to 10 x", "at least 4 %", "exactly 1"."""
    least, most = limits
    tail = f" {unit}" if unit else ""
    if least is None:
        return f"at most {most:g}{tail}" if most is not None else "anything"
    if most is None:
        return f"at least {least:g}{tail}"
    return f"exactly {least:g}{tail}" if least == most else f"{least:g} to {most:g}{tail}"


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of the ledger."""

    name: str
    statement: str
    value: float
    low: float
    high: float
    """Quartiles of the samples; both are the value where there was one sample."""
    unit: str
    claimed: Range
    band: Range
    because: str
    """Why it does not hold here; empty where it does."""

    @property
    def holds(self) -> bool:
        """Whether the number is what people say."""
        return within(self.value, self.claimed)

    @property
    def expected(self) -> bool:
        """Whether the number is where the notebook asserts it to be."""
        return within(self.value, self.band)

    @property
    def verdict(self) -> str:
        """In the words of the course."""
        return "holds here" if self.holds else f"does not hold here, because {self.because}"

    def _ipython_display_(self) -> None:
        """Nothing: the verdict was shown when the claim was made, and a cell's last line would repeat it."""

    def band_is_wide_enough(self) -> bool:
        """A band narrower than 1.5 times the spread would fail by chance."""
        least, most = self.band
        if least is None or most is None:
            return True
        return most - least >= MIN_BAND_PER_SPREAD * (self.high - self.low)
