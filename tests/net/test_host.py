"""Hosts over real TCP: calls, refusals, failures of handlers and peers, and the end of a host."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from p2p import multistream
from p2p.connection import Connection
from p2p.errors import DialError, LocalError, P2PError, PeerGone, Refused, RemoteError, UnsupportedProtocol
from p2p.event import Event
from p2p.host import Host
from p2p.host_events import Connected, Disconnected, HandlerFailed, HandshakeFailed, PeerRefused
from p2p.identify import identify, ping
from p2p.identity import Identity
from p2p.limits import Limits
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call, Message, pack

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


def test_messages_of_all_sizes_both_ways_on_one_call() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            two.handle("/agora/echo/1", echo)
            rng = random.Random(1)
            async with await one.call(two.peer_id, "/agora/echo/1", deadline=5) as call:
                for size in (0, 1, 65_507, 65_519, 262_144, 3_000_000):
                    data = rng.randbytes(size)
                    await call.send({"n": size}, [data[: size // 2], memoryview(data)[size // 2 :]])
                    message = await call.receive(max_payload=size)
                    assert message.header == {"n": size}
                    assert message.payload == data
            assert one.counters.protocols["/agora/echo/1"] == (3_393_171, 3_393_171)
            assert two.counters.protocols["/agora/echo/1"] == (3_393_171, 3_393_171)

    run(main)


def test_handler_calls_back_on_the_same_connection() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):

            async def nested(call: Call) -> None:
                await call.receive()
                await call.send({}, await ask(two, one, "/agora/back/1"))

            async def back(call: Call) -> None:
                await call.receive()
                await call.send({}, b"from the caller")

            one.handle("/agora/back/1", back)
            two.handle("/agora/nested/1", nested)
            assert await ask(one, two, "/agora/nested/1") == b"from the caller"
            assert len(one.connections) == len(two.connections) == 1

    run(main)


@pytest.mark.parametrize("size", [0, 100, 20_000, 100_000])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_question_is_answered_in_one_turn_and_in_pieces(size: int, pieces: int) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, events):

            def respond(connection: Connection, message: Message) -> tuple[dict[str, Any], bytes]:
                assert connection.peer == one.peer_id
                match message.header["do"]:
                    case "refuse":
                        raise Refused("full", "come back later", 2.5)
                    case "break":
                        raise RemoteError("nonsense")
                    case "fail":
                        raise ValueError("a bug")
                return {"did": message.header["do"]}, bytes(message.payload)[::-1]

            two.respond("/agora/echo/1", respond, max_payload=100_000)

            async def asked(do: str, payload: bytes) -> Message:
                async with await one.call(two.peer_id, "/agora/echo/1", deadline=5) as call:
                    if pieces == 1:
                        return await call.ask(pack({"do": do}, payload, one.limits), max_payload=100_000)
                    question = pack({"do": do}, payload, one.limits).wire
                    await call._stream.send_all(multistream.proposal("/agora/echo/1") + question[:5])
                    call._prefix = b""
                    await one.connections[two.peer_id].ping(1)  # behind which the rest comes alone
                    await call._stream.send_all(question[5:])
                    return await call.receive(max_payload=100_000)

            data = random.Random(size).randbytes(size)
            for _ in range(3):
                answer = await asked("turn", data)
                assert answer.header == {"did": "turn"}
                assert answer.payload == data[::-1]
            with pytest.raises(Refused, match="come back later") as caught:
                await asked("refuse", data)
            assert (caught.value.code, caught.value.retry_after) == ("full", 2.5)
            for broken in ("break", "fail"):
                with pytest.raises(PeerGone):
                    await asked(broken, data)
            with pytest.raises(PeerGone):
                await asked("turn", bytes(100_001))
            told = [type(event) for event in events if isinstance(event, PeerRefused | HandlerFailed)]
            assert told == [PeerRefused, HandlerFailed]
            if pieces == 1:
                assert two.counters.protocols["/agora/echo/1"] == (3 * size, 6 * size)
                assert one.counters.protocols["/agora/echo/1"] == (6 * size + 100_001, 3 * size)
            with trio.fail_after(2):
                while any(
                    host.connections[other.peer_id].streams for host, other in ((one, two), (two, one))
                ):
                    await one.connections[two.peer_id].ping(1)  # takes what waits for company along

    run(main)


def test_questions_do_not_come_before_the_gate_nor_on_hold() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            two.respond("/agora/gated/1", lambda _connection, _message: ({}, b""))

            def closed(_connection: Connection, protocol: str) -> None:
                raise Refused("no_certificate", protocol)

            two.gate = closed
            async with await one.call(two.peer_id, "/agora/gated/1", deadline=5) as call:
                with pytest.raises(Refused, match="no_certificate"):
                    await call.ask(pack({}, b"", one.limits))

    run(main)


@pytest.mark.parametrize("size", [0, 100, 10_000_000])
def test_refusal_reaches_a_caller_that_is_still_sending(size: int) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):

            async def no(_call: Call) -> None:
                raise Refused("full", "come back later", 2.5)

            two.handle("/agora/no/1", no)
            with pytest.raises(Refused, match="full: come back later") as caught:
                await ask(one, two, "/agora/no/1", bytes(size))
            assert (caught.value.code, caught.value.retry_after) == ("full", 2.5)

    run(main)


@pytest.mark.parametrize("size", [0, 10_000_000])
def test_unknown_protocol(size: int) -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            with pytest.raises(UnsupportedProtocol):
                await ask(one, two, "/agora/none/1", bytes(size))

    run(main)


def test_a_handlers_bug_drops_the_stream_and_nothing_else() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, events):

            async def bug(_call: Call) -> None:
                raise ZeroDivisionError("oops")

            async def picky(call: Call) -> None:
                await call.receive()
                raise RemoteError("nonsense")

            two.handle("/agora/bug/1", bug)
            two.handle("/agora/picky/1", picky)
            two.handle("/agora/echo/1", echo)
            for protocol in ("/agora/bug/1", "/agora/picky/1"):
                with pytest.raises(PeerGone):
                    await ask(one, two, protocol)
            assert await ask(one, two, "/agora/echo/1", b"still here") == b"still here"
            failed = [event for event in events if isinstance(event, HandlerFailed)]
            assert [event.error for event in failed] == ["ZeroDivisionError('oops')"]
            assert len([event for event in events if isinstance(event, Connected)]) == 1

    run(main)


def test_more_than_was_asked_for_is_refused_unread() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            two.handle("/agora/echo/1", echo)
            with pytest.raises(RemoteError, match="a payload of 100 bytes where 99 are allowed"):
                await ask(one, two, "/agora/echo/1", bytes(100), room=99)
            with pytest.raises(LocalError, match="a header of"):
                async with await one.call(two.peer_id, "/agora/echo/1", deadline=5) as call:
                    await call.send({"x": "y" * 65_536})
            for header in (b"\xff" * 8, b"\0\0\0\1\0\0\0\0\xc1", b"\0\0\0\1\0\0\0\0\x90"):
                async with await one.call(two.peer_id, "/agora/echo/1", deadline=5) as call:
                    await call._flush()
                    await call._stream.send_all(header)
                    with pytest.raises(PeerGone):
                        await call.receive()

    run(main)


def test_cancelled_call_is_a_reset_that_the_handler_sees() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):
            seen = trio.Event()

            async def waiting(call: Call) -> None:
                await call.receive()
                with pytest.raises(PeerGone):
                    await call.receive()
                seen.set()

            two.handle("/agora/wait/1", waiting)
            with trio.move_on_after(0.2):
                await ask(one, two, "/agora/wait/1")
            await seen.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert one.connections[two.peer_id].streams == 0

    run(main)


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


@pytest.mark.parametrize("said", [b"", b"\0", b"\0\0\1\0\0\0\0\0", b"\0\0\1\0\0\0\0\0\x81"])
def test_call_that_never_says_what_it_wants_is_ended(said: bytes) -> None:
    async def main() -> None:
        async def listen(call: Call) -> None:
            await call.receive()

        async with two_hosts(Limits(first_message_s=0.2)) as (one, two, _events):
            two.handle("/agora/echo/1", listen)
            connection = await one.connect(two.peer_id, deadline=5)
            stream = connection.open_stream()
            await stream.send_all(multistream.proposal("/agora/echo/1") + said)
            with pytest.raises(PeerGone, match="reset"):
                await stream.receive_exactly(1000)

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


def test_many_streams_beyond_the_limit_fail_typed() -> None:
    async def main() -> None:
        async with two_hosts(attrs.evolve(Limits(), inbound_streams=4)) as (one, two, _events):
            two.handle("/agora/echo/1", echo)
            failed = 0
            calls = [await one.call(two.peer_id, "/agora/echo/1", deadline=5) for _ in range(6)]
            for call in calls:
                await call.send({})
            for call in calls:
                try:
                    await call.receive()
                except P2PError:
                    failed += 1
            for call in calls:
                await call.aclose()
            assert failed == 2
            assert await ask(one, two, "/agora/echo/1", b"room again") == b"room again"

    run(main)


def test_nurseries_of_handlers_hide_nothing_and_break_nothing() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, events):

            async def refuse() -> None:
                raise Refused("inner", "from a nursery")

            async def nested(call: Call) -> None:
                await call.receive()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(refuse)

            async def dies_badly(call: Call) -> None:
                await call.receive()

                async def cleanup() -> None:
                    try:
                        await trio.sleep_forever()
                    finally:
                        raise RuntimeError("while it was cancelled")

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cleanup)
                    nursery.start_soon(trio.sleep_forever)

            two.handle("/agora/nested/1", nested)
            two.handle("/agora/dies/1", dies_badly)
            two.handle("/agora/echo/1", echo)
            with pytest.raises(Refused, match="inner"):
                await ask(one, two, "/agora/nested/1")
            async with await one.call(two.peer_id, "/agora/dies/1", deadline=5) as call:
                await call.send({})
                assert await ask(one, two, "/agora/echo/1", b"x") == b"x"
                connection = call.connection
                connection.close("by the test")
                await connection.closed.wait()
            assert await ask(one, two, "/agora/echo/1", b"host lives") == b"host lives"
            assert any(isinstance(event, HandlerFailed) for event in events)

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
