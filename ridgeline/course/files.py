"""Where the course's files are: notebooks and results in the checkout, the reader's own at home."""

from __future__ import annotations

import os
from pathlib import Path

from ridgeline.errors import ConfigError

PROFILE = "RIDGELINE_COURSE_PROFILE"
"""fast (some seconds a measurement, the default) or full."""
DEVICE = "RIDGELINE_COURSE_DEVICE"
MEASURED = "RIDGELINE_COURSE_MEASURED"
"""report: a measured claim that fails is told and the run goes on; unset: every claim that fails ends it."""
RESULTS = "RIDGELINE_COURSE_RESULTS"
"""The folder that the run writes its data file to; unset: the reader's own."""


def checkout() -> Path:
    """The root of the checkout. Raises ConfigError where the package was installed without its notebooks."""
    for folder in (Path(__file__).parents[2], Path.cwd(), *Path.cwd().parents):
        if (folder / "notebooks").is_dir() and (folder / "ridgeline").is_dir():
            return folder
    raise ConfigError(
        "the notebooks are not installed with the package; clone the repository and run this inside it"
    )


def reader_folder() -> Path:
    """Of this reader's predictions and results, made where it is missing."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    folder = Path(base) / "ridgeline/course"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
