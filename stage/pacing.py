"""How fast a donor gives a state away while it trains: as fast as its line goes without a queue before it.

An upload that takes all it can get fills the queue in front of the line, a tenth of a second or more on home
lines, and every microbatch and every part of a round of this node waits there. So the donor keeps to
``SHARE`` of what got through, and now and then looks whether there is more: it gives more and more until its
bytes wait (the path's present round trip against its least, ``QUEUE_S``). Who else fills the line, the node's
own training first, is yielded to, down to ``LEAST`` of the best that it saw.

Without any bound chunks leave in bursts, which wait 10 ms before a line that they half fill; so there is one
as soon as the line's speed is known: when what gets through has not grown for a while. Sans-IO.
"""

from __future__ import annotations

from collections import deque

from p2p.path import Path

QUEUE_S = 0.006
"""What the donor's other messages may have to wait more, and a 32nd of the line's own round trip."""
TICK_S = 0.1
"""Between two looks."""
LEAST = 0.25
SLOWEST = 64_000.0
"""Bytes a second that are given in any case."""
LATELY = 10
"""Looks: a second."""
STEADY_S = 0.2
"""And a round trip: without growth for so long, the line's speed is known."""
GROWTH = 1.1
FAST = 2e6
"""Bytes a second seen before a first bound: a slower line shows a queue, or is a beginning."""
SHARE = 0.85
"""Of the best lately."""
FULL = 0.95
"""Of the bound: where more than that gets through, a wait is the path's own (radio varies), no queue."""
NOW = 2
"""Looks of which one has to be so full: a single one may have come in a pause."""
FAR = 4
"""Times what is allowed: so long a wait is a queue in any case, and perhaps one that grows slowly."""
FORGET = 0.99
"""The best is forgotten, look by look, where bytes wait even at the least: the line has become slower."""
CALM = 15
"""Looks without a queue before more is tried."""
MORE = 1.05
MUCH_MORE = 1.5
"""After as many looks again: the bound was far too low. Both for a path that answers at once."""
MOST = 1.3
"""Of what got through lately: what is given at most, so that it leaves evenly."""


class Pace:
    """The rate of one upload."""

    def __init__(self) -> None:
        self.rate: float | None = None
        """Bytes a second; None: the line's speed is not known yet."""
        self._best = 0.0
        self._lately: deque[float] = deque(maxlen=LATELY)
        self._grown = 0.0
        self._steady_s = 0.0
        self._calm = 0
        """Looks without a queue in a row."""

    def look(self, path: Path) -> float | None:
        """The rate from now on, after a look at the path; call every ``TICK_S``."""
        self._best = max(self._best, path.delivered)
        self._lately.append(path.delivered)
        steady = self._steady(path.least_rtt_s)
        allowed = QUEUE_S + path.least_rtt_s / 32
        waits = path.rtt_s - path.least_rtt_s
        full = self.rate is not None and max(list(self._lately)[-NOW:]) >= FULL * self.rate
        known = steady or self.rate is not None
        if known and (waits > FAR * allowed or (waits > allowed and not full)):
            # Of what lately got through: of the present rate it would be less and less while a queue drains.
            slower = max(SHARE * max(self._lately), LEAST * self._best, SLOWEST)
            self.rate = slower if self.rate is None else min(slower, self.rate)
            if self.rate <= LEAST * self._best:
                self._best *= FORGET
            self._calm = 0
        elif self.rate is not None:
            self._calm += 1
            if self._calm > CALM:
                more = MORE if self._calm <= 2 * CALM else MUCH_MORE
                more **= TICK_S / (TICK_S + 2 * path.least_rtt_s)  # no faster than a queue can show
                self.rate = min(self.rate * more, MOST * max(self._lately) + SLOWEST)
        elif steady and self._best > FAST:
            self.rate = SHARE * self._best
        return self.rate

    def _steady(self, rtt_s: float) -> bool:
        """Whether what gets through grows no more; while it does, it is no line's speed."""
        if self._best > GROWTH * self._grown:
            self._grown, self._steady_s = self._best, 0.0
        else:
            self._steady_s += TICK_S
        return self._steady_s > STEADY_S + rtt_s
