"""When a replica that has no room should be asked again. Sans-IO: time is an argument.

A replica measures how often it makes room, and gives everybody whom it turns away an appointment of their
own, one such interval after the one before: about as many come back as there is room for, however many
callers it has. Told the same moment, all would come at once and all but one be turned away again.
"""

from __future__ import annotations

from typing import Final

import attrs

LEAST_S: Final = 0.05
MOST_S: Final = 10.0
ALPHA: Final = 0.2
"""Weight of the newest interval in the moving average."""
IN_VAIN: Final = 4
"""Callers turned away since a microbatch last ended, from which on the interval is taken to be longer than
it was: at the start, when nothing is known, and after a change."""
GROWTH: Final = 1.25


@attrs.define
class Appointments:
    """The usual time between two microbatches that end, and who comes when."""

    interval_s: float = LEAST_S
    _last: float | None = None
    _next: float = 0.0
    _in_vain: int = 0

    def ended(self, now: float) -> None:
        """A microbatch ended here. Of a pause no more counts than ``MOST_S``."""
        if self._last is not None:
            took = min(MOST_S, now - self._last)
            self.interval_s += ALPHA * (took - self.interval_s)
        self._last = now
        self._in_vain = 0

    def retry_after_s(self, now: float) -> float:
        """Until the next free appointment: what BUSY says."""
        self._in_vain += 1
        if self._in_vain > IN_VAIN:
            self.interval_s = min(MOST_S, self.interval_s * GROWTH)
        at = max(now, self._next) + self.interval_s
        self._next = min(at, now + MOST_S)
        return max(LEAST_S, self._next - now)
