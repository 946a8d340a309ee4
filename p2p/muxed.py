"""A yamux stream as a trio stream.

``MuxedStream`` is a ``trio.abc.HalfCloseableStream`` (and passes trio's conformance suite) with three
verbs more, for RPC: ``send_buffers`` (several buffers, none copied here), ``receive_exactly`` and
``receive_into``. One task may send and one may receive at a time. A send that is cancelled half way
resets the stream, since the peer could not tell half a message from a whole one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TypeVar, final

import trio

from p2p.errors import PeerGone
from p2p.yamux import Session, Stream

DEFAULT_RECEIVE = 65_536
SMALL_SEND = 16_384
"""Sends up to this size are copied and return at once, so that they share a record with what follows."""
QUEUED_SMALL = 65_536
"""Copied bytes that may wait in one stream."""
_T = TypeVar("_T")
_NOTHING = memoryview(b"")


@final
class MuxedStream(trio.abc.HalfCloseableStream):
    """One stream of one connection."""

    def __init__(
        self,
        session: Session,
        stream: Stream,
        wake_writer: Callable[[], None],
        registry: dict[Stream, MuxedStream],
    ) -> None:
        self._session = session
        self._stream = stream
        self._wake_writer = wake_writer
        self._registry = registry
        self._closed = False
        self._lost: str | None = None
        self._sending = False
        self._receiving = False
        self._send_event: trio.Event | None = None
        self._receive_event: trio.Event | None = None

    # told by the connection

    def changed(self) -> None:
        """Data, end or reset arrived."""
        if self._receive_event is not None:
            self._receive_event.set()
        if self._stream.reset and self._send_event is not None:
            self._send_event.set()

    def drained(self) -> None:
        """All that was queued has left."""
        if self._send_event is not None:
            self._send_event.set()

    def lost(self, why: str) -> None:
        """The connection ended."""
        self._lost = why
        self._stream.pending.clear()
        self._stream.pending_bytes = 0
        self._forget()

    def _forget(self) -> None:
        self._registry.pop(self._stream, None)
        for event in (self._send_event, self._receive_event):
            if event is not None:
                event.set()

    # sending

    @property
    def available(self) -> int:
        """Bytes that have arrived and were not yet taken."""
        return self._stream.inbox_bytes

    @property
    def remote_closed(self) -> bool:
        """Whether the peer has ended or reset the stream (data may still be unread)."""
        return self._stream.fin_received or self._stream.reset or self._lost is not None

    def _check_sending(self) -> None:
        ended = self._stream.fin_sent or self._stream.fin_pending
        if self._closed or (ended and not self._stream.reset):
            raise trio.ClosedResourceError
        if self._lost is not None or self._stream.reset:
            raise trio.BrokenResourceError(self._why())

    def _why(self) -> str:
        return self._lost or "the peer reset the stream"

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.send_buffers((memoryview(data),))

    async def send_buffers(self, buffers: Iterable[memoryview]) -> None:
        """Send byte buffers in order; they are in nobody's hands any more when this returns."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            # Others have their turn before, not after: the end of a call whose last message this is then
            # leaves in the same record.
            await trio.lowlevel.checkpoint()
            self._check_sending()
            buffers = tuple(buffers)
            size = sum(buffer.nbytes for buffer in buffers)
            if size <= SMALL_SEND and self._stream.pending_bytes + size <= QUEUED_SMALL:
                self._session.send(self._stream, (memoryview(b"".join(buffers)),))
                if size:
                    self._wake_writer()
                return
            self._session.send(self._stream, buffers)
            self._wake_writer()
            try:
                await self._drain()
            except trio.BrokenResourceError:
                raise  # what the peer said before stays readable
            except BaseException:
                self.reset()
                raise
        finally:
            self._sending = False

    def put(self, data: bytes) -> None:
        """Queue a small message without waiting, not even for a turn: for who waits for its answer next.

        Raises as ``send_all`` does. Nothing holds a caller back who puts again and again.
        """
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._check_sending()
        self._session.send(self._stream, (memoryview(data),))
        self._wake_writer()

    async def flush(self) -> None:
        """Wait until all that was sent has left this host's queue."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await self._drain()
        finally:
            self._sending = False

    async def _drain(self) -> None:
        try:
            while self._stream.pending_bytes and self._lost is None:
                self._send_event = trio.Event()
                await self._send_event.wait()
        finally:
            self._send_event = None
        if self._closed:
            raise trio.ClosedResourceError
        if self._lost is not None or self._stream.reset:
            raise trio.BrokenResourceError(self._why())

    async def wait_send_all_might_not_block(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError

    async def send_eof(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError
        if self._stream.fin_sent or self._stream.fin_pending:
            return
        self._check_sending()
        self._session.close_sending(self._stream)
        self._wake_writer()

    # receiving

    async def _wait_readable(self) -> bool:
        """True when there is data, False at the end of it."""
        while not self._stream.inbox:
            if self._stream.fin_received and not self._closed:
                return False
            self._check_receiving()
            await self._wait_changed()
        return True

    def _check_receiving(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if not self._stream.fin_received and (self._lost is not None or self._stream.reset):
            raise trio.BrokenResourceError(self._why())

    async def _wait_changed(self) -> None:
        self._receive_event = trio.Event()
        try:
            await self._receive_event.wait()
        finally:
            self._receive_event = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is None:
            max_bytes = DEFAULT_RECEIVE
        elif operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        self._begin_receiving()
        try:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError
            if not await self._wait_readable():
                return b""
            return bytes(self._took(self._session.take(self._stream, max_bytes)))
        finally:
            self._receiving = False

    async def receive_into(self, target: memoryview, filled: Callable[[], memoryview] | None = None) -> None:
        """Fill ``target``, then whatever ``filled`` gives when the last one is full, until that is empty.

        PeerGone when the stream ends before. ``filled`` is called in the turn in which the data came; it must
        not raise, or end the stream.
        """
        self._begin_receiving()
        stream = self._stream
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            stream.target, stream.filled = target, filled
            if stream.inbox:
                self._session.pour(stream)
                self._took(None)
            while stream.target:  # what still comes goes there, and nobody is woken before all has
                self._check_receiving()
                if stream.fin_received:
                    raise PeerGone("the peer ended the stream in the middle of a message")
                await self._wait_changed()
        except trio.BrokenResourceError as error:
            raise PeerGone(str(error)) from error
        finally:
            stream.target = stream.filled = None
            self._receiving = False

    async def receive_exactly(self, size: int) -> bytearray:
        """The next ``size`` bytes; PeerGone when the stream ends before."""
        data = bytearray(size)
        await self.receive_into(memoryview(data))
        return data

    @property
    def first_piece(self) -> bytearray | memoryview:
        """What has arrived, as far as it lies in one piece; it stays, and is valid until the next take."""
        inbox = self._stream.inbox
        return inbox[0] if inbox else _NOTHING

    def peek(self, size: int) -> bytes:
        """Up to ``size`` of the bytes that have arrived, which stay; less where they came in pieces."""
        inbox = self._stream.inbox
        return bytes(inbox[0][:size]) if inbox else b""

    def skip(self, size: int) -> None:
        """Take bytes that ``peek`` has shown."""
        self._begin_receiving()
        try:
            self._took(self._session.take(self._stream, size))
        finally:
            self._receiving = False

    async def wait_available(self, size: int) -> None:
        """Until ``size`` bytes (few) can be read without waiting, or the stream's end."""
        self._begin_receiving()
        try:
            while self._stream.inbox_bytes < size and not self.remote_closed and not self._closed:
                self._receive_event = trio.Event()
                await self._receive_event.wait()
        finally:
            self._receive_event = None
            self._receiving = False

    def expect(self, size: int) -> None:
        """A message of ``size`` bytes is under way: let more of it come at once."""
        missing = size - self._stream.inbox_bytes
        if missing > self._stream.receive_window:
            self._session.grow(self._stream, size)
            self._wake_writer()

    def _begin_receiving(self) -> None:
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        if self._closed:
            raise trio.ClosedResourceError
        self._receiving = True

    def _took(self, value: _T) -> _T:
        if self._session.wants_to_send():
            self._wake_writer()
        return value

    # the end

    def reset(self) -> None:
        """Drop the stream now: the peer sees a reset, data under way is lost."""
        if self._lost is None:
            self._session.reset(self._stream)
            self._wake_writer()
        self._closed = True
        self._forget()

    async def aclose(self) -> None:
        """End our direction and stop reading; a send under way in another task makes it a reset."""
        self.finish()
        await trio.lowlevel.checkpoint()

    def finish(self) -> None:
        """``aclose`` without waiting for a turn."""
        if not self._closed:
            if self._lost is None:
                if self._sending:
                    self._session.reset(self._stream)
                else:
                    self._session.abandon(self._stream)
                self._wake_writer()
            self._closed = True
            self._forget()
