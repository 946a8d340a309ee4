"""A host under a flood: what it costs is bounded, and others still come in."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import trio

from p2p.errors import PeerGone
from p2p.event import Event
from p2p.host import Host
from p2p.host_events import Disconnected, LimitReached
from p2p.identify import ping
from p2p.identity import Identity, PeerId
from p2p.limits import Limits
from p2p.membership import Membership, Trust, issue
from p2p.multiaddr import Multiaddr
from p2p.secure import upgrade

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
            turned_away = server.counters.dropped["reserved"]
            assert turned_away >= 3  # one that was closed before its hello was answered comes again
            assert sum(isinstance(event, Disconnected) for event in events) == turned_away
            for _ in range(2):
                member = await stack.enter_async_context(host(member=True).run())
                connection = await member.connect(server.peer_id, addrs=server.addrs, deadline=10)
                assert await ping(connection, block=bytes(32), deadline=10) < 10
            assert len(server.connections) == 6

    within(main)


async def stranger(server: PeerId, port: int, source: str) -> trio.abc.Stream:
    """One more identity from that address; it proves its key and then says nothing."""
    stream = await silent(port, source)
    proven = await upgrade(stream, Identity.generate(), expected=server, entropy=os.urandom, dialer=True)
    return proven.stream


def test_strangers_of_one_address_do_not_keep_strangers_of_others_out() -> None:
    limits = Limits(connections=10, reserved=4, hello_s=0.2)

    async def main() -> None:
        server = host(member=True, limits=limits)
        async with server.run([LOCAL]), AsyncExitStack() as stack:
            port = server.addrs[0].port
            assert port is not None
            for _ in range(30):
                with suppress(PeerGone):  # the last ones find no place at all
                    await stack.enter_async_context(await stranger(server.peer_id, port, "127.0.0.2"))
            for member in (False, False, True):
                other = await stack.enter_async_context(host(member=member).run())
                connection = await other.connect(server.peer_id, addrs=server.addrs, deadline=10)
                await trio.sleep(0.4)
                assert await ping(connection, block=bytes(32), deadline=10) < 10
            assert sum(server.counters.dropped.values()) >= 24
            assert len(server._all) <= 10

    within(main)


def test_an_address_that_comes_too_often_is_turned_away_counted_and_said() -> None:
    events: list[Event] = []

    async def main() -> None:
        server = host(member=True, limits=Limits(arrivals=5, arrivals_per_s=0.01), events=events)
        async with server.run([LOCAL]), AsyncExitStack() as stack:
            port = server.addrs[0].port
            assert port is not None
            often = [await stack.enter_async_context(await silent(port, "127.0.0.2")) for _ in range(12)]
            await trio.sleep(0.3)
            assert [await closed(one) for one in often] == [False] * 5 + [True] * 7
            guest = host(member=True)
            async with guest.run():
                connection = await guest.connect(server.peer_id, addrs=server.addrs, deadline=10)
                assert await ping(connection, block=bytes(32), deadline=10) < 10
            assert server.counters.dropped == {"arrivals": 7}

    within(main)
    told = [event for event in events if isinstance(event, LimitReached)]
    assert [(event.limit, event.count) for event in told] == [("arrivals", 1)]
    assert told[0].who.startswith("/ip4/127.0.0.2/tcp/")


def test_a_peer_has_few_connections_however_often_it_connects() -> None:
    async def main() -> None:
        server, identity = host(member=True), Identity.generate()
        async with server.run([LOCAL]), AsyncExitStack() as stack:
            port = server.addrs[0].port
            assert port is not None
            for number in range(12):
                stream = await stack.enter_async_context(await silent(port, "127.0.0.1"))
                await upgrade(stream, identity, expected=server.peer_id, entropy=os.urandom, dialer=True)
                await trio.sleep(0.02)
                assert len(server._all) <= 5, number
            assert server.counters.dropped["peer_connections"] == 8
            assert len(server.connections) == 1

    within(main)
