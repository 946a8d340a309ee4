"""Calls: messages of a msgpack header and raw payload bytes on a stream of their own.

A message is u32 header length, u32 payload length (big endian), the header (a msgpack map with text
keys, at most 64 KiB) and the payload. What a receiver did not ask for is refused before anything is
allocated. A message whose header has ``t = "refused"`` is the typed no of a handler, ``{t, code, why,
retry_after}``; ``receive`` raises it as ``Refused``, and so does a ``send`` that fails because the
peer, having refused, no longer reads.

Negotiation costs no round trip: the caller's proposal leaves with its first message and is confirmed
when the answer is read; the callee's echo leaves with its first answer, or as soon as it has to wait
(a dialer of another implementation may want to hear it first).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

import attrs
import msgpack
import trio

from p2p import multistream
from p2p.connection import Connection
from p2p.counters import Counters
from p2p.errors import LocalError, PeerGone, Refused, RemoteError
from p2p.hearing import Hearing
from p2p.identity import PeerId, short
from p2p.limits import Limits
from p2p.membership import Member
from p2p.muxed import MuxedStream

if TYPE_CHECKING:
    from typing_extensions import Buffer  # typing has it from Python 3.12 on

LENGTHS = struct.Struct(">II")
MAX_PAYLOAD = 0xFFFFFFFF
MAX_WORDS = 2000
"""Characters of a refusal's code and reason together that are passed on."""


@attrs.frozen
class Message:
    """What ``receive`` returns."""

    header: dict[str, Any]
    payload: memoryview


@attrs.frozen
class Packed:
    """A small message as it travels: packed once, it may go to several peers."""

    wire: bytes
    payload_size: int


def pack(header: dict[str, Any], payload: bytes, limits: Limits) -> Packed:
    """For ``Call.ask``, and for who answers at once. LocalError for a header that is too large."""
    head = _packed_header(header, limits)
    return Packed(LENGTHS.pack(len(head), len(payload)) + head + payload, len(payload))


def whole(
    data: bytearray | memoryview, offset: int, protocol: str, limits: Limits, max_payload: int
) -> tuple[Message, int] | None:
    """The message that begins at ``offset``, and where it ends; None where more of it is to come.

    RemoteError as ``Call.receive``.
    """
    begin = offset + LENGTHS.size
    if len(data) < begin:
        return None
    header_size, payload_size = _sizes(data[offset:begin], protocol, limits, max_payload)
    middle, end = begin + header_size, begin + header_size + payload_size
    if len(data) < end:
        return None
    header = _unpack(data[begin:middle], protocol)
    return Message(header, memoryview(bytes(data[middle:end]))), end


