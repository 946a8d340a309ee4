"""Who gets a turn at proving who it is: inbound handshakes, fairly between addresses. Sans-IO.

``handshakes`` may run at once. When they do, a newcomer takes the place of the latest one from the address
that has the most of them, unless that is its own: then it is turned away. So a flood from few addresses, or
peers that never finish, cost a bounded number of handshakes and leave the others theirs. IPv6 counts by /64,
which is what one household has.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import final

from p2p.errors import RemoteError
from p2p.multiaddr import Multiaddr


@final
class Door:
    """Handshakes of one host that are under way, by where they come from."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._inside: dict[str, list[Callable[[], None]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._inside.values()))

    def enter(self, addr: str, give_up: Callable[[], None]) -> bool:
        """Whether a handshake from ``addr`` may begin; ``give_up`` ends it if its place goes to another."""
        source = source_of(addr)
        if len(self) >= self._places:
            most = max(self._inside, key=lambda other: len(self._inside[other]))
            if len(self._inside[most]) <= len(self._inside.get(source, ())) + 1:
                return False
            self._inside[most][-1]()
            self._remove(most, self._inside[most][-1])
        self._inside.setdefault(source, []).append(give_up)
        return True

    def leave(self, addr: str, give_up: Callable[[], None]) -> None:
        """It ended, however it did."""
        self._remove(source_of(addr), give_up)

    def _remove(self, source: str, give_up: Callable[[], None]) -> None:
        waiting = self._inside.get(source, [])
        if give_up in waiting:
            waiting.remove(give_up)
        if not waiting:
            self._inside.pop(source, None)


def source_of(addr: str) -> str:
    """What counts as one place on the net: an IPv4 address, an IPv6 /64, or the text itself."""
    try:
        host = Multiaddr.parse(addr).host or addr
        ip = ipaddress.ip_address(host)
    except (RemoteError, ValueError):
        return addr
    if ip.version == 6:
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
