"""Two hosts over real TCP, and what they ask each other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from p2p.errors import PeerGone
from p2p.event import Event
from p2p.host import Host
from p2p.identity import Identity
from p2p.limits import Limits
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call

LOCAL = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")


@asynccontextmanager
async def two_hosts(limits: Limits = Limits()) -> AsyncIterator[tuple[Host, Host, list[Event]]]:
    events: list[Event] = []
    one = Host(Identity.generate())
    two = Host(Identity.generate(), emit=events.append, limits=limits)
    with trio.fail_after(20):
        async with one.run([LOCAL]), two.run([LOCAL]):
            one.learn(two.peer_id, two.addrs)
            yield one, two, events


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main)


async def echo(call: Call) -> None:
    while True:
        try:
            message = await call.receive(max_payload=1 << 24)
        except PeerGone:
            return
        await call.send(message.header, message.payload)


async def ask(host: Host, other: Host, protocol: str, payload: bytes = b"", room: int = 1 << 24) -> bytes:
    async with await host.call(other.peer_id, protocol, deadline=5) as call:
        await call.send({"t": "ask"}, payload)
        return bytes((await call.receive(max_payload=room)).payload)
