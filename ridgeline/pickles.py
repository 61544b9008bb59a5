"""Frozen dataclasses that go from process to process every step: pickled as their class and values.

What `dataclass(slots=True)` brings for pickling goes through the fields one by one, in Python, and every
stage of a pipeline waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


def pickled_by_position(cls: type[T]) -> type[T]:
    """Decorator for a dataclass of at least two fields that can all be given by position."""
    values: Callable[[T], tuple[Any, ...]] = attrgetter(*(field.name for field in fields(cls)))  # type: ignore[arg-type]

    def reduce(self: T) -> tuple[type[T], tuple[Any, ...]]:
        return cls, values(self)

    cls.__reduce__ = reduce  # type: ignore[assignment, method-assign]
    return cls
