"""yamux 1: many flow-controlled streams over one ordered byte stream. Sans-IO.

Frames have a 12-byte header (version, type, flags, stream id, length). Data counts against a
window, 256 KiB at first, that the receiver extends as its user consumes. ``receive`` takes bytes cut
anywhere and returns events; data goes where the stream's user waits for it (``Stream.target``), the rest into
its inbox. ``fill`` writes the next frames into a buffer of the caller, the size of a Noise record. Control
frames go first, then one data frame of each ready stream in turn. A frame is no longer than its record and
what the caller lets follow at once (``behind``), which nobody copies; on the other side such records are
decrypted to where they are waited for (``place``).

Larger windows between agora peers. Each hello promises a window; the smaller of both is agreed. A
side that has the other's promise opens a stream with WINDOW_UPDATE|SYN whose delta lifts 256 KiB to
the agreed window, and by this rule the delta holds in *both* directions: the opener may send that
much at once. Only a side that promised applies the rule, so stock peers never notice it.

Order of FIN, RST and data. What arrived before a reset stays readable (a refusal sent just before
it must not be lost). A stream closed at both ends, or reset, leaves the table; frames for a stream
that is not in the table are skipped, since a reset may cross data on its way.

Limits: streams each way, control frames queued, window credit a connection (``Limits``); a stream
never holds more than its window. Any violation is a RemoteError, after which the session is dead.
Source: github.com/hashicorp/yamux/blob/master/spec.md, github.com/libp2p/specs/tree/master/yamux.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import final

import attrs

from p2p.errors import LocalError, RemoteError
from p2p.limits import Limits

PROTOCOL = "/yamux/1.0.0"
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER = struct.Struct(">BBHII")
INITIAL_WINDOW = 256 * 1024
MAX_WINDOW = 0xFFFFFFFF
MERGE_BELOW = 4096
"""Pieces of an inbox smaller than this are put together."""
UNHURRIED = 256
"""Frames that may wait for company; more leave at once."""
MIN_DATA_ROOM = 1024
"""With less room than this left in a record, a long message rather starts the next one."""
_NOTHING = memoryview(b"")


@final
class Stream:
    """One stream's state. Only ``Session`` changes it; users read ``readable`` and the flags."""

    __slots__ = (
        "consumed",
        "discarding",
        "filled",
        "fin_pending",
        "fin_received",
        "fin_sent",
        "first_flags",
        "id",
        "inbound",
        "inbox",
        "inbox_bytes",
        "pending",
        "pending_bytes",
        "queued",
        "receive_window",
        "reset",
        "send_window",
        "target",
        "window_size",
    )

    def __init__(self, stream_id: int, *, inbound: bool) -> None:
        self.id = stream_id
        self.inbound = inbound
        self.first_flags = 0  # SYN or ACK that our first frame has to carry
        self.send_window = INITIAL_WINDOW
        self.receive_window = INITIAL_WINDOW  # credit the peer has left
        self.window_size = INITIAL_WINDOW  # credit it has when all was consumed
        self.consumed = 0  # not yet given back as credit
        self.inbox: deque[memoryview | bytearray] = deque()
        self.inbox_bytes = 0
        self.target: memoryview | None = None  # what is left of a buffer that its user waits to see full
        self.filled: Callable[[], memoryview] | None = None  # gives the next buffer, or an empty one
        self.pending: deque[memoryview] = deque()
        self.pending_bytes = 0
        self.queued = False  # in the session's ring of streams that can send
        self.fin_sent = False
        self.fin_pending = False  # the end goes with the last of the pending data
        self.fin_received = False
        self.discarding = False  # our user is gone; data of the peer is answered by a reset
        self.reset = False


@attrs.frozen
class Opened:
    """The peer opened a stream."""

    stream: Stream


@attrs.frozen
class Changed:
    """Data, end or reset of a stream arrived."""

    stream: Stream


@attrs.frozen
class PingAnswered:
    """The peer returned the value of a ping of ours."""

    value: int


@attrs.frozen
class WentAway:
    """The peer opens and accepts no more streams; those open go on."""

    code: int


YamuxEvent = Opened | Changed | PingAnswered | WentAway


