"""One logger for the package; the command line decides whether anybody sees it."""

import logging

logger = logging.getLogger("ridgeline")
