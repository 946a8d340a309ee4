"""How long a peer may be silent before it counts as gone. Sans-IO.

Usually as long as the limit says. Where pings lately took a good part of that, the peer is busy, not gone: it
has as long as answers can be expected to take, their mean and four times what they vary (as TCP waits for
acknowledgements, RFC 6298). Who was itself woken late, on a machine that runs nobody in time, gives twice
that on top. ``MOST`` times the limit is the end of it. Good times count again within some answers.
"""

from __future__ import annotations

from typing import Final, final

MOST: Final = 3.0
LATE_HALVES: Final = 0.75
"""What is left of a late awakening's weight at each one after it."""


@final
class Patience:
    """With one peer."""

    __slots__ = ("_late", "_mean", "_varies")

    def __init__(self) -> None:
        self._mean: float | None = None
        self._varies = 0.0
        self._late = 0.0

    def answered(self, seconds: float) -> None:
        """A ping took so long."""
        if self._mean is None:
            self._mean, self._varies = seconds, seconds / 2
            return
        self._varies += (abs(seconds - self._mean) - self._varies) / 4
        self._mean += (seconds - self._mean) / 8

    def woke(self, late: float) -> None:
        """We were to wake up so many seconds ago."""
        self._late = max(late, self._late * LATE_HALVES)

    def with_peer(self, limit: float) -> float:
        """Seconds of silence that are still no proof."""
        expected = (self._mean or 0.0) + 4 * self._varies + 2 * self._late
        return min(MOST * limit, max(limit, expected))
