"""How long a peer may be silent before it counts as gone. Sans-IO.

Usually as long as the limit says. Where several of the last pings took a good part of that, the peer is busy,
not gone: it has twice as long as the second slowest of the last ``LAST`` took. One slow answer is a hiccup of
the line, and those that come together (``TOGETHER_S``) are one. Who was itself woken late, on a machine that
runs nobody in time, gives twice that on top. ``MOST`` times the limit is the end of it.
"""

from __future__ import annotations

from collections import deque
from typing import Final, final

MOST: Final = 3.0
LAST: Final = 8
TOGETHER_S: Final = 0.25
LATE_KEEPS: Final = 0.75
"""What is left of a late awakening's weight at each one after it."""


@final
class Patience:
    """With one peer."""

    __slots__ = ("_answers", "_at", "_late")

    def __init__(self) -> None:
        self._answers: deque[float] = deque(maxlen=LAST)
        self._at = 0.0
        self._late = 0.0

    def answered(self, seconds: float, now: float) -> None:
        """A ping took so long. ``now``: on a clock that nobody sets."""
        if self._answers and now - self._at < TOGETHER_S:
            self._answers[-1] = max(self._answers[-1], seconds)
        else:
            self._answers.append(seconds)
        self._at = now

    def woke(self, late: float) -> None:
        """We were to wake up so many seconds ago."""
        self._late = max(late, self._late * LATE_KEEPS)

    def with_peer(self, limit: float) -> float:
        """Seconds of silence that are still no proof."""
        slow = sorted(self._answers)[-2] if len(self._answers) > 1 else 0.0
        return min(MOST * limit, max(limit, 2 * slow + 2 * self._late))
