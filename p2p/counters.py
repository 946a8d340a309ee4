"""What a host has sent and received, counted where it happens: two additions a message.

What written limits turn away is counted as well, and said: ``LimitReached`` at once, and then at most once in
``TOLD_EVERY_S`` for each limit, with how often it was since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, final

import trio

from p2p.event import Emit, ignore
from p2p.host_events import LimitReached

TOLD_EVERY_S: Final = 10.0


@final
class Counters:
    """Bytes of one host, since its start."""

    def __init__(self, emit: Emit = ignore, now: Callable[[], float] = trio.current_time) -> None:
        """``now``: seconds on a clock that nobody sets."""
        self.bytes_out = 0
        """Written to transports: handshakes aside, everything with its framing."""
        self.bytes_in = 0
        self.protocols: dict[str, tuple[int, int]] = {}
        """Payload bytes (out, in) by protocol, headers and framing aside."""
        self.dropped: Counter[str] = Counter()
        """How often a written limit turned something away, by the limit's name in ``p2p.limits``."""
        self._emit = emit
        self._now = now
        self._told: dict[str, tuple[float, int]] = {}

    def count(self, protocol: str, payload_out: int, payload_in: int) -> None:
        out, into = self.protocols.get(protocol, (0, 0))
        self.protocols[protocol] = (out + payload_out, into + payload_in)

    def turned_away(self, limit: str, who: str) -> None:
        """A limit was reached by ``who``: a peer id, or an address where none is proven."""
        self.dropped[limit] += 1
        now, total = self._now(), self.dropped[limit]
        at, before = self._told.get(limit, (-TOLD_EVERY_S, 0))
        if not before or now - at >= TOLD_EVERY_S:
            self._told[limit] = (now, total)
            self._emit(LimitReached(limit=limit, who=who, count=total - before))
