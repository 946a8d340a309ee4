"""When the bytes of a socket wake their reader: for what it can use, not packet by packet."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from p2p import path
from p2p.multiaddr import Multiaddr
from p2p.transport import LEAST_READ, TcpTransport, Wire

MOST = 262_148
WAIT_S = 5.0


@asynccontextmanager
async def two_ends() -> AsyncIterator[tuple[trio.abc.Stream, Wire]]:
    """One to write to, and the wire at which that is read."""
    transport = TcpTransport()
    listener = await transport.listen(Multiaddr.tcp("127.0.0.1", 0))
    send, receive = trio.open_memory_channel[trio.abc.Stream](1)

    async def accept(stream: trio.abc.Stream, _addr: str) -> None:
        await send.send(stream)
        await trio.sleep_forever()  # the listener closes it afterwards

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listener.serve, accept)
        writer = await transport.dial(listener.addr)
        with trio.fail_after(WAIT_S):
            reader = await receive.receive()
            yield writer, Wire(reader)
        nursery.cancel_scope.cancel()
    for stream in (writer, reader):
        await trio.aclose_forcefully(stream)
    await listener.aclose()


async def wakes(wire: Wire, missing: int, within: float = 0.1) -> bool:
    with trio.move_on_after(within) as scope:
        await wire.readable(MOST, missing)
    return not scope.cancelled_caught


def test_a_reader_sleeps_until_what_it_misses_is_there() -> None:
    async def main() -> None:
        async with two_ends() as (writer, wire):
            await writer.send_all(bytes(1000))
            assert not await wakes(wire, 5000)
            await writer.send_all(bytes(4000))
            await wire.readable(MOST, 5000)
            assert wire.read(memoryview(bytearray(MOST))) == 5000

    trio.run(main)


def test_one_byte_is_enough_again_afterwards() -> None:
    async def main() -> None:
        async with two_ends() as (writer, wire):
            assert not await wakes(wire, 5000)
            await writer.send_all(b"x")
            assert not await wakes(wire, 5000)
            await wire.readable(MOST)
            assert wire.read(memoryview(bytearray(MOST))) == 1

    trio.run(main)


def test_a_long_record_is_not_waited_for_to_its_end() -> None:
    """Or a slow line would look like a silent peer."""

    async def main() -> None:
        async with two_ends() as (writer, wire):
            await writer.send_all(bytes(LEAST_READ))
            await wire.readable(MOST, 65_000)

    trio.run(main)


def test_the_end_wakes_a_reader_who_misses_something() -> None:
    async def main() -> None:
        async with two_ends() as (writer, wire):
            await writer.send_all(bytes(10))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wire.readable, MOST, 5000)
                await trio.testing.wait_all_tasks_blocked()
                await writer.aclose()
            room = memoryview(bytearray(MOST))
            assert (wire.read(room), wire.read(room)) == (10, 0)

    trio.run(main)


def way_of(sock: socket.socket | trio.socket.SocketType) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


@pytest.mark.skipif(
    not hasattr(socket, "TCP_CONGESTION"), reason="Linux finds a line's speed in ways to choose"
)
@pytest.mark.parametrize("usual", [b"reno", b"no such way"])
def test_both_ends_send_as_we_wish_where_the_kernel_can(
    usual: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with two_ends() as (writer, wire):
            assert isinstance(writer, trio.SocketStream)
            assert wire._socket is not None
            ways = {way_of(writer.socket), way_of(wire._socket)}
            assert ways == ({usual} if usual == b"reno" else {own})

    with socket.socket() as untouched:
        own = way_of(untouched)
    monkeypatch.setattr(path, "USUAL", usual)
    trio.run(main)


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="Linux tells what it knows of a connection")
def test_the_kernel_says_what_a_connection_may_send_and_whether_it_rested() -> None:
    async def main() -> None:
        async with two_ends() as (writer, _):
            assert isinstance(writer, trio.SocketStream)
            for _ in range(5):  # this machine may stand still behind the send
                await writer.send_all(bytes(1000))
                busy = path.look(writer.socket)
                if busy is not None and not busy.rested:
                    break
                await trio.sleep(0.01)
            await trio.sleep(0.5)  # a timeout is 0.2 s on a line as short as this
            quiet = path.look(writer.socket)
        assert busy is not None
        assert quiet is not None
        assert not busy.rested
        assert quiet.rested
        assert 0 < quiet.rtt_s < 0.2
        assert quiet.window >= 10_000

    trio.run(main)
