"""How a member's line is divided among its connections while a round fills it. Sans-IO.

Connections that are left to themselves divide a line unevenly, and a round ends with the slowest pair.
Windows that the last round has opened let more be under way than line and queue hold, and what is lost is
sent again late. So each connection may send its equal part of what the line carries: the most that arrived
over all of them together, in this round and the last one, divided by those that have something to send.

Whether that is too much is told by round trips. What all of them take longer than they could is the wait
before this member's own line. Whoever takes much longer than that waits before its receiver's, and gets less
until that queue is gone. A round trip holds the answer's way too: a member whose own downloads wait would
take its line for full, so the whole is never much less than what once arrived.

Measured over lines of 20 to 500 Mbit/s and 20 to 150 ms (docs/benchmarks.md). Paths that are
near are not bounded: there the processor is what is short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Final, Generic, TypeVar, final

from p2p.path import Path

LOOK_S: Final = 0.025
"""Between two looks."""
MEASURE_S: Final = 0.4
"""Over which it is counted what arrives, while something waits to be sent all the time: else it says nothing
of the line. Over less, answers that were held back seem to be a faster line."""
SHORT_S: Final = 0.015
"""Of waiting: the line may be faster than thought."""
LONG_S: Final = 0.04
"""Of waiting: less than half of what queues before home lines hold."""
GROWING: Final = 1.25
"""Times as much in the later half of ``MEASURE_S`` as in the earlier: what bounded it was not the line."""
MORE: Final = 1.05
LESS: Final = 0.97
"""Times what was sent before, look by look. Answers are late by two looks, so neither may be steep."""
MOST: Final = 1.25
LEAST: Final = 0.95
"""Times what is known to arrive."""
DRAINING: Final = 0.9
"""Of its part, for a connection that waits long before its receiver's line."""
OPEN: Final = 512 << 10
OPEN_TRIPS: Final = 1.5
"""A window is open where so many bytes may be under way, or what its part brings in so many round trips."""

K = TypeVar("K", bound=Hashable)


@final
class Filling(Generic[K]):
    """One round of one member. Connections are keys of any kind."""

    def __init__(self, before: float = 0.0) -> None:
        """``before``: ``measured`` of the round before, 0 where there was none."""
        self.measured = 0.0
        """Bytes a second that arrived over all connections together, the most so far."""
        self._before = before
        self._whole = before
        self._past: deque[tuple[float, dict[K, int]]] = deque()
        """What had arrived at the looks of the last ``MEASURE_S``, and at the one before."""

    @property
    def line(self) -> float:
        """Bytes a second that this member's line is known to carry; 0: nothing is known."""
        return max(self.measured, self._before)

    def is_open(self, path: Path, connections: int) -> bool:
        """Whether the window of this one of so many connections lets its part through from the start.

        What begins with a small window grows over seconds beside others, and one that rested is made small.
        None is open while nothing is known of the line: all that old windows allow at once would be lost.
        """
        needed = min(OPEN, OPEN_TRIPS * path.least_rtt_s * self.line / connections)
        return self.line > 0 and path.window >= needed and not path.rested

    def look(self, now: float, paths: Mapping[K, Path]) -> dict[K, float]:
        """Bytes a second that each connection may send until the next look; one that is not named: any.

        ``now``: seconds, monotonic; ``paths``: all connections of the round as they are now.
        """
        far = {key: path for key, path in paths.items() if not path.near}
        self._count(now, far)
        waits = {key: path.rtt_s - path.least_rtt_s for key, path in far.items()}
        sending = [key for key, path in far.items() if path.unsent]
        if sending:
            wait = min(waits[key] for key in sending)
            if not self._whole:
                self._whole = self.line if wait > LONG_S else 0.0
            elif wait < SHORT_S:
                self._whole *= MORE
            elif wait > LONG_S:
                self._whole *= LESS
        if not self._whole or not far:
            return {}
        self._whole = max(LEAST * self.line, min(self._whole, MOST * self.line))
        part = self._whole / (len(sending) or len(far))
        return {key: part * (DRAINING if wait > LONG_S else 1.0) for key, wait in waits.items()}

    def _count(self, now: float, paths: Mapping[K, Path]) -> None:
        if not any(path.unsent for path in paths.values()):
            self._past.clear()
        self._past.append((now, {key: path.arrived for key, path in paths.items()}))
        while len(self._past) > 2 and self._past[1][0] <= now - MEASURE_S:
            self._past.popleft()
        then, _ = self._past[0]
        middle = len(self._past) // 2
        if now - then < MEASURE_S or middle == len(self._past) - 1:  # or nobody looked meanwhile
            return
        # Windows that only just grow are no line; of a known one more may arrive at any time.
        if self.line or self._rate(middle, -1) <= GROWING * self._rate(0, middle):
            self.measured = max(self.measured, self._rate(0, -1))

    def _rate(self, first: int, last: int) -> float:
        """Bytes a second that arrived between two looks."""
        (then, had), (now, have) = self._past[first], self._past[last]
        return sum(max(0, count - had.get(key, count)) for key, count in have.items()) / (now - then)
