"""A connection's life: pings, goodbye, a peer that takes nothing, that cannot be reached, that floods."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import attrs
import pytest
import trio

from p2p import path
from p2p.dial import Dialer
from p2p.errors import DialError, P2PError, PeerGone
from p2p.event import Event
from p2p.host import Host
from p2p.host_events import Connected, Disconnected, LimitReached
from p2p.identify import PING, open_raw, ping
from p2p.identity import Identity, PeerId
from p2p.limits import Limits
from p2p.membership import Membership, Trust
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call
from p2p.sealed import BATCH, NEAR_BATCH, RECORD
from p2p.secure import Upgraded
from p2p.transport import TcpTransport
from tests.net.hosts import ask, echo, two_hosts

LOCAL = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")


def within(main: Callable[[], Awaitable[None]], seconds: float = 60) -> None:
    async def limited() -> None:
        with trio.fail_after(seconds):
            await main()

    trio.run(limited)


def test_pings_are_frequent_while_a_call_is_watched_and_rare_otherwise() -> None:
    assert (Limits().watched_ping_s, Limits().watched_silence_s) == (0.5, 2.0)
    assert (Limits().ping_s, Limits().silence_s) == (10.0, 20.0)

    async def main() -> None:
        limits = Limits(ping_s=30.0, watched_ping_s=0.1, watched_silence_s=20.0)
        one, two = Host(Identity.generate(), limits=limits), Host(Identity.generate())
        async with one.run(), two.run([LOCAL]):
            connection = await one.connect(two.peer_id, addrs=two.addrs, deadline=10)
            asked = 0
            send_ping = connection._send_ping

            def counted() -> int:
                nonlocal asked
                asked += 1
                return send_ping()

            connection._send_ping = counted  # type: ignore[method-assign]
            await trio.sleep(0.6)
            assert asked <= 1  # the first one at once
            asked = 0
            async with connection.watched():
                while asked < 5:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            before = asked
            await trio.sleep(0.6)
            assert asked <= before + 1

    within(main)


@pytest.mark.parametrize(("near_s", "most"), [(path.NEAR_S, NEAR_BATCH), (0.0, BATCH)])
def test_sends_are_longer_to_a_peer_that_is_near(
    near_s: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path, "NEAR_S", near_s)
    longest = 0

    async def main() -> None:
        async with two_hosts() as (one, two, _):
            two.handle("/agora/echo/1", echo)
            connection = await one.connect(two.peer_id, addrs=two.addrs, deadline=10)
            batch = connection.sealer.batch

            def counted(room: int) -> tuple[memoryview, memoryview | None]:
                nonlocal longest
                records, buffer = batch(room)
                longest = max(longest, len(records))
                return records, buffer

            monkeypatch.setattr(connection.sealer, "batch", counted)
            await ask(one, two, "/agora/echo/1", bytes(4 << 20))

    within(main)
    assert (most - 1) * RECORD < longest <= most * RECORD


@pytest.mark.parametrize("watched", [True, False])
def test_a_peer_that_says_nothing_is_gone_after_its_time(watched: bool) -> None:
    async def main() -> None:
        limits = Limits(ping_s=0.2, silence_s=1.5, watched_ping_s=0.1, watched_silence_s=0.4)
        one, two = Host(Identity.generate(), limits=limits), Host(Identity.generate())
        async with one.run(), two.run([LOCAL]), AsyncExitStack() as stack:
            connection = await one.connect(two.peer_id, addrs=two.addrs, deadline=10)
            await connection.ping(10)
            (other,) = two.connections.values()
            other._wake = lambda: None  # type: ignore[method-assign]  # it says nothing any more
            began = trio.current_time()
            if watched:
                await stack.enter_async_context(connection.watched())
            await connection.closed.wait()
            assert "silent" in str(connection.why_closed)
            assert trio.current_time() - began >= (0.35 if watched else 1.2)

    within(main)


def test_a_host_that_leaves_says_goodbye_and_lets_what_is_queued_leave() -> None:
    async def main() -> None:
        events: list[Event] = []
        one, two = Host(Identity.generate(), emit=events.append), Host(Identity.generate())
        answered = trio.Event()

        async def answer(call: Call) -> None:
            await call.receive()
            await call.send({"t": "yes"})
            answered.set()
            await trio.sleep_forever()

        two.handle("/agora/x/1", answer)
        async with one.run():
            async with two.run([LOCAL]):
                call = await one.call(two.peer_id, "/agora/x/1", addrs=two.addrs, deadline=10)
                await call.send({})
                await answered.wait()
                connection = call.connection
            assert (await call.receive()).header["t"] == "yes"  # left before the end
            with pytest.raises(P2PError):
                await call.receive()
            assert connection._session.remote_gone == 0  # GOAWAY, no error
            await connection.closed.wait()
            assert not connection.usable
        assert [type(event) for event in events] == [Connected, Disconnected]

    within(main)


def test_nothing_of_a_connection_outlives_its_host() -> None:
    async def main() -> None:
        one, two = Host(Identity.generate()), Host(Identity.generate())

        async def forever(call: Call) -> None:
            await call.receive()
            await trio.sleep_forever()

        two.handle("/agora/x/1", forever)
        before = trio.lowlevel.current_statistics().tasks_living
        async with one.run(), two.run([LOCAL]):
            for _ in range(20):
                call = await one.call(two.peer_id, "/agora/x/1", addrs=two.addrs, deadline=10)
                await call.send({})
            with pytest.raises(DialError):
                await one.connect(Identity.generate().peer_id, addrs=two.addrs, deadline=10)
            assert trio.lowlevel.current_statistics().tasks_living > before
        assert trio.lowlevel.current_statistics().tasks_living == before

    within(main)


@attrs.define(eq=False)
class Line:
    """Bytes from here to there and back, until it stops taking any on the way there."""

    to: int
    deaf: bool = False

    async def carry(self, here: trio.SocketStream) -> None:
        there = await trio.open_tcp_stream("127.0.0.1", self.to)
        async with there, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, there, here, False)
            await self._copy(here, there, True)
            nursery.cancel_scope.cancel()

    async def _copy(self, source: trio.SocketStream, target: trio.SocketStream, out: bool) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(16_384):
                if out and self.deaf:
                    await trio.sleep_forever()
                await target.send_all(data)


def test_a_peer_that_takes_nothing_is_gone_though_it_speaks() -> None:
    async def main() -> None:
        limits = Limits(stuck_s=1.0, ping_s=0.1, silence_s=30.0)
        one, two = (Host(Identity.generate(), limits=limits) for _ in range(2))

        async def sink(call: Call) -> None:
            while True:
                await call.receive(max_payload=1 << 20)

        two.handle("/agora/x/1", sink)
        async with one.run(), two.run([LOCAL]), trio.open_nursery() as nursery:
            line = Line(two.addrs[0].port or 0)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, line.carry, listeners)
            addr = Multiaddr.tcp(*listeners[0].socket.getsockname())
            connection = await one.connect(two.peer_id, addrs=[addr], deadline=10)
            assert await connection.ping(10) < 10
            line.deaf = True
            stream = connection._session.open()
            stream.send_window = 1 << 30  # its window is not what holds us
            connection._session.send(stream, [memoryview(bytes(32 << 20))])
            connection._wake()
            await connection.closed.wait()
            assert "took nothing" in str(connection.why_closed)
            nursery.cancel_scope.cancel()

    within(main)


def test_an_address_that_is_mute_holds_the_next_one_up_for_a_moment_only() -> None:
    async def main() -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            wrong = Multiaddr.tcp(*mute.getsockname())
            limits = Limits(dial_s=60.0, handshake_s=60.0)
            one, two = Host(Identity.generate(), limits=limits), Host(Identity.generate())
            async with one.run(), two.run([LOCAL]):
                connection = await one.connect(two.peer_id, addrs=[wrong, *two.addrs], deadline=30)
                assert connection.addr == str(two.addrs[0].bare())

    within(main, 40)


def test_a_peer_that_cannot_be_reached_is_left_alone_longer_each_time() -> None:
    limits = Limits(redial_s=1.0, redial_most_s=6.0, known_peers=2)

    async def nobody(_stream: trio.abc.Stream, _peer: PeerId, _aside: bool) -> Upgraded:
        raise AssertionError("nothing is dialled here")

    dialer = Dialer(TcpTransport(), nobody, limits, random.Random(1))
    peer, addr = Identity.generate().peer_id, Multiaddr.parse("/ip4/10.0.0.1/tcp/1")
    rests, now = [], 0.0
    for _ in range(6):
        dialer.failed(peer, [addr], "refused", now)
        assert "refused" in str(dialer.resting(peer, [addr], now))
        assert dialer.resting(peer, [Multiaddr.parse("/ip4/10.0.0.2/tcp/1"), addr], now) is None
        until = now
        while dialer.resting(peer, [addr], until):
            until += 0.01
        rests.append(until - now)
        now = until
    for rest, most in zip(rests, (1, 2, 4, 6, 6, 6), strict=True):
        assert most / 2 <= rest <= most + 0.02
    assert len({round(rest / most, 2) for rest, most in zip(rests[3:], (6, 6, 6), strict=True)}) > 1  # jitter
    dialer.failed(peer, [addr], "refused", now)
    dialer.came(peer)
    assert dialer.resting(peer, [addr], now) is None
    others = [Identity.generate().peer_id for _ in range(3)]
    for other in others:
        dialer.failed(other, [addr], "refused", now)
    assert [dialer.resting(other, [addr], now) is None for other in others] == [True, False, False]


def test_many_callers_of_a_dead_peer_dial_it_seldom() -> None:
    async def main() -> None:
        dials = 0
        transport = TcpTransport()
        dial = transport.dial

        async def counted(addr: Multiaddr) -> trio.abc.Stream:
            nonlocal dials
            dials += 1
            return await dial(addr)

        transport.dial = counted  # type: ignore[method-assign]
        one = Host(Identity.generate(), transport=transport, limits=Limits(redial_s=1e4, redial_most_s=1e4))
        dead = [Multiaddr.parse("/ip4/127.0.0.1/tcp/1")]
        peer = Identity.generate().peer_id
        async with one.run():
            for _ in range(50):
                with pytest.raises(DialError, match="could not be reached"):
                    await one.connect(peer, addrs=dead, deadline=10)
        assert dials == 1

    within(main)


@pytest.mark.long
def test_streams_that_are_not_ours_are_few_and_their_echo_does_not_wait_for_ever() -> None:
    async def main() -> None:
        events: list[Event] = []
        limits = Limits(raw_streams=3, echo_s=0.3)
        one, two = Host(Identity.generate()), Host(Identity.generate(), limits=limits, emit=events.append)
        async with one.run(), two.run([LOCAL]):
            connection = await one.connect(two.peer_id, addrs=two.addrs, deadline=10)
            streams = [await open_raw(connection, PING, 10) for _ in range(3)]
            with pytest.raises(PeerGone):
                await open_raw(connection, PING, 10)
            (told,) = (event for event in events if isinstance(event, LimitReached))
            assert (told.limit, told.who) == ("raw_streams", one.peer_id)
            greedy = streams[0]
            with suppress(trio.BrokenResourceError):
                while True:  # blocks to echo, and no echo is taken
                    await greedy.send_all(os.urandom(1 << 16))
            for stream in streams:
                stream.reset()
            while any(two.connections[one.peer_id].running.values()):  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert await ping(connection, block=bytes(32), deadline=10) < 10

    within(main)


@pytest.mark.long
def test_guests_that_fill_every_window_are_dropped_before_memory_is() -> None:
    async def main() -> None:
        limits = Limits(unread=1 << 20, first_message_s=60.0)
        trust = Trust(run="run", manifest_hash=bytes(32), authorities=frozenset())
        server = Host(Identity.generate(), limits=limits)
        server.membership = Membership(trust, lambda: None, time.time)

        async def never(_call: Call) -> None:
            await trio.sleep_forever()

        server.handle("/agora/x/1", never, open_to_all=True)
        async with server.run([LOCAL]), trio.open_nursery() as nursery:

            async def flood() -> None:
                guest = Host(Identity.generate())
                guest.membership = Membership(trust, lambda: None, time.time)
                async with guest.run():
                    with suppress(P2PError, trio.BrokenResourceError):
                        async with trio.open_nursery() as streams:
                            for _ in range(8):
                                to, addrs = server.peer_id, server.addrs
                                connection = await guest.connect(to, addrs=addrs, deadline=30)
                                streams.start_soon(stuff, guest.call_on(connection, "/agora/x/1"))

            async def stuff(call: Call) -> None:
                with suppress(P2PError, trio.BrokenResourceError):
                    await call.send({}, bytes(1 << 20))

            for _ in range(3):
                nursery.start_soon(flood)
            held = 0
            while server.counters.dropped["unread"] < 2:
                waits = (stream.available for one in server._all for stream in one._streams.values())
                held = max(held, sum(waits))
                await trio.sleep(0.005)
            assert held <= (1 << 20) + 3 * 2 * (1 << 18)
            nursery.cancel_scope.cancel()
        assert server._unread.total == 0

    within(main)
