"""The authority: answers joins with certificates, on the same host as everything else.

What it answers is in ``agorad.authority``: joins at its ``desk``, points, the operator's words, and the page.
"""

from __future__ import annotations

from functools import partial

import trio

from agorad.authority import accounts
from agorad.authority.desk import Desk, Outside
from agorad.authority.messages import PROTOCOL
from agorad.authority.operator import Operator
from agorad.authority.points import PointsDesk
from agorad.authority.store import Store
from agorad.metrics.readings import Readings
from agorad.node import Node
from p2p.errors import LocalError


async def run(node: Node, outside: Outside | None = None) -> None:
    """Serve until asked to stop."""
    if node.identity.peer_id not in {ref.peer_id for ref in node.manifest.authorities}:
        raise LocalError(
            f"{node.identity.peer_id} is not an authority of run {node.manifest.run.id!r}; "
            "the manifest lists those that are"
        )
    if node.manifest.admission.accounts == "file":
        accounts.load(node.config.authority.accounts)  # damage is better known now than at a join
    open_store = partial(Store, node.config.database)
    store = await trio.to_thread.run_sync(open_store)
    desk = Desk(node, store, outside or Outside(node))
    try:
        node.manifest_taken.append(desk.take_manifest)
        await desk.restore()
        node.host.handle(PROTOCOL, desk.serve, open_to_all=True)
        operator = Operator(node, desk)
        node.readings = lambda: Readings(waiting=len(desk.room.queue))
        points = PointsDesk(node, store, desk.ask, open_store)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.room.run)
            nursery.start_soon(operator.publish)
            nursery.start_soon(points.run)
            if node.config.authority.page_listen:
                from agorad.web import service  # an HTTP server is much to import for who has no page

                nursery.start_soon(service.run, node, desk)
            node.ready()
            await node.stopping.wait()
            nursery.cancel_scope.cancel()
    finally:
        await desk.close()
