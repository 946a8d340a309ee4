"""A small HTTP/1.1 server for readers whom nobody knows: GET and HEAD, every part of it bounded.

Theory of operation. A connection is one task: it reads a head (``h11`` parses it), asks ``answer`` for the
whole response, sends it, and goes on with the next request. A response whose ``stream`` is set (server-sent
events) is sent piece by piece until its source or the reader ends. Bodies of requests are refused. There is
no upgrade, no pipelining beyond what ``h11`` buffers, and no TLS: who wants that puts a proxy in front; one
on this machine is believed about whom it speaks for (the last ``X-Forwarded-For``).

Limits: ``CONNECTIONS`` at once and ``EACH`` from one address (who is beyond gets 503 and is closed), a head
of ``HEAD`` bytes within ``HEAD_S``, ``IDLE_S`` between requests, ``SEND_S`` for a reader to take a response,
``REQUESTS`` a connection. However many ask, one request is answered between two turns of all other tasks of
this process (``_turns``). An address that speaks from this machine and names nobody else is the operator's
own.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

import attrs
import h11
import trio

CONNECTIONS: Final = 256
EACH: Final = 32
HEAD: Final = 8192
HEAD_S: Final = 10.0
IDLE_S: Final = 20.0
SEND_S: Final = 30.0
REQUESTS: Final = 1000
BACKLOG: Final = 128
PIECE: Final = 16_384

OWN: Final = "own"
"""The reader's name if it is this machine itself."""


@attrs.frozen(kw_only=True)
class Request:
    """One request, as far as anybody here looks at it."""

    method: str
    path: str
    """Without the query; as it was sent, at most ``HEAD`` characters of ASCII."""
    query: str
    headers: dict[str, str]
    """By lower-case name; of a name that came twice the first."""
    reader: str
    """Whom the limits count: ``OWN``, an IPv4 address, or the /64 of an IPv6 one."""


@attrs.frozen(kw_only=True)
class Response:
    """What to send. Header names are lower-case."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    stream: AsyncGenerator[bytes, None] | None = attrs.field(default=None, eq=False)
    """Pieces of a body without an announced length, in place of ``body``."""


_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}

Answer = Callable[[Request], Awaitable[Response]]


class Server:
    """See the module's head."""

    def __init__(self, answer: Answer, failed: Callable[[Exception], None]) -> None:
        """``failed``: hears of a bug that answering met."""
        self._answer = answer
        self._failed = failed
        self._readers: Counter[str] = Counter()
        self._turns = trio.Lock()
        self.open = 0

    async def serve(self, listener: trio.SocketListener) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    stream = await listener.accept()
                except OSError:  # no descriptor is free, say: those that are served will end
                    await trio.sleep(0.1)
                    continue
                if self.open >= CONNECTIONS:
                    await _turn_away(stream)
                    continue
                self.open += 1
                nursery.start_soon(self._connection, stream)

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            with self._counted(_address_of(stream)) as few:
                if few:
                    await self._requests(stream)
                else:
                    await _turn_away(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError):
            pass  # the reader went away, or reads too slowly
        finally:
            self.open -= 1
            await trio.aclose_forcefully(stream)

    @contextmanager
    def _counted(self, address: str) -> Iterator[bool]:
        if address == OWN:
            yield True
            return
        self._readers[address] += 1
        try:
            yield self._readers[address] <= EACH
        finally:
            self._readers[address] -= 1
            if not self._readers[address]:
                del self._readers[address]

    async def _requests(self, stream: trio.SocketStream) -> None:
        wire = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD)
        address = _address_of(stream)
        for served in range(REQUESTS):
            try:
                with trio.fail_after(IDLE_S if served else HEAD_S):
                    head = await _next_head(wire, stream)
            except h11.RemoteProtocolError as error:
                await _refuse(wire, stream, error.error_status_hint)
                return
            if head is None:
                return
            request = _request(head, address)
            async with self._turns:  # passed on in turn: a crowd is served one a round of the loop
                await trio.lowlevel.checkpoint()
            response = Response(status=400)
            if request is not None:
                try:
                    response = await self._answer(request)
                except Exception as error:
                    self._failed(error)  # a page that is broken must not end who serves it
                    response = Response(status=500)
            again = served + 1 < REQUESTS
            if not await _send(wire, stream, head.method == b"HEAD", response, again=again):
                return
            wire.start_next_cycle()


