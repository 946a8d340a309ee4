"""A host under a flood: what it costs is bounded, and others still come in."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import trio

from p2p.event import Event
from p2p.host import Host
from p2p.host_events import Disconnected
from p2p.identify import ping
from p2p.identity import Identity
from p2p.limits import Limits
from p2p.membership import Membership, Trust, issue
from p2p.multiaddr import Multiaddr

LOCAL = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
AUTHORITY = Identity.generate(b"a" * 32)
TRUST = Trust(run="run", manifest_hash=bytes(32), authorities=frozenset({AUTHORITY.peer_id}))


def within(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(60):
            await main()

    trio.run(limited)


def host(*, member: bool, limits: Limits = Limits(), events: list[Event] | None = None) -> Host:
    identity, now = Identity.generate(), time.time()
    certificate = issue(
        AUTHORITY, run="run", account="x", peer_id=identity.peer_id, issued=now, expires=now + 600
    ).encode()
    one = Host(identity, limits=limits, emit=(events if events is not None else []).append)
    one.membership = Membership(TRUST, lambda: certificate if member else None, time.time)
    return one


async def silent(port: int, source: str) -> trio.SocketStream:
    """A connection that never says a word."""
    socket = trio.socket.socket()
    await socket.bind((source, 0))
    await socket.connect(("127.0.0.1", port))
    return trio.SocketStream(socket)


async def closed(stream: trio.SocketStream) -> bool:
    with trio.move_on_after(0.05):
        return not await stream.receive_some(1)
    return False


def test_slow_peers_of_one_address_do_not_keep_others_out() -> None:
    limits = Limits(handshakes=8, handshake_s=30.0)

    async def main() -> None:
        server = host(member=True, limits=limits)
        async with server.run([LOCAL]), AsyncExitStack() as stack:
            port = server.addrs[0].port
            assert port is not None
            slow = [await stack.enter_async_context(await silent(port, "127.0.0.2")) for _ in range(20)]
            await trio.sleep(0.3)
            assert [await closed(one) for one in slow].count(False) == 8
            for _ in range(12):  # more than there are places, one after the other
                guest = host(member=True)
                async with guest.run():
                    connection = await guest.connect(server.peer_id, addrs=server.addrs, deadline=10)
                    assert await ping(connection, block=bytes(32), deadline=10) < 10
            assert server.counters.dropped["handshakes"] >= 13
            assert [await closed(one) for one in slow].count(False) <= 7

    within(main)


def test_the_last_connections_are_for_members() -> None:
    limits = Limits(connections=6, reserved=2)

    async def main() -> None:
        events: list[Event] = []
        server = host(member=True, limits=limits, events=events)
        async with server.run([LOCAL]), AsyncExitStack() as stack:
            guests = [await stack.enter_async_context(host(member=False).run()) for _ in range(7)]
            for guest in guests:
                await guest.connect(server.peer_id, addrs=server.addrs, deadline=10)
            while len(server.connections) > 4:  # noqa: ASYNC110
                await trio.sleep(0.02)
            assert server.counters.dropped["reserved"] == 3
            assert sum(isinstance(event, Disconnected) for event in events) == 3
            for _ in range(2):
                member = await stack.enter_async_context(host(member=True).run())
                connection = await member.connect(server.peer_id, addrs=server.addrs, deadline=10)
                assert await ping(connection, block=bytes(32), deadline=10) < 10
            assert len(server.connections) == 6

    within(main)
