"""From the naive loop to the full engine, one switch at a time, each measured. `climb` is the way in."""

from ridgeline.ladder.climbing import Climb, climb
from ridgeline.ladder.rungs import RUNGS, Rung

__all__ = ["RUNGS", "Climb", "Rung", "climb"]
