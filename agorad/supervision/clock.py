"""A system clock that was set while the node runs: ``agorad.steady`` keeps the node's own time; this says
so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agorad.steady import SMALL_S
from agorad.supervision.reactions import Quiet, Reaction, Vitals

STOOD_S: Final = 15.0
"""A pause between two looks that is longer is one in which the process did not run."""


class Clock(Quiet):
    """Warns while the system's clock is not the node's."""

    def __init__(self) -> None:
        self._off = 0.0

    def look(self, now: Vitals) -> Iterable[Reaction]:
        off = now.wall - now.ours
        if abs(off) <= SMALL_S:
            if abs(self._off) > SMALL_S:
                yield Reaction("clock", "clear")
        elif abs(off - self._off) > SMALL_S:
            way = "forward" if off > 0 else "back"
            yield Reaction(
                "clock",
                "warn",
                f"the system's clock was set {abs(off):.0f} s {way} while this node runs; it goes on by its "
                "own until others confirm the new time: timedatectl set-ntp true",
            )
        self._off = off


class Standstill(Quiet):
    """Says that the process stood still: suspended, stopped, or starved."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last: float | None = None

    def look(self, now: Vitals) -> Iterable[Reaction]:
        last, self._last = self._last, now.at
        if last is None:
            return
        stood_s = now.at - last - self._every_s
        if stood_s > STOOD_S:
            yield Reaction("standstill", "warn", f"this process stood still for {stood_s:.0f} s")
        elif stood_s < 1.0:
            yield Reaction("standstill", "clear")
