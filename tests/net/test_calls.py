"""Calls between hosts over real TCP: messages, refusals, and handlers that fail."""

from __future__ import annotations

import random
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from p2p import multistream
from p2p.connection import Connection
from p2p.errors import LocalError, P2PError, PeerGone, Refused, RemoteError, UnsupportedProtocol
from p2p.host_events import Connected, HandlerFailed, PeerRefused
from p2p.limits import Limits
from p2p.rpc import Call, Message, pack
from tests.net.hosts import ask, echo, run, two_hosts


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


async def until_reset(call: Call) -> None:
    with trio.fail_after(5):
        await call._stream.wait_available(1_000_000)  # more than comes


def test_a_refusal_behind_an_answer_that_was_not_read_yet_reaches_a_caller_that_asks_on() -> None:
    async def main() -> None:
        async with two_hosts() as (one, two, _events):

            async def one_then_no(call: Call) -> None:
                for number in range(3):
                    await call.receive()
                    await call.send({"number": number}, bytes(1000))
                raise Refused("damaged", "the rest cannot be read")

            two.handle("/agora/some/1", one_then_no)
            async with await one.call(two.peer_id, "/agora/some/1", deadline=5) as call:
                for _ in range(3):
                    await call.send({})
                assert (await call.receive(max_payload=1000)).header == {"number": 0}
                await until_reset(call)
                with pytest.raises(Refused, match="damaged: the rest cannot be read"):
                    await call.send({})

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