@final
class Call:
    """One stream, one exchange or several messages both ways. An async context manager.

    Leaving the block ends the call; leaving it with an exception (or cancelled) resets the stream.
    One task may send while another receives.
    """

    def __init__(
        self,
        connection: Connection,
        stream: MuxedStream,
        protocol: str,
        counters: Counters,
        *,
        max_payload: int = 0,
        prefix: bytes = b"",
        confirmation: multistream.Confirmation | None = None,
    ) -> None:
        self.connection = connection
        self.protocol = protocol
        self._stream = stream
        self._counters = counters
        self._max_payload = max_payload
        self._largest = max_payload  # that was ever allowed here
        self._prefix = prefix
        self._confirmation = confirmation
        self._over = False
        self._begun = confirmation is not None  # whether the header of the first message may take any time

    def __repr__(self) -> str:
        return f"<Call of {self.protocol} with {short(self.peer)}>"

    @property
    def peer(self) -> PeerId:
        return self.connection.peer

    @property
    def member(self) -> Member | None:
        """What the peer proved to be; None for a guest, and where the host has no membership."""
        return self.connection.member

    async def send(self, header: dict[str, Any], payload: Buffer | Sequence[Buffer] = b"") -> None:
        """Send one message; the payload's buffers are not copied and free again on return."""
        await self.send_together(((header, payload),))

    async def send_together(
        self, messages: Iterable[tuple[dict[str, Any], Buffer | Sequence[Buffer]]]
    ) -> None:
        """Send messages in order, as ``send`` does, without a pause between them."""
        views: list[memoryview] = []
        total = 0
        for header, payload in messages:
            head = _packed_header(header, self.connection.limits)
            buffers = _flat(payload)
            size = sum(buffer.nbytes for buffer in buffers)
            if size > MAX_PAYLOAD:
                raise LocalError(f"a payload of {size} bytes does not fit one message")
            prefix, self._prefix = self._prefix, b""
            views.append(memoryview(prefix + LENGTHS.pack(len(head), size) + head))
            views += buffers
            total += size
        try:
            await self._stream.send_buffers(views)
        except trio.BrokenResourceError as error:
            await self._raise_refusal()
            raise PeerGone(f"{short(self.peer)} ended the call: {error}") from error
        self._counters.count(self.protocol, total, 0)

    async def ask(self, message: Packed, *, max_payload: int = 0) -> Message:
        """Send one message, return the answer and end the call: one turn of the scheduler.

        For what fits a record or two each way. Raises as ``send`` and ``receive`` do.
        """
        stream = self._stream
        prefix, self._prefix = self._prefix, b""
        try:
            stream.put(prefix + message.wire)
        except trio.BrokenResourceError as error:
            raise PeerGone(f"{short(self.peer)} ended the call: {error}") from error
        self._counters.count(self.protocol, message.payload_size, 0)
        await stream.wait_available(1)
        echo = multistream.proposal(self.protocol)
        piece = stream.first_piece
        here = None
        if bytes(piece[: len(echo)]) == echo:
            here = whole(piece, len(echo), self.protocol, self.connection.limits, max_payload)
        if here is None:  # in several pieces, or a no
            answer = await self.receive(max_payload=max_payload)
        else:
            answer, size = here
            stream.skip(size)
            self._counters.count(self.protocol, 0, len(answer.payload))
            if answer.header.get("t") == "refused":
                raise _refusal(answer.header)
        stream.finish()
        self._over = True
        return answer

    async def receive(
        self, *, max_payload: int = 0, ahead: int = 0, into: memoryview = memoryview(b"")
    ) -> Message:
        """The peer's next message. Refused, PeerGone (also at its end), or RemoteError if malformed.

        ``ahead``: bytes of further messages that are to come without waiting for answers. ``into``: where a
        payload that fits is put; the message's is a view of it then.
        """
        stream = self._stream
        max_payload = max(max_payload, self._max_payload, len(into))
        self._largest = max(self._largest, max_payload)
        if self._prefix and not stream.available:
            await self._flush()
        if self._confirmation is not None:
            if not stream.available:
                await stream.wait_available(1)
            echo = multistream.proposal(self.protocol)
            if stream.peek(len(echo)) == echo:  # nearly always: a yes, in one piece
                stream.skip(len(echo))
                self._confirmation = None
        if self._confirmation is not None:
            while missing := self._confirmation.missing:
                self._confirmation.feed(bytes(await stream.receive_exactly(missing)))
            self._confirmation = None
        if not self._begun:
            await self._wait_for_first(LENGTHS.size)
        sizes = await stream.receive_exactly(LENGTHS.size)
        header_size, payload_size = _sizes(sizes, self.protocol, self.connection.limits, max_payload)
        stream.expect(header_size + payload_size + ahead)
        if not self._begun:
            await self._wait_for_first(header_size)
            self._begun = True
        header = _unpack(await stream.receive_exactly(header_size), self.protocol)
        fits = payload_size <= len(into)
        payload = into[:payload_size] if fits else memoryview(bytearray(payload_size))
        if payload_size:
            await stream.receive_into(payload)
            self._counters.count(self.protocol, 0, payload_size)
        if header.get("t") == "refused":
            raise _refusal(header)
        return Message(header, payload)

    async def hear(
        self,
        heard: Callable[[dict[str, Any], memoryview], None],
        *,
        into: memoryview,
        ahead: int = 0,
        place: Callable[[dict[str, Any], int], memoryview | None] = lambda header, size: None,
    ) -> None:
        """Have further messages ``heard`` in the turn in which they come; raises what ends the call.

        Like ``receive`` again and again, but nobody has to be woken for each. One was received before. What
        ``heard`` raises is raised here. Payloads come into ``into``, one after the other, and none is longer;
        or to where ``place`` says, asked with header and size just before. ``ahead`` as for ``receive``.
        """
        assert self._begun

        def sizes_of(head: memoryview) -> tuple[int, int]:
            header_size, payload_size = _sizes(head, self.protocol, self.connection.limits, len(into))
            if not header_size:
                raise RemoteError(f"{self.protocol}: a message without a header")
            return header_size, payload_size

        def header_of(data: memoryview) -> dict[str, Any]:
            header = _unpack(data, self.protocol)
            if header.get("t") == "refused":
                raise _refusal(header)
            return header

        def counted(header: dict[str, Any], payload: memoryview) -> None:
            self._counters.count(self.protocol, 0, len(payload))
            heard(header, payload)

        hearing = Hearing(
            sizes_of,
            header_of,
            counted,
            lambda size: self._stream.expect(size + ahead),
            size=LENGTHS.size,
            into=into,
            place=place,
        )
        await self._stream.receive_into(hearing.first, hearing.filled)
        try:
            raise hearing.failure or PeerGone(f"{short(self.peer)} ended the call")
        finally:
            hearing.failure = None  # it knows this frame, which knows the buffers

    async def refuse(self, refusal: Refused) -> None:
        """Answer with a typed no and stop reading."""
        try:
            await self.send(refusal_header(refusal))
            await self._stream.flush()
        except trio.BrokenResourceError as error:
            raise PeerGone(f"{short(self.peer)} ended the call: {error}") from error
        finally:
            if not self._stream.remote_closed:
                self._stream.reset()  # stop a peer that is still sending; what we sent stays readable
            await self._stream.aclose()

    async def aclose(self) -> None:
        """End the call; what was sent still arrives."""
        if self._prefix and not self._stream.remote_closed:
            try:
                await self._flush()
            except PeerGone:
                pass
        await self._stream.aclose()

    def reset(self) -> None:
        """Drop the call at once; the peer sees PeerGone."""
        self._stream.reset()

    async def __aenter__(self) -> Call:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if kind is None:
            if not self._over:
                await self.aclose()
        else:
            self.reset()

    async def _wait_for_first(self, size: int) -> None:
        if self._stream.available >= size:
            return
        with trio.move_on_after(self.connection.limits.first_message_s):
            await self._stream.wait_available(size)
            return
        raise PeerGone(f"{short(self.peer)} opened a call and did not say what for")

    async def _flush(self) -> None:
        prefix, self._prefix = self._prefix, b""
        try:
            await self._stream.send_all(prefix)
        except trio.BrokenResourceError as error:
            raise PeerGone(f"{short(self.peer)} ended the call: {error}") from error

    async def _raise_refusal(self) -> None:
        """The peer stopped reading: if it said why, perhaps behind other messages, say that instead."""
        try:
            while self._stream.available:
                await self.receive(max_payload=self._largest)
        except (PeerGone, trio.BusyResourceError, trio.ClosedResourceError):
            pass


