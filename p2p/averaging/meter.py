"""How fast this host sends in a round, over all its lines together: the most in any ``WINDOW_S``.

Not the mean: most of a round one waits for others, and the line to a slow receiver is busy all the time. So
it is what the host has shown that it can do, seldom more. More, since what the operating system takes into
its buffers counts as sent (a few megabytes a line).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

WINDOW_S: Final = 1.0


class Meter:
    """One round of one member; ``clock`` in seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()
        self._began: float | None = None
        self._total = 0
        self._most = 0

    def sent(self, nbytes: int) -> None:
        """So many bytes have left just now."""
        now = self._clock()
        self._began = now if self._began is None else self._began
        self._recent.append((now, nbytes))
        self._total += nbytes
        while self._recent[0][0] <= now - WINDOW_S:
            self._total -= self._recent.popleft()[1]
        if now - self._began >= WINDOW_S:
            self._most = max(self._most, self._total)

    @property
    def mbps(self) -> float:
        """Megabits a second; 0.0 where everything was sent within ``WINDOW_S``: too little to tell."""
        return self._most * 8 / WINDOW_S / 1e6
