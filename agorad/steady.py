"""A node's own clock: the system's time when it began, and then what truly passed.

A system clock that is set by an hour while a node runs would make certificates of others look expired and
our own future. So the node goes on counting, on a clock that nobody sets and that runs while the machine
sleeps. Whether the old or the new time is right others know: ``heard`` is told how far ahead of ours peers'
clocks are. Where ``ENOUGH`` of them agree with the new time (within ``SAME_S``), it is taken over. Small
corrections (``SMALL_S``) are taken over at once.

Callable from any thread. Limits: ``MOST`` peers' words are kept.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

SMALL_S: Final = 5.0
SAME_S: Final = 60.0
"""How far apart peers' words may be: those that are off by less are not reported."""
ENOUGH: Final = 2
MOST: Final = 64


def passed() -> float:
    """Seconds on the clock that nobody sets; time asleep counts where the system tells."""
    return time.clock_gettime(_CLOCK)


_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SteadyClock:
    """Unix time; call it."""

    def __init__(self, wall: Callable[[], float] = time.time, passed: Callable[[], float] = passed) -> None:
        self._wall = wall
        self._passed = passed
        self._base = wall() - passed()
        self._ahead: OrderedDict[str, float] = OrderedDict()

    def __call__(self) -> float:
        return self._base + self._passed()

    @property
    def off(self) -> float:
        """Seconds that the system's clock is ahead of this one."""
        return self._wall() - self()

    def heard(self, peer: str, ahead: float) -> None:
        """A peer's clock is so many seconds ahead of this one, more than it should be."""
        self._ahead[peer] = ahead
        self._ahead.move_to_end(peer)
        if len(self._ahead) > MOST:
            self._ahead.popitem(last=False)

    def look(self) -> bool:
        """Take the system's time over where that is right; whether it was a jump."""
        off = self.off
        if abs(off) <= SMALL_S:
            self._base += off
            return False
        if sum(abs(ahead - off) <= SAME_S for ahead in self._ahead.values()) < ENOUGH:
            return False
        self._base += off
        self._ahead.clear()
        return True
