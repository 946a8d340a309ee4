"""Which lines of a log are told, and which are only counted: ``MOST`` of a kind each ``WINDOW_S``.

A peer that keeps knocking, or a run of quick steps, must not fill a disk or bury what matters. Every event
is in ``events.jsonl`` anyway. Pure: time is an argument. Limits: kinds are the code's own event names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import attrs

MOST: Final = 60
WINDOW_S: Final = 60.0


@attrs.define
class _Window:
    began: float
    told: int = 0
    held: int = 0


class Repeats:
    """One log's memory of what it said lately."""

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}

    def over(self, now: float) -> Iterator[tuple[str, int]]:
        """Kinds whose window is over, with how many were held back in it."""
        for kind, window in list(self._windows.items()):
            if not 0 <= now - window.began < WINDOW_S:
                del self._windows[kind]
                if window.held:
                    yield kind, window.held

    def all(self) -> Iterator[tuple[str, int]]:
        """The same for all windows, at the end."""
        for kind, window in self._windows.items():
            if window.held:
                yield kind, window.held
        self._windows.clear()

    def admits(self, kind: str, now: float) -> bool:
        """Whether one more of this kind is told."""
        window = self._windows.setdefault(kind, _Window(now))
        if window.told < MOST:
            window.told += 1
            return True
        window.held += 1
        return False
