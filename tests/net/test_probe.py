"""Looking at peers over real sockets: what a prober finds, and who cannot be reached."""

from __future__ import annotations

import time

import pytest
import trio

from p2p import hello, probe, selfreport
from p2p.errors import RemoteError
from p2p.host import Host
from p2p.identity import Identity
from p2p.limits import Limits
from p2p.membership import Membership, Trust
from p2p.probe import Prober
from p2p.rpc import Call
from tests.net.probers import (
    LOCAL,
    SESSION,
    everybody,
    exchange,
    listening,
    prober_and_node,
    texts,
    until,
    within,
)

# what is found


def test_a_reachable_peer_is_found_asked_and_measured_both_ways() -> None:
    async def main() -> None:
        async with prober_and_node() as (prober, _one, two):
            seen = await prober.probe(two.peer_id, texts(two), size=1_000_000)
            assert (seen.reached, seen.why, seen.session) == (True, "", SESSION)
            assert seen.addr == str(two.addrs[0].bare())
            assert seen.rtt_ms is not None
            assert 0 < seen.rtt_ms < 1000
            assert seen.up_mbps is not None
            assert seen.up_mbps > 10
            assert seen.down_mbps is not None
            assert seen.down_mbps > 10
            assert two.counters.protocols[selfreport.PROTOCOL] == (1_000_000, 1_000_000)

    within(main)


def test_looking_leaves_the_connection_that_calls_use_alone() -> None:
    async def main() -> None:
        async with prober_and_node() as (prober, one, two):
            for first, second in ((one, two), (two, one)):
                kept = await first.connect(second.peer_id, addrs=second.addrs, deadline=5)
                other = second.connections[first.peer_id]
                await prober.probe(two.peer_id, texts(two))
                assert first.connections[second.peer_id] is kept
                assert second.connections[first.peer_id] is other
                assert kept.usable
                assert other.usable
                kept.close("next")
                await kept.closed.wait()
                await other.closed.wait()
            await prober.probe(two.peer_id, texts(two))
            assert one.connections == two.connections == {}
            await until(lambda: not one._all and not two._all)  # what was made for looking is closed

    within(main)


def test_a_connection_aside_serves_nothing_else() -> None:
    async def main() -> None:
        async with prober_and_node() as (_prober, one, two):

            async def never(_call: Call) -> None:
                raise AssertionError

            for host in (one, two):
                host.handle("/agora/other/1", never, open_to_all=True)
            async with one.aside(two.peer_id, two.addrs, deadline=5) as connection:
                for protocol in ("/agora/other/1", hello.PROTOCOL):
                    with pytest.raises(RemoteError):
                        await exchange(one.call_on(connection, protocol), ({}, b""))
                back = next(iter(two._all))
                with pytest.raises(RemoteError):  # nor does the side that dialled
                    await exchange(two.call_on(back, "/agora/other/1"), ({}, b""))

    within(main)


def test_connections_aside_are_few_short_and_for_listed_nodes() -> None:
    limits = Limits(asides=1, aside_s=0.5)

    async def main() -> None:
        async with prober_and_node(limits=limits) as (prober, one, two):
            async with one.aside(two.peer_id, two.addrs, deadline=5) as connection:
                assert (await prober.probe(two.peer_id, texts(two))).session is None  # one too many
                await connection.closed.wait()
            assert (await prober.probe(two.peer_id, texts(two))).session == SESSION
            authority = Identity.generate().peer_id
            trust = Trust(
                run="r", manifest_hash=bytes(32), authorities=frozenset(), standing={authority: "authority"}
            )
            two.membership = Membership(trust, lambda: None, time.time)
            assert (await prober.probe(two.peer_id, texts(two))).session is None

    within(main)


# who cannot be reached


def test_a_closed_port_is_told_with_its_address() -> None:
    async def main() -> None:
        async with prober_and_node() as (prober, _one, two):
            with listening() as (_server, addr):
                pass
            began = trio.current_time()
            seen = await prober.probe(two.peer_id, [addr])
            assert not seen.reached
            assert addr in seen.why
            assert "refused" in seen.why
            assert trio.current_time() - began < 3
            assert seen.session is seen.rtt_ms is None
            both = await prober.probe(two.peer_id, [addr, *texts(two)])
            assert both.reached  # one open address suffices

    within(main)


