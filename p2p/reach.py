"""Which announced addresses a prober may dial, so that nobody can point it at machines of others.

Only TCP at IPv4 and IPv6 unicast addresses. Loopback, private, shared and link-local ones count only where
this host tells others such an address of its own (a run on one machine or in one house); tunnels that hide an
address in another never do. A name is resolved here, once, and what it resolves to is judged the same way.
Limits: 8 addresses of which one is a name, 2 addresses a name, 3 s for it.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Final

import trio

from p2p.errors import RemoteError
from p2p.identity import PeerId
from p2p.multiaddr import Multiaddr

MOST_ADDRS: Final = 8
RESOLVE_S: Final = 3.0

_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
_NEVER: Final = tuple(
    map(
        ipaddress.ip_network,
        ("0.0.0.0/8", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16"),
    )
)
"""This network, and IPv6 addresses that hold an IPv4 one."""


async def dialable(
    announced: Sequence[str], peer: PeerId, own: Iterable[Multiaddr]
) -> tuple[list[Multiaddr], list[str]]:
    """Addresses to dial ``peer`` at, and a sentence for each that is left out. ``own``: this host's."""
    allowed = {kind(ip) for addr in own if (ip := _ip(addr.host)) is not None}
    found: dict[Multiaddr, None] = {}
    left_out: list[str] = []
    names = 0
    for text in announced[:MOST_ADDRS]:
        try:
            addr = Multiaddr.parse(text)
        except RemoteError:
            left_out.append(f"{text[:80]!r} is not a multiaddr")
            continue
        host, port = addr.host, addr.port
        if host is None or not port:
            left_out.append(f"{addr} is not a TCP address")
            continue
        if addr.peer_id not in (None, peer):
            left_out.append(f"{addr} is another peer's")
            continue
        ip = _ip(host)
        names += ip is None
        if ip is None and names > 1:
            left_out.append(f"{addr} is one name too many")
            continue
        for candidate in [ip] if ip is not None else await _resolve(host, addr.parts[0][0]):
            what = kind(candidate)
            if what in ("public", *allowed) and what != "":
                found[Multiaddr.tcp(str(candidate), port)] = None
            else:
                left_out.append(f"{addr} is {_WORDS[what]}, which others cannot reach")
        if ip is None and not found and not left_out:
            left_out.append(f"{addr}: the name is not known")
    return list(found)[:MOST_ADDRS], left_out


def scope(addr: Multiaddr) -> str | None:
    """The ``kind`` of its address; None for a name, and where there is none."""
    ip = _ip(addr.host)
    return None if ip is None else kind(ip)


def kind(ip: _Ip) -> str:
    """``public``, ``loopback``, ``link-local``, ``private``, or empty for what is never dialled."""
    mapped = getattr(ip, "ipv4_mapped", None)
    if mapped is not None:
        return kind(mapped)
    if ip.is_loopback:
        return "loopback"
    if ip.is_multicast or ip.is_unspecified or any(ip in net for net in _NEVER if net.version == ip.version):
        return ""
    if ip.is_link_local:
        return "link-local"
    if ip.is_global and not getattr(ip, "is_site_local", False):
        return "public"
    return "" if ip.is_reserved else "private"


_WORDS: Final = {
    "loopback": "a loopback address",
    "link-local": "a link-local address",
    "private": "a private address",
    "": "no unicast address",
}


def _ip(host: str | None) -> _Ip | None:
    try:
        return ipaddress.ip_address(host or "")
    except ValueError:
        return None


async def _resolve(name: str, protocol: str) -> list[_Ip]:
    family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(protocol, socket.AF_UNSPEC)
    with trio.move_on_after(RESOLVE_S):
        try:
            rows = await trio.socket.getaddrinfo(name, None, family=family, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return []
        found = dict.fromkeys(_ip(str(row[4][0]).split("%")[0]) for row in rows)
        return [ip for ip in found if ip is not None][:2]
    return []
