"""The lease: proof that the peer was alive a moment ago, on which a microbatch is committed.

It is sound because a ping counts with the time it was *asked for*, which is no later than the time the
peer can have heard it: a late answer renews nothing. Times are kept on the host's clock and on trio's;
both must agree that it is fresh, so that a wall clock set back cannot lengthen it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import trio


@final
class Lease:
    """Proof that the peer was alive a moment ago: when we asked for the last ping that it answered."""

    __slots__ = ("_asked", "_clock", "_steady", "_valid_s")

    def __init__(self, clock: Callable[[], float], valid_s: float) -> None:
        self._clock = clock
        self._steady = trio.lowlevel.current_clock()
        self._valid_s = valid_s
        self._asked = (float("-inf"), float("-inf"))

    def renew(self, asked: tuple[float, float]) -> None:
        """A ping asked for at that time (trio's clock, host's clock) was answered."""
        self._asked = max(self._asked, asked)

    def fresh(self, now: float | None = None) -> bool:
        """Whether a ping that we sent less than 1.5 s ago was answered; callable from any thread.

        ``now`` is on the host's clock, and read from it where it is not given.
        """
        steady, wall = self._asked
        age = (self._clock() if now is None else now) - wall
        return 0 <= age < self._valid_s and self._steady.current_time() - steady < self._valid_s
