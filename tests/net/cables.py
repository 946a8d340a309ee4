"""TCP of one node, whose cable may be frozen (nothing passes, nobody is told) or cut (as after kill -9)."""

from __future__ import annotations

import trio

from p2p.errors import DialError
from p2p.multiaddr import Multiaddr
from p2p.transport import Accept, Listener, TcpTransport


class Wire(trio.abc.Stream):
    """One end of a connection whose cable somebody may freeze or cut."""

    def __init__(self, stream: trio.abc.Stream, cable: Cable) -> None:
        self._stream, self._cable = stream, cable
        cable.wires.append(self)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._cable.thawed.wait()
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        await self._cable.thawed.wait()
        return data

    async def aclose(self) -> None:
        if self._cable.thawed.is_set():
            await self._stream.aclose()
        else:
            self._cable.closing.append(self._stream)  # nor does the other end hear of this

    def cut(self) -> None:
        assert isinstance(self._stream, trio.SocketStream)
        self._stream.socket.close()


class Cable:
    """TCP of one node."""

    def __init__(self) -> None:
        self._tcp = TcpTransport()
        self.wires: list[Wire] = []
        self.closing: list[trio.abc.Stream] = []
        self.dead = False
        self.thawed = trio.Event()
        self.thawed.set()

    def freeze(self) -> None:
        self.thawed = trio.Event()

    def cut(self) -> None:
        self.dead = True
        for wire in self.wires:
            wire.cut()

    def speaks(self, addr: Multiaddr) -> bool:
        return self._tcp.speaks(addr)

    async def dial(self, addr: Multiaddr) -> trio.abc.Stream:
        if self.dead:
            raise DialError("the cable is cut")
        return Wire(await self._tcp.dial(addr), self)

    async def listen(self, addr: Multiaddr) -> Listener:
        return Socket(await self._tcp.listen(addr), self)


class Socket:
    """A listening socket behind a cable."""

    def __init__(self, listener: Listener, cable: Cable) -> None:
        self._listener, self._cable = listener, cable

    @property
    def addr(self) -> Multiaddr:
        return self._listener.addr

    async def serve(self, accept: Accept) -> None:
        async def through_cable(stream: trio.abc.Stream, addr: str) -> None:
            if self._cable.dead:
                await trio.aclose_forcefully(stream)
            else:
                await accept(Wire(stream, self._cable), addr)

        await self._listener.serve(through_cable)

    async def aclose(self) -> None:
        await self._listener.aclose()
