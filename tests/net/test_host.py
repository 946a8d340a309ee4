"""Hosts over real TCP: who is dialled, peers that fail, and the end of a host."""

from __future__ import annotations

import random
import socket
import time

import attrs
import pytest
import trio

from p2p.errors import DialError, LocalError, PeerGone
from p2p.event import Event
from p2p.host import Host
from p2p.host_events import Connected, Disconnected, HandshakeFailed
from p2p.identify import identify, ping
from p2p.identity import Identity
from p2p.limits import Limits
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call
from tests.net.hosts import LOCAL, ask, echo, run, two_hosts


def test_calls_at_once_share_one_dial() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, events):
            two.handle("/agora/echo/1", echo)
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(ask, one, two, "/agora/echo/1", b"x" * 1000)
            assert len([event for event in events if isinstance(event, Connected)]) == 1

    run(main)


def test_dialling_each_other_at_once_leaves_one_connection() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            two.learn(one.peer_id, one.addrs)
            for host in (one, two):
                host.handle("/agora/echo/1", echo)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, one, two, "/agora/echo/1", b"x")
                nursery.start_soon(ask, two, one, "/agora/echo/1", b"x")
            kept = one.connections[two.peer_id], two.connections[one.peer_id]
            smaller_dialled = one.peer_id < two.peer_id
            assert (kept[0].dialer, kept[1].dialer) == (smaller_dialled, not smaller_dialled) or (
                len(one._all) == 1  # the second did not dial any more
            )
            assert await ask(one, two, "/agora/echo/1", b"y") == b"y"
            assert await ask(two, one, "/agora/echo/1", b"z") == b"z"

    run(main)


def test_wrong_peer_and_dead_addresses() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            stranger = Identity.generate().peer_id
            with pytest.raises(DialError, match="was dialled but"):
                await one.connect(stranger, addrs=[two.addrs[0].bare()], deadline=5)
            with pytest.raises(DialError, match="no address"):
                await one.connect(Identity.generate().peer_id, deadline=5)
            with pytest.raises(DialError, match="Connection refused"):
                await one.connect(stranger, addrs=[Multiaddr.parse("/ip4/127.0.0.1/tcp/1")], deadline=5)
            dead = Multiaddr.parse("/ip4/127.0.0.1/tcp/1")
            connection = await one.connect(two.peer_id, addrs=[dead], deadline=5)
            assert connection.peer == two.peer_id
            with pytest.raises(LocalError):
                await one.connect(one.peer_id, deadline=1)

    run(main)


def test_silent_listener_costs_no_more_than_the_deadline() -> None:
    async def main() -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            addr = Multiaddr.tcp(*mute.getsockname())
            async with Host(Identity.generate()).run() as host:
                began = trio.current_time()
                with pytest.raises(DialError, match=r"within 0\.3 s"):
                    await host.connect(Identity.generate().peer_id, addrs=[addr], deadline=0.3)
                assert trio.current_time() - began < 1

    run(main)


@pytest.mark.parametrize("text", ["/dns/a..b/tcp/1", f"/dns4/{'a' * 70}/tcp/1", "PEER"])
def test_addresses_that_lead_nowhere_cost_the_dial_and_not_the_host(text: str) -> None:
    """They come from other peers: out of the hash table, announcements, rosters."""

    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            two.handle("/agora/echo/1", echo)
            somebody = Identity.generate().peer_id
            addr = Multiaddr.parse(f"/p2p/{somebody}" if text == "PEER" else text)
            with pytest.raises(DialError):
                await one.call(somebody, "/agora/echo/1", addrs=[addr.bare()], deadline=5)
            assert await ask(one, two, "/agora/echo/1", b"still here") == b"still here"

    run(main)


def test_peer_that_says_goodbye_and_stays_does_not_collect_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("p2p.host.DRAIN_S", 0.05)

    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            left = []
            for _ in range(5):
                connection = await one.connect(two.peer_id, deadline=5)
                await connection.ping(5)
                connection._session.go_away()
                await connection.ping(5)
                left.append(one.connections.pop(two.peer_id))
            await one.connect(two.peer_id, deadline=5)
            for connection in left:
                await connection.closed.wait()
            assert len(two.connections) == 1

    run(main)


def test_port_in_use_is_one_sentence() -> None:
    async def main() -> None:
        async with two_hosts() as (_one, two, _events):
            with pytest.raises(LocalError, match=r"cannot listen on /ip4/127.0.0.1/tcp/\d+: .*in use"):
                async with Host(Identity.generate()).run([two.addrs[0].bare()]):
                    pytest.fail("bound twice")

    run(main)


