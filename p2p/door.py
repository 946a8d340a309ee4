"""Who may come in, fairly between addresses: how often, who proves who it is, who stays. Sans-IO.

``Arrivals`` bounds how often one address may connect. ``Door``: ``handshakes`` may run at once. When they do,
a newcomer takes the place of the latest one from the address that has the most of them, unless that is its
own: then it is turned away. So a flood from few addresses, or peers that never finish, cost a bounded number
of handshakes and leave the others theirs. ``crowding`` is the same rule for guests that are in. IPv6 counts
by /64, which is what one household has.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar, final

from p2p.errors import RemoteError
from p2p.multiaddr import Multiaddr

SOURCES: Final = 4096
"""Addresses whose arrivals are remembered; of more, those that came longest ago are forgotten."""


@final
class Arrivals:
    """How often each address may connect: ``burst`` at once, then ``per_s`` a second."""

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admit(self, source: str, now: float) -> bool:
        """Whether one more may come from there. ``now``: seconds on a clock that nobody sets."""
        at, left = self._left.pop(source, (now, float(self._burst)))
        left = min(float(self._burst), left + (now - at) * self._per_s)
        self._left[source] = (now, left - 1 if left >= 1 else left)
        if len(self._left) > SOURCES:
            self._left.popitem(last=False)
        return left >= 1


class _Guest(Protocol):
    @property
    def source(self) -> str: ...


_G = TypeVar("_G", bound=_Guest)


def crowding(guests: Sequence[_G], newcomer: str) -> _G | None:
    """Of ``guests``, oldest first, the one that makes room for a newcomer from that source.

    The latest one of the source that has the most; None if the newcomer's own would have as many.
    """
    count = Counter(guest.source for guest in guests)
    if not count:
        return None
    most = max(count, key=lambda source: count[source])
    if count[most] <= count[newcomer] + 1:
        return None
    return next(guest for guest in reversed(guests) if guest.source == most)


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
