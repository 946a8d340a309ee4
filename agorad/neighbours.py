"""How a worker that nobody can dial is reached all the same: it dials those who would dial it.

Streams run both ways over a connection, whoever opened it. Callers of a worker are the workers of the stage
before it (trainers, for the first stage); its mates average with it and fetch its state; authorities look
whether it is there. It does so only while ``Host.reachable`` is False. Two nodes that nobody can dial do not
meet: that would need a relay.

Limits: ``AT_ONCE`` dials; a look each ``EVERY_S``, each dial with a deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import trio

from p2p.errors import P2PError
from p2p.identity import PeerId
from p2p.multiaddr import Multiaddr

if TYPE_CHECKING:
    from agorad.node import Node
    from stage.roster import Roster

EVERY_S: Final = 2.0
AT_ONCE: Final = 8
DIAL_S: Final = 5.0


async def keep(node: Node, roster: Roster, stage: int) -> None:
    """Until cancelled. ``roster`` is the worker's; the views needed here are added to it when they are."""
    while True:
        if node.host.reachable is False:
            await _dial(node, _neighbours(node, roster, stage))
        await trio.sleep(EVERY_S * node.rng.uniform(0.75, 1.25))


def _neighbours(node: Node, roster: Roster, stage: int) -> dict[PeerId, Sequence[Multiaddr]]:
    listed = [*node.manifest.authorities, *(node.manifest.trainers if stage == 0 else ())]
    found: dict[PeerId, Sequence[Multiaddr]] = {ref.peer_id: ref.multiaddrs() for ref in listed if ref.addrs}
    for number in (stage - 1, stage) if stage else (stage,):
        for peer, entry in roster.view(number).entries.items():
            if entry.addrs:
                found.setdefault(peer, entry.addrs)
    found.pop(node.identity.peer_id, None)
    return found


async def _dial(node: Node, neighbours: dict[PeerId, Sequence[Multiaddr]]) -> None:
    slots = trio.CapacityLimiter(AT_ONCE)

    async def dial(peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
        async with slots:
            try:
                await node.host.connect(peer, addrs=addrs, deadline=DIAL_S)
            except P2PError:
                pass  # it may be gone; the next look is seconds away

    async with trio.open_nursery() as nursery:
        for peer, addrs in neighbours.items():
            connection = node.host.connections.get(peer)
            if connection is None or not connection.usable:
                nursery.start_soon(dial, peer, addrs)