@final
class Credit:
    """Window above the initial one that all connections of a host may have out together."""

    def __init__(self, limit: int) -> None:
        self.left = limit


@final
class Session:
    """Both ends of all streams of one connection, seen from one side."""

    def __init__(
        self,
        *,
        dialer: bool,
        limits: Limits,
        credit: Credit | None = None,
        turned_away: Callable[[str], object] = lambda limit: None,
    ) -> None:
        """``turned_away`` is told the name of each limit that the peer ran into."""
        self.streams: dict[int, Stream] = {}
        self.drained: list[Stream] = []
        """Streams whose pending data ``fill`` finished; the caller empties this."""
        self.behind: memoryview = _NOTHING
        """The rest of the last frame that ``fill`` wrote: it leaves before anything else."""
        self.remote_gone: int | None = None
        self._limits = limits
        self._next_id = 1 if dialer else 2
        self._remote_parity = 0 if dialer else 1
        self._inbound = 0
        self._control: deque[bytes] = deque()
        self._unhurried: deque[bytes] = deque()  # goes with the next frame of any kind, wakes nobody
        self._ready: deque[Stream] = deque()
        self._extra_credit = 0
        self._host_credit = credit or Credit(limits.host_window_budget)
        self._turned_away = turned_away
        self._promised = INITIAL_WINDOW
        self._agreed = INITIAL_WINDOW
        # parser state: a header cut in two, or a data frame of which `_body` bytes are to come
        self._partial = b""
        self._body = 0
        self._body_stream: Stream | None = None
        self._body_flags = 0

    # what the local side does

    def wants_to_send(self) -> bool:
        """Whether ``fill`` has something to write."""
        return bool(self._control or self._ready)

    def promise(self, window: int) -> None:
        """Our hello, about to be sent, promises ``window``."""
        self._promised = max(self._promised, window)  # a stream may be on its way by an earlier one

    def agree(self, window: int) -> None:
        """The peer's hello promised ``window`` (hostile values are clamped)."""
        self._agreed = max(INITIAL_WINDOW, min(window, self._promised))

    def open(self) -> Stream:
        """A new stream; its SYN leaves with its first frame."""
        if self.remote_gone is not None:
            raise RemoteError("the peer takes no more streams on this connection")
        if len(self.streams) - self._inbound >= self._limits.outbound_streams:
            raise LocalError(f"more than {self._limits.outbound_streams} streams opened on one connection")
        if self._next_id > MAX_WINDOW:
            raise RemoteError("the connection has used up its stream ids")
        stream = Stream(self._next_id, inbound=False)
        self._next_id += 2
        self.streams[stream.id] = stream
        extra = self._agreed - INITIAL_WINDOW
        # Half the budget is for streams that the peer opens with the same rule.
        if extra and extra <= min(
            self._limits.window_budget // 2 - self._extra_credit, self._host_credit.left
        ):
            self._lift(stream, extra)
            stream.send_window += extra
            self._unhurried.append(HEADER.pack(0, WINDOW_UPDATE, SYN, stream.id, extra))
        else:
            stream.first_flags = SYN
        return stream

    def send(self, stream: Stream, buffers: Iterable[memoryview]) -> None:
        """Queue bytes; they must not change until the stream shows up in ``drained``."""
        if stream.fin_sent or stream.fin_pending:
            raise LocalError("data after the end of a stream")
        for buffer in buffers:
            if buffer.nbytes:
                stream.pending.append(buffer)
                stream.pending_bytes += buffer.nbytes
        self._enqueue(stream)

    def close_sending(self, stream: Stream) -> None:
        """End our direction, behind what is pending."""
        if stream.fin_sent or stream.reset:
            return
        if stream.pending_bytes:
            stream.fin_pending = True
            return
        stream.fin_sent = True
        frame = HEADER.pack(0, WINDOW_UPDATE, self._flags(stream) | FIN, stream.id, 0)
        if stream.fin_received and not stream.inbound:
            self._unhurried.append(frame)  # the peer has answered and ended: it waits for nothing
        else:
            self._control.append(frame)
        if stream.fin_received:
            self._forget(stream)

    def abandon(self, stream: Stream) -> None:
        """The user of a stream left: end our direction, skip what may still arrive."""
        self.close_sending(stream)
        stream.discarding = True
        if stream.inbox_bytes and not stream.fin_received:
            self.reset(stream)  # the peer is still sending to nobody; say so
        stream.inbox.clear()
        stream.inbox_bytes = 0

    def reset(self, stream: Stream) -> None:
        """Drop a stream at once, pending data included."""
        if stream.reset or self.streams.get(stream.id) is not stream:
            return
        if stream.first_flags != SYN:  # else the peer has never heard of it
            self._control.append(HEADER.pack(0, WINDOW_UPDATE, RST, stream.id, 0))
        self._drop(stream)

    def take(self, stream: Stream, limit: int) -> bytes | memoryview | bytearray:
        """Up to ``limit`` bytes that have arrived, without a copy where one piece suffices."""
        piece = stream.inbox[0]
        size = len(piece)
        if size <= limit:
            stream.inbox.popleft()
        else:
            view = memoryview(piece)
            stream.inbox[0] = view[limit:]
            piece, size = view[:limit], limit
        self._consumed(stream, size)
        return piece

    def pour(self, stream: Stream) -> None:
        """Copy what has arrived into the target, and into those that follow it."""
        inbox = stream.inbox
        while inbox and stream.target:
            piece = inbox[0]
            size = min(len(piece), len(stream.target))
            view = memoryview(piece)
            stream.target[:size] = view[:size]
            if size == len(piece):
                inbox.popleft()
            else:
                inbox[0] = view[size:]
            self._advance(stream, size)

    def grow(self, stream: Stream, window: int) -> None:
        """Let the peer have up to ``window`` under way, as far as the budget allows."""
        extra = min(window, self._limits.big_window) - stream.window_size
        extra = min(extra, self._limits.window_budget - self._extra_credit, self._host_credit.left)
        # A stream that left the table (it or the connection ended) gives no credit back any more.
        if extra > 0 and not stream.fin_received and self.streams.get(stream.id) is stream:
            self._lift(stream, extra)
            self._push(HEADER.pack(0, WINDOW_UPDATE, self._flags(stream), stream.id, extra))

    def ping(self, value: int) -> None:
        """Ask for an echo of a 32-bit value."""
        self._push(HEADER.pack(0, PING, SYN, 0, value))

    def go_away(self, code: int = 0) -> None:
        """Tell the peer that no more streams are accepted."""
        self._control.append(HEADER.pack(0, GO_AWAY, 0, 0, code))

    def close(self) -> None:
        """The connection ended: its credit is free for others."""
        self._host_credit.left += self._extra_credit
        self._extra_credit = 0
        self.streams.clear()

    def fill(self, record: memoryview, beyond: int = 0) -> int:
        """Write the next frames into ``record``; how many bytes of it were used.

        ``beyond``: of a long piece of data so many bytes more may be left in ``behind``, to follow at once.
        """
        used = 0
        size = HEADER.size
        capacity = len(record)
        self.behind = _NOTHING
        while self._unhurried and used + size <= capacity:
            record[used : used + size] = self._unhurried.popleft()
            used += size
        while self._control and used + size <= capacity:
            record[used : used + size] = self._control.popleft()
            used += size
        ready = self._ready
        while ready and not self.behind:
            stream = ready[0]
            room = capacity - used - size
            wanted = min(stream.pending_bytes, stream.send_window)
            if wanted > room and room < MIN_DATA_ROOM:
                break
            ready.popleft()
            stream.queued = False
            place = used
            used += size
            left = min(wanted, room)
            while left:
                piece = self._take_pending(stream, left)
                record[used : used + len(piece)] = piece
                used += len(piece)
                left -= len(piece)
            amount = used - place - size
            if wanted > amount and beyond:
                self.behind = self._take_pending(stream, min(beyond, wanted - amount))
                amount += len(self.behind)
            stream.send_window -= amount
            flags = self._flags(stream)
            # A FIN behind data has a frame of its own: js-libp2p takes the flags of a frame before its data
            # and drops data that comes with the end.
            ends = stream.fin_pending and not stream.pending_bytes
            if ends and not amount:
                flags |= FIN
                stream.fin_sent = True
                if stream.fin_received:
                    self._forget(stream)
            HEADER.pack_into(record, place, 0, DATA, flags, stream.id, amount)
            if stream.pending_bytes:
                self._enqueue(stream)
            else:
                self.drained.append(stream)
                if ends and not stream.fin_sent:
                    stream.queued = True
                    ready.appendleft(stream)
        return used

    def _take_pending(self, stream: Stream, most: int) -> memoryview:
        """Up to ``most`` bytes of the first piece that waits to be sent."""
        piece = stream.pending[0]
        if len(piece) <= most:
            stream.pending.popleft()
        else:
            stream.pending[0] = piece[most:]
            piece = piece[:most]
        stream.pending_bytes -= len(piece)
        return piece

    # what the peer does

    def receive(self, data: memoryview) -> list[YamuxEvent]:
        """Bytes from the peer, cut anywhere; nothing of ``data`` is kept."""
        events: list[YamuxEvent] = []
        offset, end = 0, len(data)
        while offset < end:
            if self._body:
                size = min(self._body, end - offset)
                self._body -= size
                stream = self._body_stream
                if stream is not None:
                    self._deliver(stream, data[offset : offset + size])
                    if not self._body and self._body_flags:
                        self._flagged(stream, self._body_flags)
                    if not stream.target or self._body_flags:
                        events.append(Changed(stream))
                offset += size
                continue
            if not self._partial and end - offset >= HEADER.size:
                version, kind, flags, stream_id, length = HEADER.unpack_from(data, offset)
                offset += HEADER.size
            else:
                need = HEADER.size - len(self._partial)
                self._partial += bytes(data[offset : offset + need])
                if len(self._partial) < HEADER.size:
                    break
                offset += need
                version, kind, flags, stream_id, length = HEADER.unpack(self._partial)
                self._partial = b""
            if version != 0:
                raise RemoteError(f"yamux version {version}")
            self._frame(kind, flags, stream_id, length, events)
        return events

    def place(self, size: int) -> memoryview | None:
        """Where the peer's next bytes belong, ``size`` of them at least, if all those are waited for.

        However many are put there, up to all, are then ``placed``.
        """
        stream = self._body_stream
        if stream is None or size > self._body or stream.reset or stream.discarding:
            return None
        if not stream.target or len(stream.target) < size:
            return None
        return stream.target[: self._body]

    def placed(self, size: int) -> list[YamuxEvent]:
        """They are there."""
        stream = self._body_stream
        assert stream is not None
        self._body -= size
        stream.inbox_bytes += size
        self._advance(stream, size)
        ended = not self._body and self._body_flags
        if ended:
            self._flagged(stream, self._body_flags)
        return [] if stream.target and not ended else [Changed(stream)]

    def _frame(self, kind: int, flags: int, stream_id: int, length: int, events: list[YamuxEvent]) -> None:
        if kind == PING:
            if flags & SYN:
                self._push(HEADER.pack(0, PING, ACK, 0, length))
            elif flags & ACK:
                events.append(PingAnswered(length))
        elif kind == GO_AWAY:
            self.remote_gone = length
            events.append(WentAway(length))
        elif kind in (DATA, WINDOW_UPDATE):
            stream = self.streams.get(stream_id)
            if flags & SYN:
                if stream is not None or stream_id == 0 or stream_id % 2 != self._remote_parity:
                    raise RemoteError(f"yamux stream id {stream_id} cannot be opened by the peer")
                stream = self._accept(stream_id, length if kind == WINDOW_UPDATE else 0, events)
            if kind == DATA:
                self._data(stream, flags, length, events)
            elif stream is not None:
                self._window_update(stream, flags, length, events)
        else:
            raise RemoteError(f"yamux frame type {kind}")

    def _accept(self, stream_id: int, delta: int, events: list[YamuxEvent]) -> Stream | None:
        if self._inbound >= self._limits.inbound_streams:
            self._turned_away("inbound_streams")
            self._push(HEADER.pack(0, WINDOW_UPDATE, RST, stream_id, 0))
            return None
        stream = Stream(stream_id, inbound=True)
        self._inbound += 1
        self.streams[stream_id] = stream
        extra = min(delta, self._promised - INITIAL_WINDOW)
        if extra > 0:
            if extra > min(self._limits.window_budget - self._extra_credit, self._host_credit.left):
                self._turned_away("window_budget")
                self.reset(stream)
                return None
            self._lift(stream, extra)
        frame = HEADER.pack(0, WINDOW_UPDATE, ACK, stream_id, 0)
        if len(self._unhurried) < UNHURRIED:
            self._unhurried.append(frame)
        else:
            self._push(frame)
        events.append(Opened(stream))
        return stream

    def _data(self, stream: Stream | None, flags: int, length: int, events: list[YamuxEvent]) -> None:
        if stream is not None:
            if stream.fin_received and length:
                raise RemoteError("yamux data behind the end of its stream")
            if length > stream.receive_window:
                raise RemoteError(f"yamux data of {length} bytes in a window of {stream.receive_window}")
            stream.receive_window -= length
            if stream.discarding and length:
                self.reset(stream)
                stream = None
        self._body, self._body_stream, self._body_flags = length, stream, flags
        if stream is not None and not length:
            self._flagged(stream, flags)
            events.append(Changed(stream))

    def _window_update(self, stream: Stream, flags: int, length: int, events: list[YamuxEvent]) -> None:
        stream.send_window += length
        if stream.send_window > MAX_WINDOW:
            raise RemoteError("yamux window beyond 32 bits")
        self._enqueue(stream)
        if flags & (FIN | RST):
            self._flagged(stream, flags)
            events.append(Changed(stream))

    def _deliver(self, stream: Stream, piece: memoryview) -> None:
        if stream.reset or stream.discarding:
            return  # our own reset crossed it
        size = len(piece)
        stream.inbox_bytes += size
        while stream.target:
            size = min(len(piece), len(stream.target))
            stream.target[:size] = piece[:size]
            piece = piece[size:]
            self._advance(stream, size)
            if not piece:
                return
        inbox = stream.inbox
        if inbox and type(inbox[-1]) is bytearray and len(inbox[-1]) < MERGE_BELOW:
            inbox[-1] += piece
        else:
            inbox.append(bytearray(piece))

    def _advance(self, stream: Stream, size: int) -> None:
        """So much more of the target is there."""
        assert stream.target is not None
        stream.target = stream.target[size:]
        self._consumed(stream, size)
        if not stream.target and stream.filled is not None:
            stream.target = stream.filled()

    def _flagged(self, stream: Stream, flags: int) -> None:
        if flags & RST:
            self._drop(stream)
        elif flags & FIN and not stream.fin_received:
            stream.fin_received = True
            if stream.fin_sent:
                self._forget(stream)

    # bookkeeping

    def _flags(self, stream: Stream) -> int:
        flags = stream.first_flags
        stream.first_flags = 0
        return flags

    def _push(self, frame: bytes) -> None:
        """Queue a frame that the peer can cause any number of.

        The frames that end streams (and GOAWAY) are queued without asking: a stream had to be opened
        first, which is bounded here, and code that cleans up must not fail.
        """
        if len(self._control) >= self._limits.queued_frames:
            self._turned_away("queued_frames")
            raise RemoteError("the peer makes us answer but does not read")
        self._control.append(frame)

    def _enqueue(self, stream: Stream) -> None:
        if stream.pending_bytes and stream.send_window and not stream.queued and not stream.reset:
            stream.queued = True
            self._ready.append(stream)

    def _consumed(self, stream: Stream, size: int) -> None:
        stream.inbox_bytes -= size
        stream.consumed += size
        if stream.consumed * 2 >= stream.window_size and not (stream.fin_received or stream.reset):
            self._push(HEADER.pack(0, WINDOW_UPDATE, self._flags(stream), stream.id, stream.consumed))
            stream.receive_window += stream.consumed
            stream.consumed = 0

    def _lift(self, stream: Stream, extra: int) -> None:
        stream.receive_window += extra
        stream.window_size += extra
        self._extra_credit += extra
        self._host_credit.left -= extra

    def _drop(self, stream: Stream) -> None:
        stream.reset = True
        stream.pending.clear()
        stream.pending_bytes = 0
        if stream.queued:
            self._ready.remove(stream)
            stream.queued = False
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        if self.streams.pop(stream.id, None) is stream:
            self._inbound -= stream.inbound
            extra = stream.window_size - INITIAL_WINDOW
            self._extra_credit -= extra
            self._host_credit.left += extra
