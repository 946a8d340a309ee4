"""Whether others can dial this node: a listed node dials it back, once it serves and from time to time.

The verdict (``Host.reachable``) is an event when it is first known and whenever it changes, with its reason.
No means that two listed nodes tried, or the only one, and again a little later. Who cannot be dialled tells
others no address, so that nobody waits for one in vain, and dials those who would dial it
(``agorad.neighbours``). Nothing is concluded where nobody answers, or where the address that others see is
none that this node announces, since listed nodes dial no other.

Limits: one question at a time; ``EVERY_S`` between two tests, ``AGAIN_S`` while the answer is no, ``SOON_S``
while there is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import attrs
import trio

from agorad import outside
from agorad.events import Reachability
from p2p.errors import P2PError
from p2p.identify import identify
from p2p.multiaddr import Multiaddr
from p2p.reach import scope

if TYPE_CHECKING:
    from agorad.node import Node
    from agorad.run import NodeRef

EVERY_S: Final = 600.0
AGAIN_S: Final = 120.0
SOON_S: Final = 20.0
FIRST_S: Final = 1.0
"""At most so long after the node began to serve: nodes that start together do not all ask at once."""
ONE_S: Final = 5.0
CONFIRM_S: Final = 5.0
"""Before a no that is new is believed, it is asked again."""
SURE: Final = 2
"""Listed nodes that have to say no."""


@attrs.frozen
class Verdict:
    """What a look came to; ``reachable`` is None where nobody can tell."""

    reachable: bool | None
    addr: str
    by: str
    why: str


async def watch(node: Node) -> None:
    """Until cancelled: look, and say what is new."""
    await trio.sleep(node.rng.uniform(0, FIRST_S))
    while True:
        verdict = await look(node)
        if verdict.reachable is False and node.host.reachable is not False:
            await trio.sleep(CONFIRM_S)
            verdict = await look(node)
        if verdict.reachable is not None:
            _take(node, verdict)
        pause = {True: EVERY_S, False: AGAIN_S, None: SOON_S}[verdict.reachable]
        if verdict.reachable is None and node.host.reachable is not None:
            pause = AGAIN_S
        await trio.sleep(pause * node.rng.uniform(0.8, 1.2))


async def look(node: Node) -> Verdict:
    """Ask listed nodes, one after the other in any order, until the answer is sure."""
    listed = [*node.manifest.seeds, *node.manifest.authorities, *node.manifest.trainers]
    refs = list({ref.peer_id: ref for ref in listed if ref.addrs}.values())
    node.rng.shuffle(refs)
    refused: Verdict | None = None
    said_no = 0
    for ref in refs:
        if ref.peer_id == node.identity.peer_id:
            continue
        try:
            verdict = await _ask(node, ref)
        except (P2PError, trio.TooSlowError):
            continue  # busy, or not there: another is asked
        if verdict.reachable is not False:
            return verdict
        refused = verdict
        said_no += 1
        if said_no >= SURE:
            break
    return refused or Verdict(None, "", "", "no listed node could look")


async def _ask(node: Node, ref: NodeRef) -> Verdict:
    addrs = [str(addr.bare()) for addr in node.host.addrs]
    if not addrs:
        return Verdict(False, "", "", "this node listens nowhere (node.listen)")
    with trio.fail_after(2 * ONE_S):
        connection = await node.host.connect(ref.peer_id, addrs=ref.multiaddrs(), deadline=ONE_S)
        seen = (await identify(connection, deadline=ONE_S)).observed
    if seen is not None and seen.host not in {addr.host for addr in node.host.addrs}:
        why = f"{ref.peer_id} sees this node at {seen.host}, which it does not announce (node.announce)"
        return Verdict(None if _some_public(node.host.addrs) else False, "", ref.peer_id, why)
    by, found = await outside.ask(node.host, [ref], addrs)
    return Verdict(found.reached, found.addr, by, found.why)


def _some_public(addrs: Iterable[Multiaddr]) -> bool:
    """Whether one of them may be dialled from anywhere: it is public, or a name."""
    return any(scope(addr) in ("public", None) for addr in addrs)


def _take(node: Node, verdict: Verdict) -> None:
    assert verdict.reachable is not None
    if verdict.reachable:
        node.warnings.pop("reachability", None)
    else:
        node.warnings["reachability"] = (
            f"others cannot dial this node ({verdict.why}); it works over connections that it opens itself, "
            "which costs others more; open or forward the port: docs/network.md"
        )
    if node.host.reachable is not verdict.reachable:
        node.host.reachable = verdict.reachable
        node.emit(
            Reachability(
                reachable=verdict.reachable,
                addr=verdict.addr,
                by=verdict.by,
                why=verdict.why or "dialled back",
            )
        )
