"""The page beside an authority's other work: off unless ``authority.page_listen`` names an address.

Letting nodes in matters more than being looked at: an address that is taken is a warning, and is tried again.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import trio

from agorad.config import PAGE_PORT
from agorad.metrics.address import read_address
from agorad.web.server import BACKLOG, Server
from agorad.web.site import Site
from agorad.web.watch import Watch

if TYPE_CHECKING:
    from agorad.authority.desk import Desk
    from agorad.node import Node

AGAIN_S: Final = 10.0


async def run(node: Node, desk: Desk) -> None:
    """Until cancelled."""
    listener = await _listener(node)
    host, port = listener.socket.getsockname()[:2]
    node.status["page"] = f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    watch = Watch(node, desk)

    def failed(error: Exception) -> None:
        node.warnings["page"] = f"a page could not be made; please report this bug: {error!r:.300}"

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        nursery.start_soon(Server(Site(watch).answer, failed).serve, listener)


async def _listener(node: Node) -> trio.SocketListener:
    host, port = read_address(node.config.authority.page_listen, "authority.page_listen", PAGE_PORT)
    while True:
        try:
            found = _bound(host, port)
        except OSError as error:
            node.warnings["page"] = (
                f"the page cannot be served at {host} port {port}: {error.strerror}; "
                "end what is there, or name another address in authority.page_listen"
            )
            await trio.sleep(AGAIN_S)
        else:
            node.warnings.pop("page", None)
            return found


def _bound(host: str, port: int) -> trio.SocketListener:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError:
        bound.close()
        raise
    return trio.SocketListener(trio.socket.from_stdlib_socket(bound))
