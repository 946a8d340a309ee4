"""How many microbatches a trainer keeps in flight: enough to keep every stage busy, and hardly more.

What is in flight is either worked on and travelling, or it waits. The first is throughput times the latency
of a microbatch that waits nowhere (Little's law). We take the highest throughput and the lowest latency of
the last ``MEMORY_S``, add a quarter to find out whether more would be done, and one for every replica so that
none runs dry; and begin with two for every replica. So credits grow over long lines, where answers are long
on their way, until throughput does not follow; when lines get shorter or replicas leave, they shrink. Never
below ``FIRST`` nor above the places (slots) that workers have: what is beyond them would only hear BUSY.

Where every microbatch waits somewhere, the lowest latency is none that waits nowhere, and what follows from
it would be a quarter more each time. So when the lowest is ``STALE_S`` old we go back to half of what it asks
for until one that was sent since is answered (ProbeRTT of BBR: Cardwell et al., "BBR: Congestion-Based
Congestion Control", 2016). The queues that this empties keep replicas busy meanwhile. Trainers fall into
step, since each sees the low latency when another one steps back.

Sans-IO: the caller says when what was answered. Latencies are whole round trips, seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

FIRST = 4
PROBE = 1.25
A_REPLICA = 2
MEMORY_S = 60.0
STALE_S = 45.0
BACK = 0.5
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
        self._back_since: float | None = None
        """Since when fewer are in flight, to see how long one takes then."""
        self._seen_at = float("-inf")
        """When that was seen last."""

    def answered(self, now: float, latency: float) -> None:
        """A microbatch came back, so long after it was sent."""
        if self._began is None:
            self._began = now - latency
        self._answers += 1
        self._lowest = min(self._lowest, latency)
        if self._back_since is not None and now - latency >= self._back_since:
            self._back_since, self._seen_at = None, now
        passed = now - self._began
        if passed >= max(LOOK_S, self._lowest):
            self._periods.append((now, self._answers / passed, self._lowest))
            self._began, self._answers, self._lowest = now, 0, float("inf")
            lowest_at = max(self._periods, key=lambda period: (-period[2], period[0]))[0]
            if self._back_since is None and max(lowest_at, self._seen_at) < now - STALE_S:
                self._back_since = now
        while self._periods and self._periods[0][0] < now - MEMORY_S:
            self._periods.popleft()

    def count(self, replicas: int, places: int, trainers: int) -> int:
        """How many to keep in flight. ``places``: slots of the stage that has the fewest."""
        most = max(FIRST, places // trainers)
        busy = max(FIRST, -(-A_REPLICA * replicas // trainers))
        if self._periods:
            rate = max(rate for _at, rate, _lowest in self._periods)
            latency = min(lowest for _at, _rate, lowest in self._periods)
            if self._back_since is None:
                busy = max(busy, round(PROBE * rate * latency) + -(-replicas // trainers))
            else:
                busy = max(busy, round(BACK * rate * latency))
        return min(most, busy)


def places(stages: Iterable[Iterable[int]]) -> int:
    """Slots of the stage that has the fewest, given the slots of each stage's replicas."""
    return min((sum(stage) for stage in stages), default=0)
