"""How raw byte streams to addresses come about. ``TcpTransport`` is the real one; ``p2p.sim`` has
another. Everything above sees trio streams and multiaddrs only.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol, final

import trio

from p2p import path
from p2p.errors import DialError, LocalError
from p2p.multiaddr import Multiaddr

Accept = Callable[[trio.abc.Stream, str], Awaitable[None]]
"""Given each inbound stream and its remote address (for people); must not raise."""

UNSENT_LIMIT = 128 * 1024
"""Bytes that the kernel takes beyond what is in flight: more would only make pings wait longer."""
REST = 64 * 1024
"""Bytes of a send that may wait for the next one. The kernel takes whole segments: a batch's last few hundred
bytes would be a call, a packet and a wake-up of the reader for themselves."""
LEAST_READ = 16 * 1024
"""Bytes of a long record that are waited for at most: at 1 Mbit/s they come in 0.13 s, far below any silence
that says that a peer is gone."""


class Listener(Protocol):
    """A bound address."""

    @property
    def addr(self) -> Multiaddr:
        """The address, with the port that the kernel chose where 0 was asked for."""

    async def serve(self, accept: Accept) -> None:
        """Accept until cancelled."""

    async def aclose(self) -> None:
        """Give the address back."""


class Transport(Protocol):
    """What a host dials and listens with."""

    def speaks(self, addr: Multiaddr) -> bool:
        """Whether ``dial`` can do anything with this address."""

    async def dial(self, addr: Multiaddr) -> trio.abc.Stream:
        """A stream to the address, or DialError. The caller sets the deadline."""

    async def listen(self, addr: Multiaddr) -> Listener:
        """A bound address, or LocalError with a sentence."""


@final
class TcpTransport:
    """TCP over IPv4 and IPv6."""

    def speaks(self, addr: Multiaddr) -> bool:
        return addr.port is not None and addr.port > 0

    async def dial(self, addr: Multiaddr) -> trio.abc.Stream:
        host, port = addr.host, addr.port
        if host is None or port is None:
            raise DialError(f"{addr} is not a TCP address")
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError as error:
            raise DialError(f"{addr}: {_reason(error)}") from error
        except ValueError as error:  # a name that no resolver takes: an empty label, one too long
            raise DialError(f"{addr}: not a host name") from error
        try:
            tune(stream)
        except OSError as error:  # gone already
            await trio.aclose_forcefully(stream)
            raise DialError(f"{addr}: {_reason(error)}") from error
        return stream

    async def listen(self, addr: Multiaddr) -> TcpListener:
        host, port = addr.host, addr.port
        if host is None or port is None:
            raise LocalError(f"{addr} is not a TCP address to listen on")
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            raise LocalError(f"cannot listen on {addr}: {_reason(error)}") from error
        except ValueError as error:
            raise LocalError(f"cannot listen on {addr}: not a host name") from error
        return TcpListener(addr, listeners)


@final
class TcpListener:
    """A listening TCP socket (several, where a name has several addresses)."""

    def __init__(self, addr: Multiaddr, listeners: list[trio.SocketListener]) -> None:
        self._listeners = listeners
        host, port = listeners[0].socket.getsockname()[:2]
        if ipaddress.ip_address(host).is_unspecified:
            host = _outward(listeners[0].socket.family)
        self._addr = Multiaddr.tcp(host, port)

    @property
    def addr(self) -> Multiaddr:
        return self._addr

    async def serve(self, accept: Accept) -> None:
        async def accepted(stream: trio.SocketStream) -> None:
            try:
                tune(stream)
                remote = stream.socket.getpeername()
            except OSError:  # gone already
                await trio.aclose_forcefully(stream)
                return
            await accept(stream, str(Multiaddr.tcp(remote[0].split("%")[0], remote[1])))

        await trio.serve_listeners(accepted, self._listeners)

    async def aclose(self) -> None:
        for listener in self._listeners:
            await listener.aclose()


@final
class Wire:
    """The bytes of one connection. On a socket they are read into and written from the caller's buffers."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._least = 1
        """Bytes of which the kernel tells us; fewer wait."""
        self._came: bytes | bytearray | None = None
        """Of a stream that is no socket: what ``readable`` got."""
        self.rest = b""
        """What the kernel has not taken of the last ``write``: it leaves with the next one."""

    def path(self) -> path.Path | None:
        """Figures of the way to the peer, where this is a socket."""
        return path.look(self._socket)

    def pace(self, rate: float | None) -> None:
        """Bound what the socket sends, in bytes a second; None: no bound."""
        path.bound(self._socket, rate)

    def controlled(self, by: bytes) -> bytes:
        """Change how the socket's speed is found, if that can be; what it was, or nothing."""
        return path.controlled(self._socket, by)

    async def readable(self, most: int, missing: int = 1) -> None:
        """Until ``read`` has something to say; no buffer is needed meanwhile.

        ``missing``: bytes without which nothing can be done. A line brings them packet by packet, and waking
        up for each is what a core would do all day.
        """
        if self._socket is not None:
            least = max(1, min(missing, most, LEAST_READ))
            if least != self._least:
                self._least = least
                with contextlib.suppress(OSError):  # a system without it wakes us more often
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            await trio.lowlevel.wait_readable(self._socket)
        elif self._came is None:
            self._came = await self._stream.receive_some(most)

    def read(self, buffer: memoryview) -> int | None:
        """How many bytes are in ``buffer`` now: 0 at the end, None where there was nothing after all."""
        if self._socket is not None:
            try:
                return os.readv(self._socket.fileno(), (buffer,))
            except BlockingIOError:
                return None
            except OSError as error:
                raise trio.BrokenResourceError(_reason(error)) from error
        came, self._came = self._came, None
        if came is None:
            return None
        if len(came) > len(buffer):
            self._came, came = came[len(buffer) :], came[: len(buffer)]
        buffer[: len(came)] = came
        return len(came)

    async def writable(self) -> None:
        """Until the kernel takes more."""
        if self._socket is not None:
            await trio.lowlevel.wait_writable(self._socket)

    async def write(self, data: memoryview) -> None:
        """Until the transport has taken ``rest`` and all of this but a new ``rest``.

        No checkpoint where it does so at once.
        """
        if self._socket is None:
            await self._stream.send_all(data)
            return
        await trio.lowlevel.checkpoint_if_cancelled()
        rest, self.rest = memoryview(self.rest), b""
        while True:
            try:
                size = os.writev(self._socket.fileno(), (rest, data)) - len(rest)
                rest, data = rest[len(rest) + size :] if size < 0 else rest[:0], data[max(0, size) :]
            except BlockingIOError:
                pass
            except OSError as error:
                raise trio.BrokenResourceError(_reason(error)) from error
            if not rest and len(data) <= REST:
                self.rest = bytes(data)
                return
            await trio.lowlevel.wait_writable(self._socket)


def tune(stream: trio.SocketStream) -> None:
    """No waiting for small packets to fill up, a short queue in the kernel, and none before the line."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    low_water = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if low_water is not None:
        stream.setsockopt(socket.IPPROTO_TCP, low_water, UNSENT_LIMIT)
    path.controlled(stream.socket, path.USUAL)


def _outward(family: int) -> str:
    """The address of ours that the default route uses; loopback where there is none."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # UDP: connecting only looks the route up, nothing is sent.
            probe.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1" if family == socket.AF_INET else "::1"


def _reason(error: OSError) -> str:
    if error.strerror is None and isinstance(error.__cause__, BaseExceptionGroup):
        causes = {str(cause.strerror) for cause in error.__cause__.exceptions if isinstance(cause, OSError)}
        return ", ".join(sorted(causes))
    if error.strerror is None and isinstance(error.__cause__, OSError):
        error = error.__cause__
    return error.strerror or str(error)