def test_another_key_at_the_address_is_not_the_peer() -> None:
    async def main() -> None:
        async with prober_and_node() as (prober, _one, two):
            liar = Identity.generate().peer_id
            seen = await prober.probe(liar, [str(two.addrs[0].bare())])
            assert not seen.reached
            assert f"{liar} was dialled but {two.peer_id} answered" in seen.why
            # An address that names the other peer is not even dialled.
            seen = await prober.probe(liar, texts(two))
            assert not seen.reached
            assert "another peer's" in seen.why

    within(main)


@pytest.mark.parametrize("drip", [False, True])
def test_a_listener_that_says_nothing_or_very_little_costs_some_seconds(
    drip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "DIAL_S", 0.7)

    async def main() -> None:
        heard = bytearray()

        async def loris(stream: trio.SocketStream) -> None:
            async with trio.open_nursery() as nursery:
                if drip:
                    nursery.start_soon(drop, stream)
                async for data in stream:
                    heard.extend(data)
                nursery.cancel_scope.cancel()

        async def drop(stream: trio.SocketStream) -> None:
            for byte in b"\x13/multistream/1.0.0\n" * 9:
                try:
                    await stream.send_all(bytes([byte]))
                except trio.BrokenResourceError:
                    return
                await trio.sleep(0.05)

        async with prober_and_node() as (prober, _one, two), trio.open_nursery() as nursery:
            listeners = await nursery.start(trio.serve_tcp, loris, 0)
            port = listeners[0].socket.getsockname()[1]
            began = trio.current_time()
            seen = await prober.probe(two.peer_id, [f"/ip4/127.0.0.1/tcp/{port}"], size=1_000_000)
            assert not seen.reached
            assert "0.7 s" in seen.why
            assert trio.current_time() - began < 3
            assert len(heard) < 200  # before a proof of the id: greeting and one key, nothing to amplify
            nursery.cancel_scope.cancel()

    within(main)


def test_a_peer_that_proves_its_key_and_then_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TALK_S", 0.5)

    async def main() -> None:
        one, two = Host(Identity.generate()), Host(Identity.generate())

        async def mute(call: Call) -> None:
            await call.receive()
            await trio.sleep_forever()

        two.handle(selfreport.PROTOCOL, mute, open_to_all=True, aside=True)
        async with one.run([LOCAL]), two.run([LOCAL]):
            seen = await Prober(one, everybody).probe(two.peer_id, texts(two), size=100_000)
            assert seen.reached
            assert "did not answer" in seen.why
            assert seen.session is seen.rtt_ms is seen.up_mbps is None

    within(main)


@pytest.mark.parametrize("lie", ["session", "pong", "early", "digest", "empty", "much"])
def test_lies_about_oneself_are_found_out(lie: str) -> None:
    async def main() -> None:
        one, two = Host(Identity.generate()), Host(Identity.generate())

        async def liar(call: Call) -> None:
            while True:
                header = (await call.receive()).header
                if header["t"] == "who":
                    await call.send({"t": "me", "session": SESSION[:3] if lie == "session" else SESSION})
                elif header["t"] == "ping":
                    nonce = bytes(8) if lie == "pong" else header["nonce"]
                    await call.send({"t": "pong", "nonce": nonce})
                elif header["way"] == "in":
                    if lie == "early":  # acknowledged before it can have come
                        await call.send({"t": "got", "digest": bytes(16)})
                    while lie == "digest":
                        await call.receive(max_payload=selfreport.CHUNK)
                        await call.send({"t": "got", "digest": bytes(16)})
                    await selfreport._take(call, header["bytes"])
                    return
                elif lie == "empty":
                    await call.send({"t": "chunk"})
                else:
                    await call.send({"t": "chunk"}, bytes(1_000_000))

        two.handle(selfreport.PROTOCOL, liar, open_to_all=True, aside=True)
        async with one.run([LOCAL]), two.run([LOCAL]):
            seen = await Prober(one, everybody).probe(two.peer_id, texts(two), size=200_000)
            assert seen.reached
            assert seen.why
            assert seen.up_mbps is None
            assert (seen.session is None) == (lie == "session")
            assert (seen.rtt_ms is None) == (lie in ("session", "pong"))
            assert (seen.down_mbps is None) == (lie not in ("empty", "much"))

    within(main)