def test_peer_that_stops_ends_calls_and_is_dialled_again() -> None:
    async def main() -> None:
        identity, events = Identity.generate(), list[Event]()
        one = Host(Identity.generate(), emit=events.append)
        async with one.run():
            first = Host(identity)

            async def forever(call: Call) -> None:
                await call.receive()
                await trio.sleep_forever()

            first.handle("/agora/x/1", forever)
            async with trio.open_nursery() as nursery:
                async with first.run([LOCAL]):
                    call = await one.call(identity.peer_id, "/agora/x/1", addrs=first.addrs, deadline=5)
                    await call.send({})
                    addr = first.addrs
                    nursery.start_soon(trio.sleep, 0)
                with pytest.raises(PeerGone):
                    await call.receive()
                await call.connection.closed.wait()
            second = Host(identity)
            second.handle("/agora/x/1", echo)
            async with second.run(addr):
                assert await ask(one, second, "/agora/x/1", b"again") == b"again"
            assert [type(event) for event in events[:3]] == [Connected, Disconnected, Connected]

    run(main)


def test_strangers_that_talk_nonsense_are_dropped() -> None:
    async def main() -> None:
        limits = attrs.evolve(Limits(), handshake_s=0.3)
        async with two_hosts(limits) as (one, two, events):
            two.handle("/agora/echo/1", echo)
            port = two.addrs[0].port or 0
            rng = random.Random(2)
            for junk in (
                b"GET / HTTP/1.1\r\n\r\n",
                b"\x13/multistream/1.0.0\n\x07/noise\n" + rng.randbytes(200),
                b"",
            ):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                await stream.send_all(junk)
                while await stream.receive_some():
                    pass
            assert await ask(one, two, "/agora/echo/1", b"fine") == b"fine"
            assert len([event for event in events if isinstance(event, HandshakeFailed)]) == 3

    run(main)


def test_identify_and_ping() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            connection = await one.connect(two.peer_id, deadline=5)
            said = await identify(connection, deadline=5)
            assert said.agent == "agorad"
            assert said.addrs == tuple(addr.bare() for addr in two.addrs)
            assert {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/agora/hello/1"} <= set(said.protocols)
            assert said.observed is not None
            assert said.observed.host == "127.0.0.1"
            assert 0 < await ping(connection, block=bytes(range(32)), deadline=5) < 5
            assert 0 < await connection.ping(5) < 5

    run(main)


def test_lease_is_fresh_only_while_pings_are_answered() -> None:
    async def main() -> None:
        now = [1000.0]
        one, two = Host(Identity.generate(), clock=lambda: now[0]), Host(Identity.generate())
        async with one.run(), two.run([LOCAL]):
            connection = await one.connect(two.peer_id, addrs=two.addrs, deadline=5)
            await connection.ping(5)
            assert connection.lease.fresh()
            assert connection.lease.fresh(1001.49)
            assert not connection.lease.fresh(1001.5)
            assert not connection.lease.fresh(999.0)  # a clock set back proves nothing
            now[0] += 2
            assert not connection.lease.fresh()
            await connection.ping(5)
            assert connection.lease.fresh()

    run(main)


def test_body_of_run_raises_what_it_raised() -> None:
    async def main() -> None:
        with pytest.raises(KeyError):
            async with Host(Identity.generate()).run([LOCAL]):
                raise KeyError("mine")

    run(main)


def test_process_that_stood_still_does_not_blame_the_peer() -> None:
    async def main() -> None:
        limits = attrs.evolve(Limits(), watched_ping_s=0.05, watched_silence_s=0.4)
        one, two = Host(Identity.generate(), limits=limits), Host(Identity.generate())
        async with one.run(), two.run([LOCAL]):
            connection = await one.connect(two.peer_id, addrs=two.addrs, deadline=5)
            async with connection.watched():
                await connection.ping(5)
                time.sleep(0.8)  # noqa: ASYNC251 (the stall is what is tested)
                await connection.ping(5)
                assert not connection.closed.is_set()

    run(main)


def test_process_that_stalls_again_and_again_notices_a_dead_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2p.connection.STALL_S", 0.02)

    async def main() -> None:
        limits = attrs.evolve(Limits(), watched_ping_s=0.05, watched_silence_s=0.3)
        one, two = Host(Identity.generate(), limits=limits), Host(Identity.generate())
        async with one.run(), two.run([LOCAL]):
            connection = await one.connect(two.peer_id, addrs=two.addrs, deadline=5)
            await connection.ping(5)
            (other,) = two.connections.values()
            async with connection.watched():
                other._wake = lambda: None  # type: ignore[method-assign]  # it says nothing any more
                with trio.fail_after(5):
                    while not connection.closed.is_set():
                        time.sleep(0.08)  # noqa: ASYNC251 (the stalls are what is tested)
                        await trio.sleep(0.001)
            assert "silent" in str(connection.why_closed)

    run(main)
