"""How fast a donor gives a state away while it trains: as fast as its line goes without a queue before it.

An upload that takes all it can get fills the queue in front of the line, a tenth of a second or more on home
lines, and every microbatch and every part of a round of this node waits there. So the donor watches how long
its bytes wait (the path's present round trip against its least): beyond ``QUEUE_S`` it gives what lately got
through less a bit, below it more and more again. Who else fills the line, the node's own training first,
is yielded to, down to ``LEAST`` of the best that it saw. Sans-IO.
"""

from __future__ import annotations

from p2p.path import Path

QUEUE_S = 0.012
"""What the donor's other messages may have to wait more, and an eighth of the line's own round trip."""
TICK_S = 0.1
"""Between two looks."""
LEAST = 0.25
SLOWEST = 64_000.0
"""Bytes a second that are given in any case."""
MORE = 1.04
LESS = 0.92
MUCH_LESS = 0.7


class Pace:
    """The rate of one upload."""

    def __init__(self) -> None:
        self.rate: float | None = None
        """Bytes a second; None: no bound was needed yet."""
        self._best = 0.0

    def look(self, path: Path) -> float | None:
        """The rate from now on, after a look at the path; call every ``TICK_S``."""
        self._best = max(self._best, path.delivered)
        allowed = QUEUE_S + path.least_rtt_s / 8
        waits = path.rtt_s - path.least_rtt_s
        if waits > allowed:
            share = LESS if waits < 2 * allowed else MUCH_LESS
            slower = share * min(path.delivered, self.rate or path.delivered)
            self.rate = max(slower, LEAST * self._best, SLOWEST)
        elif self.rate is not None:
            self.rate = min(self.rate * MORE, 2 * self._best + SLOWEST)
        return self.rate