def refusal_header(refusal: Refused) -> dict[str, Any]:
    """How a refusal travels."""
    return {"t": "refused", "code": refusal.code, "why": refusal.why, "retry_after": refusal.retry_after}


def _packed_header(header: dict[str, Any], limits: Limits) -> bytes:
    head: bytes = msgpack.packb(header, use_bin_type=True)
    if len(head) > limits.header:
        raise LocalError(f"a header of {len(head)} bytes; {limits.header} are allowed")
    return head


def _sizes(head: bytearray | memoryview, protocol: str, limits: Limits, max_payload: int) -> tuple[int, int]:
    header_size, payload_size = LENGTHS.unpack(head)
    if header_size > limits.header:
        raise RemoteError(f"{protocol}: a header of {header_size} bytes")
    if payload_size > max_payload:
        raise RemoteError(f"{protocol}: a payload of {payload_size} bytes where {max_payload} are allowed")
    return header_size, payload_size


def _flat(payload: Buffer | Sequence[Buffer]) -> list[memoryview]:
    buffers = payload if isinstance(payload, list | tuple) else (payload,)
    views = [memoryview(buffer) for buffer in buffers]
    return [view.cast("B") for view in views if view.nbytes]


def _unpack(data: bytearray | memoryview, protocol: str) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteError(f"{protocol}: the header is not msgpack ({error})") from error
    if not isinstance(header, dict) or not all(type(key) is str for key in header):
        raise RemoteError(f"{protocol}: the header is not a map with text keys")
    return header


def _refusal(header: dict[str, Any]) -> Refused:
    code, why, after = header.get("code"), header.get("why"), header.get("retry_after")
    if not isinstance(code, str) or not isinstance(why, str) or len(code) + len(why) > MAX_WORDS:
        raise RemoteError("a refusal without a usable reason")
    later = float(after) if isinstance(after, int | float) and 0 <= after < 1e9 else None
    return Refused(code, why, later)
