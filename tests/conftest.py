"""Shared by all tests: what is installed, and a profile for hypothesis that does not depend on the clock."""

from __future__ import annotations

import importlib.util

from hypothesis import HealthCheck, settings

settings.register_profile("ridgeline", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ridgeline")


def pytest_ignore_collect(collection_path, config):
    """Without torch only tests/unit runs."""
    if importlib.util.find_spec("torch") is None and collection_path.is_dir():
        return collection_path.parent.name == "tests" and collection_path.name not in ("unit", "golden")
    return None
