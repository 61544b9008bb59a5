"""Stop strings across token borders: emit what is safe, hold back what could still become one.

The string that is complete first wins; of several complete at the same character, the longest. So the result
does not depend on how the text was cut into tokens.
"""

from __future__ import annotations


class StopStringFinder:
    """Looks for `stops` in text that comes in pieces. Owns the text held back, shorter than any stop string
    it could become.
    """

    __slots__ = ("_found", "_held", "_include_stop", "_stops")

    def __init__(self, stops: tuple[str, ...] = (), *, include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = stops
        self._include_stop = include_stop
        self._held = ""
        self._found: str | None = None

    def push(self, text: str, *, search: bool = True) -> tuple[str, str | None]:
        """More text -> (text to emit now, the stop string found).

        Emitted text ends before the stop string, or with it if `include_stop`; everything after is dropped,
        in later calls too. `search=False` lets text pass unseen (while fewer than min_tokens are out).
        """
        if self._found is not None:
            return "", self._found
        text, self._held = self._held + text, ""
        if not search:
            return text, None
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            end, start, self._found = min(matches)
            return text[: end if self._include_stop else start], self._found
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text, None

    def flush(self) -> str:
        """The text held back; no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