async def _next_head(wire: h11.Connection, stream: trio.SocketStream) -> h11.Request | None:
    """The next request whose end is there too; None when the reader is gone."""
    head: h11.Request | None = None
    until = math.inf
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            with trio.fail_at(until):
                data = await stream.receive_some(PIECE)
            if data and until == math.inf:
                until = trio.current_time() + HEAD_S
            wire.receive_data(data)
        elif isinstance(event, h11.Request):
            head = event
            names = dict(event.headers)
            if b"transfer-encoding" in names or names.get(b"content-length", b"0") != b"0":
                raise h11.RemoteProtocolError("nobody here reads bodies", error_status_hint=413)
        elif isinstance(event, h11.EndOfMessage):
            return head
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return None
        else:
            raise h11.RemoteProtocolError("nobody here reads bodies", error_status_hint=413)


def _request(head: h11.Request, address: str) -> Request | None:
    headers: dict[str, str] = {}
    for name, value in head.headers:
        headers.setdefault(name.decode("ascii"), value.decode("latin-1"))
    target = head.target.decode("ascii", "replace")
    if not target.startswith("/"):
        return None
    path, _, query = target.partition("?")
    reader = address
    if address == OWN and "x-forwarded-for" in headers:
        reader = reader_of(headers["x-forwarded-for"].rpartition(",")[2].strip())
    return Request(method=head.method.decode("ascii"), path=path, query=query, headers=headers, reader=reader)


async def _send(
    wire: h11.Connection, stream: trio.SocketStream, head_only: bool, response: Response, *, again: bool
) -> bool:
    """Whether the connection goes on."""
    headers = [("date", formatdate(usegmt=True)), *response.headers]
    body = response.body
    if response.stream is not None or not again:
        headers.append(("connection", "close"))
    if response.stream is None and response.status != 304:
        headers.append(("content-length", str(len(body))))
    parts = [
        wire.send(
            h11.Response(status_code=response.status, headers=headers, reason=_REASONS[response.status])
        )
        or b""
    ]
    if response.stream is not None and not head_only:
        await _send_all(stream, parts[0])
        await _follow(wire, stream, response.stream)
        return False
    if body and not head_only and response.status != 304:
        parts.append(wire.send(h11.Data(data=body)) or b"")
    parts.append(wire.send(h11.EndOfMessage()) or b"")
    await _send_all(stream, b"".join(parts))
    return wire.our_state is h11.DONE and wire.their_state is h11.DONE


async def _follow(
    wire: h11.Connection, stream: trio.SocketStream, source: AsyncGenerator[bytes, None]
) -> None:
    """Send pieces until the source ends; a reader that goes away ends it at once."""
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            # Whatever comes now is either the end or out of turn.
            await stream.receive_some(PIECE)
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        async with aclosing(source) as pieces:
            async for piece in pieces:
                await _send_all(stream, wire.send(h11.Data(data=piece)) or b"")
        await _send_all(stream, wire.send(h11.EndOfMessage()) or b"")
        nursery.cancel_scope.cancel()


async def _send_all(stream: trio.SocketStream, data: bytes) -> None:
    with trio.fail_after(SEND_S):
        await stream.send_all(data)


async def _refuse(wire: h11.Connection, stream: trio.SocketStream, status: int) -> None:
    if wire.our_state in (h11.IDLE, h11.SEND_RESPONSE):
        head = h11.Response(status_code=status, headers=[("connection", "close"), ("content-length", "0")])
        await _send_all(stream, (wire.send(head) or b"") + (wire.send(h11.EndOfMessage()) or b""))


async def _turn_away(stream: trio.SocketStream) -> None:
    """Too many: one word, if it fits without waiting."""
    head = (
        b"HTTP/1.1 503 Service Unavailable",
        b"retry-after: 5",
        b"connection: close",
        b"content-length: 0",
    )
    word = b"\r\n".join((*head, b"", b""))
    with trio.move_on_after(0.1):
        try:
            await stream.send_all(word)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
    await trio.aclose_forcefully(stream)


def _address_of(stream: trio.SocketStream) -> str:
    try:
        return reader_of(stream.socket.getpeername()[0])
    except OSError:
        return ""


def reader_of(text: str) -> str:
    """Whom the limits count for an address: ``OWN`` for loopback; "" for what is no address."""
    try:
        address = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif not address.is_loopback:
            return str(ipaddress.ip_network((address, 64), strict=False))
    return OWN if address.is_loopback else str(address)
