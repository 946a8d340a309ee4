"""A thousand connections that come and go leave nothing behind: no task, no descriptor, no memory."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path

import pytest
import trio

from p2p.errors import DialError
from p2p.host import Host
from p2p.identify import ping
from p2p.identity import Identity
from p2p.multiaddr import Multiaddr

LOCAL = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")


class Counted:
    """What the process holds at one moment."""

    def __init__(self, host: Host) -> None:
        gc.collect()
        self.tasks = trio.lowlevel.current_statistics().tasks_living
        self.descriptors = len(list(Path("/proc/self/fd").iterdir()))
        self.bytes = tracemalloc.get_traced_memory()[0]
        self.connections = len(host.connections)


async def cycle(server: Host, number: int) -> None:
    """One visit; every third ends without a goodbye, every fifth in the middle of a handshake."""
    if number % 5 == 0:
        port = server.addrs[0].port
        assert port is not None
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"\x13/multistream/1.0.0\n")
        return
    guest = Host(Identity.generate())
    async with guest.run():
        connection = await guest.connect(server.peer_id, addrs=server.addrs, deadline=10)
        await ping(connection, block=os.urandom(32), deadline=10)
        if number % 3 == 0:
            connection.close("gone without a word")


def cycles(count: int, warm: int) -> tuple[Counted, Counted]:
    async def main() -> tuple[Counted, Counted]:
        with trio.fail_after(600):
            server = Host(Identity.generate())
            async with server.run([LOCAL]):
                for number in range(warm):
                    await cycle(server, number)
                await settled(server)
                before = Counted(server)
                for number in range(count):
                    await cycle(server, number)
                await settled(server)
                return before, Counted(server)

    tracemalloc.start()
    try:
        return trio.run(main)
    finally:
        tracemalloc.stop()


async def settled(server: Host) -> None:
    while server.connections:  # noqa: ASYNC110
        await trio.sleep(0.02)
    await trio.sleep(0.2)


@pytest.mark.parametrize(
    ("count", "kib"), [(60, 500), pytest.param(1000, 700, marks=[pytest.mark.long, pytest.mark.timeout(700)])]
)
def test_visits_leave_nothing(count: int, kib: int) -> None:
    before, after = cycles(count, 60)
    assert after.tasks == before.tasks
    assert after.descriptors == before.descriptors
    assert after.connections == before.connections == 0
    # The book of addresses may hold what visitors said; 1000 leaked connections would be tens of MB.
    assert after.bytes - before.bytes < kib * 1024


def test_over_ipv6() -> None:
    async def main() -> None:
        with trio.fail_after(30):
            server, guest = Host(Identity.generate()), Host(Identity.generate())
            try:
                async with server.run([Multiaddr.parse("/ip6/::1/tcp/0")]), guest.run():
                    assert str(server.addrs[0]).startswith("/ip6/::1/tcp/")
                    both = [Multiaddr.parse("/ip4/127.0.0.1/tcp/1"), *server.addrs]
                    connection = await guest.connect(server.peer_id, addrs=both, deadline=10)
                    assert connection.addr.startswith("/ip6/::1/tcp/")
                    assert await ping(connection, block=bytes(32), deadline=10) < 10
            except DialError:
                raise
            except Exception as error:
                if "cannot listen" in str(error):
                    pytest.skip(f"no IPv6 here: {error}")
                raise

    trio.run(main)
