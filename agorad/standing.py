"""Every member's watch of the authorities' revocations: who was taken out counts as out within seconds.

Each ``WATCH_S`` the lists that the run's authorities publish in the hash table are read. A list counts if a
listed authority signed it, it is whole and newer than the one known; everything else is an event at most:
failing to read harms nobody. Who finds itself on a list ends with code 17 and the authority's reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from agorad.authority import revocation
from agorad.events import ListUnreadable
from agorad.exitcodes import DaemonExit, ExitCode
from p2p.errors import P2PError, RemoteError
from p2p.identity import PeerId
from p2p.kad.record import Record

if TYPE_CHECKING:
    from agorad.node import Node

WATCH_S: Final = 15.0
READ_S: Final = 5.0


async def watch(node: Node, every_s: float = WATCH_S) -> None:
    """Until cancelled."""
    bad: set[PeerId] = set()
    while True:
        await trio.sleep(every_s * node.rng.uniform(0.8, 1.0))
        try:
            await look(node, bad)
        except (P2PError, trio.TooSlowError):
            continue


async def look(node: Node, bad: set[PeerId]) -> None:
    """Read all lists once. ``bad``: authorities whose list could not be read last time, said once."""
    run = node.manifest.run.id
    first = await node.dht.get(revocation.key(run, 0), deadline=READ_S)
    for record in first.values():
        authority = record.owner
        if authority not in node.trust.authorities:
            continue
        try:
            at, peers = revocation.read(await _pages(node, record))
            if node.trust.revocations.replace(authority, at, peers):
                _look_for_self(node)
        except RemoteError as error:
            if authority not in bad:
                bad.add(authority)
                node.emit(ListUnreadable(authority=authority, why=str(error)))
        else:
            bad.discard(authority)


async def _pages(node: Node, first: Record) -> list[object]:
    values: list[object] = [first.value]
    for page in range(1, revocation.page_count(first.value)):
        found = await node.dht.get(revocation.key(node.manifest.run.id, page), deadline=READ_S)
        more = next((record for record in found.values() if record.owner == first.owner), None)
        if more is None:
            raise RemoteError(f"page {page} of a list of revoked peers is missing")
        values.append(more.value)
    return values


def _look_for_self(node: Node) -> None:
    own = node.identity.peer_id
    if own in node.trust.standing:
        return
    entry = node.trust.revocations.find(own, node.clock())
    if entry is not None:
        node.end(DaemonExit(ExitCode.REMOVED, f"the run's operator removed this node: {entry.why}"))
