"""How many microbatches a trainer keeps in flight: enough to keep every stage busy, and hardly more.

What is in flight is either worked on and travelling, or it waits. The first is throughput times the latency
of a microbatch that waits nowhere (Little's law). We take the highest throughput and the lowest latency of
the last ``MEMORY_S``, add a quarter to find out whether more would be done, and one for every replica so that
none runs dry; and begin with two for every replica. So credits grow over long lines, where answers are long
on their way, until throughput does not follow; when lines get shorter or replicas leave, they shrink. Never
below ``FIRST`` nor above the places (slots) that workers have: what is beyond them would only hear BUSY.

Sans-IO: the caller says when what was answered. Latencies are whole round trips, seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

FIRST = 4
PROBE = 1.25
A_REPLICA = 2
MEMORY_S = 60.0
LOOK_S = 2.0
"""Throughput is counted over periods of at least this long."""


class Credits:
    """One trainer's."""

    def __init__(self) -> None:
        self._periods: deque[tuple[float, float, float]] = deque()
        """When each ended, microbatches a second in it, the lowest latency in it."""
        self._began: float | None = None
        self._answers = 0
        self._lowest = float("inf")

    def answered(self, now: float, latency: float) -> None:
        """A microbatch came back, so long after it was sent."""
        if self._began is None:
            self._began = now - latency
        self._answers += 1
        self._lowest = min(self._lowest, latency)
        passed = now - self._began
        if passed >= max(LOOK_S, self._lowest):
            self._periods.append((now, self._answers / passed, self._lowest))
            self._began, self._answers, self._lowest = now, 0, float("inf")
        while self._periods and self._periods[0][0] < now - MEMORY_S:
            self._periods.popleft()

    def count(self, replicas: int, places: int, trainers: int) -> int:
        """How many to keep in flight. ``places``: slots of the stage that has the fewest."""
        most = max(FIRST, places // trainers)
        busy = max(FIRST, -(-A_REPLICA * replicas // trainers))
        if self._periods:
            rate = max(rate for _at, rate, _lowest in self._periods)
            latency = min(lowest for _at, _rate, lowest in self._periods)
            busy = max(busy, round(PROBE * rate * latency) + -(-replicas // trainers))
        return min(most, busy)


def places(stages: Iterable[Iterable[int]]) -> int:
    """Slots of the stage that has the fewest, given the slots of each stage's replicas."""
    return min((sum(stage) for stage in stages), default=0)
