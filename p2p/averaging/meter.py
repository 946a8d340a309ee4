"""How fast this host sends in a round, over all its lines together: the most in any ``WINDOW_S``.

Only time counts in which some line has something to send: else who reduces less and has less to send would
be taken for slow, and be given even less in the next round. And not the mean: the line to a slow receiver is
busy all the time. So it is what the host has shown that it can do, seldom more. More, since what the
operating system takes into its buffers counts as sent (a few megabytes a line).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

WINDOW_S: Final = 1.0


class Meter:
    """One round of one member; ``clock`` in seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()
        self._lines = 0
        """That have something to send."""
        self._since = 0.0
        self._spent = 0.0
        """Seconds in which some line had, before ``_since``."""
        self._total = 0
        self._most = 0

    @contextmanager
    def sending(self) -> Iterator[None]:
        """While held, one line more has something to send."""
        if not self._lines:
            self._since = self._clock()
        self._lines += 1
        try:
            yield
        finally:
            self._lines -= 1
            if not self._lines:
                self._spent += self._clock() - self._since

    def sent(self, nbytes: int) -> None:
        """So many bytes have left just now; only while ``sending``."""
        now = self._spent + self._clock() - self._since
        self._recent.append((now, nbytes))
        self._total += nbytes
        while self._recent[0][0] <= now - WINDOW_S:
            self._total -= self._recent.popleft()[1]
        if now >= WINDOW_S:
            self._most = max(self._most, self._total)

    @property
    def mbps(self) -> float:
        """Megabits a second; 0.0 where everything was sent within ``WINDOW_S``: too little to tell."""
        return self._most * 8 / WINDOW_S / 1e6
