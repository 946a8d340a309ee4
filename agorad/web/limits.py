"""How often a reader may ask. Pure; time is an argument."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

RATE: Final = 20.0
"""Requests a second of one reader, in the long run; a page that is watched live asks once in two."""
BURST: Final = 100.0
READERS: Final = 4096


class Meter:
    """A bucket for each reader, the ``READERS`` that asked last."""

    def __init__(self, rate: float = RATE, burst: float = BURST) -> None:
        self._rate = rate
        self._burst = burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, reader: str, now: float) -> float:
        """0 if the reader may ask now, else the seconds after which it may."""
        left, since = self._left.pop(reader, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        wait = 0.0 if left >= 1.0 else (1.0 - left) / self._rate
        self._left[reader] = (left if wait else left - 1.0), now
        while len(self._left) > READERS:
            self._left.popitem(last=False)
        return wait
