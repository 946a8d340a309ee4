"""How a node that listens everywhere learns where others see it, so that it announces what can be dialled.

A listed node of the run says from which address this one came (identify); with the port that is listened on
that is where others would dial, if router and firewall let them: the authority's port test decides. Where
``node.announce`` is set, or the address listened on is one of a kind, nothing is asked. At most ``ASK_S`` a
node, ``MOST`` nodes.
"""

from __future__ import annotations

import ipaddress
from typing import Final

import trio

from agorad.events import AddressObserved
from agorad.node import Node
from p2p.errors import P2PError
from p2p.identify import identify
from p2p.multiaddr import Multiaddr

ASK_S: Final = 4.0
MOST: Final = 3


async def observe(node: Node) -> None:
    """Announce the address that the first answering listed node sees, before those of this machine."""
    listened = [Multiaddr.parse(text) for text in node.config.node.listen]
    if node.config.node.announce or not any(_anywhere(addr) for addr in listened):
        return
    refs = [*node.manifest.authorities, *node.manifest.seeds][:MOST]
    for ref in refs:
        try:
            with trio.fail_after(ASK_S):
                connection = await node.host.connect(ref.peer_id, addrs=ref.multiaddrs(), deadline=ASK_S)
                seen = (await identify(connection, deadline=ASK_S)).observed
        except (P2PError, trio.TooSlowError):
            continue
        if seen is None or seen.host is None:
            continue
        node.host.announce = []
        bound = [addr.bare() for addr in node.host.addrs]
        ports = [addr.port for addr in bound if addr.port is not None]
        outside = [Multiaddr.tcp(seen.host, port) for port in dict.fromkeys(ports)]
        node.host.announce = list(dict.fromkeys([*outside, *bound]))
        if not set(outside) <= set(bound):
            node.emit(AddressObserved(address=seen.host, by=ref.peer_id))
        return


def _anywhere(addr: Multiaddr) -> bool:
    try:
        return ipaddress.ip_address(addr.host or "").is_unspecified
    except ValueError:
        return False
