"""What is done with streams that peers open: negotiated, gated by membership, handed to their handler.

A handler that raises ``Refused`` answers with it; one that raises RemoteError drops the stream; any other
exception is reported as ``HandlerFailed`` and drops the stream. Nothing that a peer does gets further.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, final

import attrs
import trio

from p2p import hello, multistream
from p2p.connection import Connection
from p2p.counters import Counters
from p2p.errors import LocalError, P2PError, Refused, RemoteError
from p2p.event import Emit
from p2p.groups import leaves, plain
from p2p.host_events import HandlerFailed, PeerRefused
from p2p.limits import Limits
from p2p.muxed import MuxedStream
from p2p.rpc import Call, Message, pack, refusal_header, whole

Handler = Callable[[Call], Awaitable[None]]
RawHandler = Callable[[Connection, MuxedStream], Awaitable[None]]
Responder = Callable[[Connection, Message], tuple[dict[str, Any], bytes]]
"""From a question to header and payload of its answer, without waiting; small ones, both."""

QUESTION_S: Final = 10.0
"""For a question to be here in full: guests may ask, and what they began takes memory."""


@attrs.frozen
class Entry:
    """A protocol of ours that is served; see ``Host.handle``."""

    handler: Handler
    open_to_all: bool
    max_payload: int
    aside: bool
    responder: Responder | None = None
    """Answers what is here in full at once; ``handler`` does the same for what is not."""


def taking_turns(responder: Responder) -> Handler:
    """The handler of a protocol of one question and one answer, for questions that come in pieces."""

    async def handle(call: Call) -> None:
        with trio.fail_after(QUESTION_S):
            message = await call.receive()
        await call.send(*responder(call.connection, message))

    return handle


@final
class Server:
    """The protocols of one host."""

    def __init__(
        self, limits: Limits, counters: Counters, emit: Emit, gate: Callable[[Connection, str], None]
    ) -> None:
        """``gate`` raises Refused for a stream that may not be."""
        self._limits = limits
        self._counters = counters
        self._emit = emit
        self._gate = gate
        self._handlers: dict[str, Entry] = {}
        self._raw: dict[str, RawHandler] = {}

    @property
    def protocols(self) -> list[str]:
        """What is served."""
        return [*self._raw, *self._handlers]

    def add(self, protocol: str, handler: Entry | RawHandler) -> None:
        """Serve ``protocol``; LocalError if it is served already."""
        if protocol in self._handlers or protocol in self._raw:
            raise LocalError(f"{protocol} has a handler already")
        if isinstance(handler, Entry):
            self._handlers[protocol] = handler
        else:
            self._raw[protocol] = handler

    def serve_now(self, connection: Connection, stream: MuxedStream) -> bool:
        """Answer a stream that is one whole question already; False where it has to be served by a task."""
        wish = multistream.proposed(stream.peek(2 * multistream.MAX_MESSAGE))
        if wish is None or connection.aside or (connection.dialer and not connection.greeted.is_set()):
            return False
        protocol, begins = wish
        entry = self._handlers.get(protocol)
        if entry is None or entry.responder is None:
            return False
        try:
            here = whole(stream.first_piece, begins, protocol, self._limits, entry.max_payload)
            if here is None:
                return False
            message, size = here
            stream.skip(size)
            self._counters.count(protocol, 0, len(message.payload))
            try:
                if not entry.open_to_all:
                    self._gate(connection, protocol)
                answer = pack(*entry.responder(connection, message), self._limits)
            except Refused as refusal:
                self._emit(PeerRefused(peer=connection.peer, protocol=protocol, why=refusal.code))
                answer = pack(refusal_header(refusal), b"", self._limits)
            stream.put(multistream.proposal(protocol) + answer.wire)
            self._counters.count(protocol, answer.payload_size, 0)
            stream.finish()
        except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError):
            stream.reset()
        except Exception as error:
            stream.reset()
            self._emit(HandlerFailed(peer=connection.peer, protocol=protocol, error=repr(error)))
        return True

    async def serve(self, connection: Connection, stream: MuxedStream) -> None:
        """One inbound stream, to its end. Never raises but for cancellation."""
        protocol = ""
        try:
            with trio.move_on_after(self._limits.negotiation_s):
                protocol, reply = await self._negotiate(connection, stream)
            if not protocol:
                stream.reset()
            elif protocol in self._raw:
                await self._serve_raw(connection, stream, protocol, reply)
            else:
                await self._serve_call(connection, stream, protocol, reply)
        except (RemoteError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            stream.reset()
        except Exception as error:
            stream.reset()
            self._emit(HandlerFailed(peer=connection.peer, protocol=protocol, error=repr(error)))
        except BaseExceptionGroup as group:  # cancelled, and something else failed on the way
            stream.reset()
            failures, others = group.split(Exception)
            if failures is not None and not all(isinstance(leaf, P2PError) for leaf in leaves(failures)):
                self._emit(HandlerFailed(peer=connection.peer, protocol=protocol, error=repr(failures)))
            if others is not None:
                raise others from None

    async def _serve_raw(
        self, connection: Connection, stream: MuxedStream, protocol: str, reply: bytes
    ) -> None:
        running = connection.running.get(protocol, 0)
        if running >= self._limits.raw_streams:
            self._counters.turned_away("raw_streams", connection.peer)
            stream.reset()
            return
        connection.running[protocol] = running + 1
        try:
            await stream.send_all(reply)
            await self._raw[protocol](connection, stream)
            await stream.aclose()
        finally:
            connection.running[protocol] -= 1

    def _speaks(self, wish: str, connection: Connection) -> bool:
        if not connection.aside:
            return wish in self._handlers or wish in self._raw
        return not connection.dialer and wish in self._handlers and self._handlers[wish].aside

    async def _negotiate(self, connection: Connection, stream: MuxedStream) -> tuple[str, bytes]:
        """The protocol, and the echo that is still to be sent."""
        wish = multistream.proposed(stream.peek(2 * multistream.MAX_MESSAGE))
        if wish is not None and self._speaks(wish[0], connection):  # what all of our peers do
            stream.skip(wish[1])
            return wish[0], multistream.proposal(wish[0])
        listener = multistream.Listener(lambda wish: self._speaks(wish, connection))
        reply = b""
        while missing := listener.missing:
            if reply and not stream.available:
                await stream.send_all(reply)
                reply = b""
            try:
                reply += listener.feed(bytes(await stream.receive_exactly(missing)))
            except RemoteError:
                # Behind a proposal that we do not speak comes its sender's first message, which is no
                # proposal. The "na" has to reach the sender before the reset does.
                await stream.send_all(reply)
                await stream.flush()
                raise
        assert listener.protocol is not None
        return listener.protocol, reply

    async def _serve_call(
        self, connection: Connection, stream: MuxedStream, protocol: str, reply: bytes
    ) -> None:
        entry = self._handlers[protocol]
        call = Call(connection, stream, protocol, self._counters, max_payload=entry.max_payload, prefix=reply)
        running = connection.running.get(protocol, 0)
        connection.running[protocol] = running + 1
        try:
            if running >= self._limits.calls_per_protocol:
                self._counters.turned_away("calls_per_protocol", connection.peer)
                raise Refused("busy", f"{running} calls of {protocol} are running already", 1.0)
            if connection.dialer and protocol != hello.PROTOCOL:
                # The peer's answer to our hello may be read after its first call. What is open to guests
                # waits as well: it may do more for members.
                with trio.move_on_after(self._limits.hello_s):
                    await connection.greeted.wait()
            if not entry.open_to_all:
                self._gate(connection, protocol)
            try:
                await entry.handler(call)
            except BaseExceptionGroup as group:
                raise plain(group) from None
            await call.aclose()
        except Refused as refusal:
            self._emit(PeerRefused(peer=connection.peer, protocol=protocol, why=refusal.code))
            await call.refuse(refusal)
        finally:
            connection.running[protocol] -= 1
