"""What a host has sent and received, counted where it happens: two additions a message."""

from __future__ import annotations

from collections import Counter
from typing import final


@final
class Counters:
    """Bytes of one host, since its start."""

    def __init__(self) -> None:
        self.bytes_out = 0
        """Written to transports: handshakes aside, everything with its framing."""
        self.bytes_in = 0
        self.protocols: dict[str, tuple[int, int]] = {}
        """Payload bytes (out, in) by protocol, headers and framing aside."""
        self.dropped: Counter[str] = Counter()
        """How often a written limit turned something away, by the limit's name in ``p2p.limits``."""

    def count(self, protocol: str, payload_out: int, payload_in: int) -> None:
        out, into = self.protocols.get(protocol, (0, 0))
        self.protocols[protocol] = (out + payload_out, into + payload_in)
