"""What the notebooks stand on: predictions, records, claims with verdicts, exercises, plots in one style.

    from ridgeline.course import Lesson
    lesson = Lesson("INF-10")

A notebook measures with the package and tells its story through a `Lesson`, which keeps every number that
the prose repeats. `ridgeline course` lists, runs and opens the notebooks; `ridgeline course ledger` prints
what they claim.
"""

from ridgeline.course.figures import Figure, measure, ratio
from ridgeline.course.lesson import ClaimError, ExerciseError, Lesson
from ridgeline.course.plots import figure

__all__ = ["ClaimError", "ExerciseError", "Figure", "Lesson", "figure", "measure", "ratio"]
