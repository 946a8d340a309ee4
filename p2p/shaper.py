"""A cap on what a host sends or receives: bytes reserve their time on a line of a given rate.

All connections of a host share one ``Shaper`` a direction. A passage of ``size`` bytes begins when those
reserved before it are through; it waits until then, so the order is that of asking and no connection starves.
Up to ``BURST_S`` of unused time may be caught up. Small messages (pings, control) are counted and never wait:
a cap must not look like a dead peer. Without a rate everything passes at once.
"""

from __future__ import annotations

import math
from typing import Final, final

import trio

BURST_S: Final = 0.1
SMALL: Final = 2048
"""Bytes that pass at once."""
SHARE_S: Final = 0.05
"""Of the line's time, what one passage should take."""
LEAST: Final = 16 * 1024


@final
class Shaper:
    """See the file's opening. ``rate``: bytes a second, None for no cap; may be set at any time."""

    def __init__(self, rate: float | None = None) -> None:
        self.rate = rate
        self._free_at = -math.inf
        """When the line is through with what was reserved."""

    def portion(self, most: int) -> int:
        """How many bytes to let pass at a time, at most ``most``: large passages hold the others up."""
        return most if self.rate is None else max(min(LEAST, most), min(most, int(self.rate * SHARE_S)))

    async def passage(self, size: int) -> None:
        """Wait for the turn of ``size`` bytes."""
        if self.rate is None:
            return
        now = trio.current_time()
        begins = max(self._free_at, now - BURST_S)
        self._free_at = begins + size / self.rate
        if size > SMALL and begins > now:
            await trio.sleep(begins - now)
