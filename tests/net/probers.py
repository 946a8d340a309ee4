"""A prober and a node that it may look at, on loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from p2p import selfreport
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.limits import Limits
from p2p.multiaddr import Multiaddr
from p2p.probe import Prober
from p2p.rpc import Call
from p2p.selfreport import SelfReport

LOCAL = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
SESSION = bytes(range(16))


def within(main: Callable[[], Awaitable[None]], seconds: float = 40.0) -> None:
    async def limited() -> None:
        with trio.fail_after(seconds):
            await main()

    trio.run(limited)


def everybody(_peer: PeerId) -> bool:
    return True


def nobody(_peer: PeerId) -> bool:
    return False


@asynccontextmanager
async def prober_and_node(
    may_ask: Callable[[PeerId], bool] = everybody, limits: Limits = Limits()
) -> AsyncIterator[tuple[Prober, Host, Host]]:
    """A prober with its host, and a node that answers ``/agora/self/1``."""
    one, two = Host(Identity.generate()), Host(Identity.generate(), limits=limits)
    report = SelfReport(SESSION, may_ask)
    two.handle(selfreport.PROTOCOL, report.serve, open_to_all=True, aside=True)
    async with one.run([LOCAL]), two.run([LOCAL]):
        yield Prober(one, everybody), one, two


async def exchange(call: Call, *messages: tuple[object, bytes]) -> dict[str, object]:
    """Send all, hear one."""
    async with call:
        for header, payload in messages:
            await call.send(header, payload)  # type: ignore[arg-type]
        return (await call.receive()).header


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 (the host tells nobody)
        await trio.sleep(0.01)


def texts(host: Host) -> list[str]:
    return [str(addr) for addr in host.addrs]


@contextmanager
def listening(backlog: int = 8) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(backlog)
        yield server, f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"
