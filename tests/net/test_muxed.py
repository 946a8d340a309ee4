"""A muxed stream over a real connection passes trio's conformance suite, half close included."""

from __future__ import annotations

import trio
import trio.testing

from p2p.connection import Connection
from p2p.host import Host
from p2p.identify import open_raw
from p2p.identity import Identity
from p2p.limits import Limits
from p2p.multiaddr import Multiaddr
from p2p.muxed import MuxedStream

LISTEN = [Multiaddr.parse("/ip4/127.0.0.1/tcp/0")]
RAW = "/test/raw"


def test_muxed_stream_passes_trios_conformance_suite() -> None:
    async def main() -> None:
        arrived_send, arrived = trio.open_memory_channel[MuxedStream](10)
        ends: list[trio.Event] = []

        async def keep(_connection: Connection, stream: MuxedStream) -> None:
            end = trio.Event()
            ends.append(end)
            await arrived_send.send(stream)
            await end.wait()

        one = Host(Identity.generate())
        two = Host(Identity.generate(), limits=Limits(raw_streams=256))  # the suite leaves its streams open
        two.handle_stream(RAW, keep)
        async with one.run(), two.run(LISTEN):
            connection = await one.connect(two.peer_id, addrs=two.addrs, deadline=5)

            async def maker() -> tuple[MuxedStream, MuxedStream]:
                near = await open_raw(connection, RAW, 5)
                return near, await arrived.receive()

            with trio.fail_after(20):
                await trio.testing.check_half_closeable_stream(maker, None)
            for end in ends:
                end.set()

    trio.run(main)
