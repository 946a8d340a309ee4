"""One secured, multiplexed connection to a peer: the trio shell around Noise records and yamux.

Three tasks. The *reader* takes large reads, decrypts record by record and feeds yamux, which puts data where
it is waited for; records in the middle of such data are decrypted to there at once.
The *writer* sleeps until yamux has something, encrypts up to ``BATCH`` records, long data from where its user
has it, and sends them in one call; batches stay small so that a ping waits behind little. The *keeper* pings:
every 10 s normally (silent for 20 s is gone), every 0.5 s while somebody holds ``watched()`` (silent for 2 s
is gone). A peer that lately took long to answer, on a machine with too much to do, has longer:
``p2p.patience``.

Pings also renew the connection's lease, see ``p2p.lease``.

Where both hellos say that AES is computed in hardware, a writer that has much to send goes over to
AES-256-GCM: an empty record under the first cipher, then all others under the second. Each direction does so
for itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, final

import trio

from p2p import noise
from p2p.counters import Counters
from p2p.door import source_of
from p2p.errors import PeerGone, Refused, RemoteError
from p2p.identity import PeerId, short
from p2p.lease import Lease
from p2p.limits import KIB, Limits
from p2p.membership import Member
from p2p.muxed import MuxedStream
from p2p.path import FILLING, Path
from p2p.patience import Patience
from p2p.secure import Upgraded
from p2p.shaper import Shaper
from p2p.transport import Wire
from p2p.yamux import Changed, Credit, Opened, PingAnswered, Session, Stream, YamuxEvent

BATCH = 4
"""Records encrypted for one send: 256 KiB, 10 ms at 200 Mbit/s."""
RECORD = 2 + noise.MAX_RECORD
READ_SIZE = 16 * RECORD
"""With the beginning of a record that is there already: so reads of much data end where records do. As much
as a millisecond's opening: where processors are short, more has come than one batch until a turn comes."""
BUFFER = READ_SIZE + RECORD
"""Room for what is read or a batch, and an empty record before it."""
SMALL = 8 * KIB
OUTSTANDING_PINGS = 64
COUNT_EVERY = 256 * KIB
"""Bytes from a guest after which it is added up what waits."""
AT_ONCE = 8
"""Streams of one read that may be answered before others have their turn."""
STALL_S = 0.25
"""Waking up this much too late means that we were the ones who were silent."""


def _beyond(room: int) -> int:
    """Bytes of plaintext in the records that fit into ``room`` bytes behind a first one."""
    return max(0, room // RECORD - 1) * noise.MAX_PLAINTEXT


def _missing(begun: bytes) -> int:
    """Bytes without which the record that begins so cannot be opened."""
    return 2 + (begun[0] << 8 | begun[1]) - len(begun) if len(begun) >= 2 else 1


@final
class Scratch:
    """Buffers shared by the connections of one host: an idle connection holds none."""

    def __init__(self) -> None:
        self.plain = memoryview(bytearray(noise.MAX_PLAINTEXT))
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        return self._free.pop() if self._free else memoryview(bytearray(BUFFER))

    def give(self, buffer: memoryview) -> None:
        if len(self._free) < 4:
            self._free.append(buffer)


@final
class Unread:
    """Bytes that guests sent to a host and that no handler took yet."""

    def __init__(self) -> None:
        self.total = 0


@final
class Connection:
    """Streams to one peer. Made by ``Host``; ``run`` works until the connection ends."""

    def __init__(
        self,
        upgraded: Upgraded,
        *,
        dialer: bool,
        limits: Limits,
        clock: Callable[[], float],
        scratch: Scratch,
        serve: Callable[[Connection, MuxedStream], Awaitable[None]],
        serve_now: Callable[[Connection, MuxedStream], bool],
        counters: Counters,
        upload: Shaper,
        download: Shaper,
        credit: Credit,
        unread: Unread,
        addr: str,
    ) -> None:
        self.peer: PeerId = upgraded.secured.peer_id
        self.dialer = dialer
        self.addr = addr
        """The remote address, for people."""
        self.source = source_of(addr)
        """What counts as one place on the net, when places are shared out."""
        self.hello: Any = None
        """What the peer presented in its hello, or None; set by ``p2p.hello``."""
        self.speaks_hello = True
        """False once the peer said that it does not."""
        self.greeted = trio.Event()
        """Set when the hello is over, whatever came of it."""
        self.opened_at = clock()
        self.last_heard = self.opened_at
        """The host's clock when the last bytes arrived."""
        self.closed = trio.Event()
        self.why_closed: str | None = None
        self.aside = False
        """Stands beside the connection that calls use; ``Host.aside``."""
        self.draining = False
        """No new streams of ours: another connection replaces this one."""
        self.member: Member | None = None
        """What the peer proved to be in its hello; None for a guest."""
        self.refusal: Refused | None = None
        """Why the peer's hello made it no member."""
        self.judged_by = b""
        """Hash of the manifest that was in force when the hello was judged."""
        self.rtt: float | None = None
        """Seconds that the last answered ping took."""
        self.fell_silent = False
        """Closed by us since the peer said or took nothing: it may not know, and still be at work for us."""
        self.bytes_out = 0
        self.bytes_in = 0
        self.presented: bytes | None = None
        """The certificate of ours that the peer has seen."""
        self.identifying = trio.Lock()
        self.greeting = trio.Lock()
        self.running: dict[str, int] = {}
        """Handlers at work, by protocol."""
        self._counters = counters
        self._upload = upload
        self._download = download
        self.lease = Lease(clock, limits.lease_s)
        self.limits = limits
        self._clock = clock
        self._stream = upgraded.stream
        self._wire = Wire(upgraded.stream)
        self._sending = upgraded.secured.sending
        self._receiving = upgraded.secured.receiving
        self._aes_promised = False
        """Our hello said that we read AES, and the peer has not begun with it."""
        self._reads_aes = self._writes_aes = False
        self._aes_agreed = False
        """The peer's hello said so and we compute it, and have not begun with it."""
        self._tail = upgraded.ciphertext
        self._first = upgraded.plaintext
        self._unread = unread
        self._own_unread = 0
        self._uncounted = 0
        """Bytes received since ``_own_unread`` was added up."""
        self._patience = Patience()
        self._sending_since: float | None = None
        """When the batch that is with the transport was given to it."""
        self._scratch = scratch
        self._serve = serve
        self._serve_now = serve_now
        peer = self.peer
        self._session = Session(
            dialer=dialer,
            limits=limits,
            credit=credit,
            turned_away=lambda limit: counters.turned_away(limit, peer),
        )
        self._streams: dict[Stream, MuxedStream] = {}
        self._output = trio.Event()
        self._emptied = trio.Event()
        self._watchers = 0
        self._watch_changed = trio.Event()
        self._fillers = 0
        self._control = b""
        """How the kernel found this connection's speed before somebody held ``filling``."""
        self.began = self._heard = trio.current_time()
        self._ping_value = 0
        self._pings: dict[int, tuple[float, float]] = {}
        self._ping_waiters: dict[int, trio.Event] = {}
        self._cancel: trio.CancelScope | None = None

    def __repr__(self) -> str:
        return f"<Connection to {short(self.peer)} at {self.addr}>"

    # for users

    def path(self) -> Path | None:
        """What the kernel knows of the way to this peer; None where it does not say."""
        return self._wire.path()

    def pace(self, rate: float | None) -> None:
        """Send at most ``rate`` bytes a second to this peer from now on; None: as fast as it goes."""
        self._wire.pace(rate)

    @property
    def last_answer(self) -> float:
        """The host's clock when the peer was last heard."""
        return self.last_heard

    @property
    def guest(self) -> bool:
        """Whether the peer came to us and is not known to be a member."""
        return not self.dialer and not self.aside and self.member is None

    @property
    def silence(self) -> float:
        """Seconds since the peer was last heard, on a clock that nobody sets."""
        return trio.current_time() - self._heard

    @property
    def usable(self) -> bool:
        """Whether a new stream may be opened."""
        return not (self.closed.is_set() or self.draining or self._session.remote_gone is not None)

    @property
    def streams(self) -> int:
        """Streams in use, by either side."""
        return len(self._session.streams)

    def open_stream(self) -> MuxedStream:
        """A new stream; nothing is sent before its first data."""
        if self.closed.is_set():
            raise PeerGone(f"the connection to {short(self.peer)} is closed")
        return self._wrap(self._session.open())

    async def ping(self, deadline: float) -> float:
        """Seconds of one round trip; PeerGone when there is no answer within ``deadline`` seconds."""
        if self.closed.is_set():
            raise PeerGone(f"the connection to {short(self.peer)} is closed")
        value = self._send_ping()
        answered = self._ping_waiters[value] = trio.Event()
        asked = trio.current_time()
        try:
            with trio.move_on_after(deadline):
                await answered.wait()
        finally:
            self._ping_waiters.pop(value, None)
        if not answered.is_set() or self.closed.is_set():
            raise PeerGone(f"{short(self.peer)} did not answer a ping")
        return trio.current_time() - asked

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[Connection]:
        """While held, pings go out every 0.5 s and 2 s of silence close the connection."""
        self._watchers += 1
        if self._watchers == 1:
            self._watch_changed.set()
        try:
            yield self
        finally:
            self._watchers -= 1

    @contextmanager
    def filling(self) -> Iterator[None]:
        """While held, this connection fills the line together with others that do.

        BBR, where the system has it, leaves a tenth of a line unused that several connections share; CUBIC
        fills it, and the queue before it, which who waits for answers would feel.
        """
        self._fillers += 1
        if self._fillers == 1:
            self._control = self._wire.controlled(FILLING)
        try:
            yield
        finally:
            self._fillers -= 1
            if self._fillers == 0 and self._control:
                self._wire.controlled(self._control)

    def close(self, why: str) -> None:
        """End it now; streams of both sides fail with PeerGone."""
        if self.why_closed is None:
            self.why_closed = why
        if self._cancel is not None:
            self._cancel.cancel()

    def promise_window(self, window: int) -> None:
        """Our hello is about to promise this window."""
        self._session.promise(window)

    def agree_window(self, window: int) -> None:
        """The peer's hello promised this window."""
        self._session.agree(window)

    def promise_aes(self) -> None:
        """Our hello is about to say that we compute AES in hardware."""
        if not self._reads_aes:
            self._aes_promised = True

    def agree_aes(self) -> None:
        """The peer's hello said so, and it holds here too."""
        if not self._writes_aes:
            self._aes_agreed = True

    # lifecycle

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until the connection ends; never raises for what the peer did."""
        try:
            async with trio.open_nursery() as nursery:
                self._cancel = nursery.cancel_scope
                if self.why_closed is not None:
                    self._cancel.cancel()
                nursery.start_soon(self._guard, self._read, nursery)
                nursery.start_soon(self._guard, self._write, nursery)
                nursery.start_soon(self._guard, self._keep, nursery)
                task_status.started()
        finally:
            self.why_closed = self.why_closed or "cancelled"
            self.closed.set()
            self._session.close()
            self._unread.total -= self._own_unread
            self._own_unread = 0
            for stream in list(self._streams.values()):
                stream.lost(self.why_closed)
            for waiter in self._ping_waiters.values():
                waiter.set()
            self._emptied.set()
            await trio.aclose_forcefully(self._stream)

    async def shut_down(self) -> None:
        """Say goodbye, let what is queued leave, close; within ``Limits.close_s``."""
        if not self.closed.is_set():
            self.draining = True
            try:
                self._session.go_away()
                self._wake()
            except RemoteError:
                pass
            with trio.move_on_after(self.limits.close_s / 2):
                while self._session.wants_to_send() and not self.closed.is_set():
                    self._emptied = trio.Event()
                    await self._emptied.wait()
        self.close("closed by this host")

    def replace(self) -> None:
        """Another connection takes over: no new streams here, GOAWAY to the peer."""
        if not self.draining:
            self.draining = True
            self._session.go_away()
            self._wake()

    async def _guard(self, task: Callable[[trio.Nursery], Awaitable[None]], nursery: trio.Nursery) -> None:
        try:
            await task(nursery)
        except RemoteError as error:
            self.close(str(error))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.close("the transport broke")
        except Exception as error:  # a bug of ours must cost one connection, not the host
            self.close(f"internal error: {error!r}")

    # the three tasks

    async def _read(self, nursery: trio.Nursery) -> None:
        if self._first:
            self._dispatch(self._session.receive(memoryview(self._first)), nursery)
        begun = self._open(memoryview(self._tail), nursery)
        while True:
            most = self._download.portion(READ_SIZE)
            await self._wire.readable(most, _missing(begun))
            buffer = self._scratch.take()
            kept = len(begun)
            buffer[:kept] = begun
            size = self._wire.read(buffer[kept : min(kept + most, READ_SIZE)])
            if size:
                self._counters.bytes_in += size
                self.bytes_in += size
                self._heard = trio.current_time()
                self.last_heard = self._clock()
                self._bound_unread(size)
                begun = self._open(buffer[: kept + size], nursery)
            self._scratch.give(buffer)
            if size == 0:
                raise PeerGone("the peer closed the connection")
            await self._download.passage(size or 0)

    def _bound_unread(self, size: int) -> None:
        """Windows bound what one stream holds; this, what all guests' streams do together."""
        self._uncounted += size
        if not (self.guest or self._own_unread) or self._uncounted < COUNT_EVERY:
            return
        self._uncounted = 0
        now = sum(stream.available for stream in self._streams.values()) if self.guest else 0
        self._unread.total += now - self._own_unread
        self._own_unread = now
        if self._unread.total > self.limits.unread and now > COUNT_EVERY:
            self._counters.turned_away("unread", self.peer)
            raise RemoteError("too much of what guests sent waits to be read")

    def _open(self, data: memoryview, nursery: trio.Nursery) -> bytes:
        """Take all whole records in; the beginning of the next one."""
        offset, end = 0, len(data)
        while end - offset >= 2:
            size = data[offset] << 8 | data[offset + 1]
            if size < noise.TAG:
                raise RemoteError(f"a Noise record of {size} bytes")
            stop = offset + 2 + size
            if stop > end:
                break
            size -= noise.TAG
            if size and (target := self._session.place(size)) is not None:
                offset, filled = self._open_into(target, data, offset)
                self._dispatch(self._session.placed(filled), nursery)
                continue
            plain = self._scratch.plain[:size]
            self._receiving.decrypt_into(data[offset + 2 : stop], plain)
            if size:
                self._dispatch(self._session.receive(plain), nursery)
            elif self._aes_promised:
                self._receiving = self._receiving.faster()
                self._aes_promised, self._reads_aes = False, True
            offset = stop
        if self._session.wants_to_send():
            self._wake()
        return bytes(data[offset:])

    def _open_into(self, target: memoryview, data: memoryview, offset: int) -> tuple[int, int]:
        """Decrypt whole records that belong into ``target``, the first one of which is sure to.

        Where the next record begins, and how much of the target is full.
        """
        decrypt_into, last = self._receiving.decrypt_into, len(data) - 2
        filled, room = 0, len(target)
        while offset <= last:
            sealed = data[offset] << 8 | data[offset + 1]
            stop, full = offset + 2 + sealed, filled + sealed - noise.TAG
            if stop > last + 2 or not filled < full <= room:
                break
            decrypt_into(data[offset + 2 : stop], target[filled:full])
            offset, filled = stop, full
        return offset, filled

    def _dispatch(self, events: list[YamuxEvent], nursery: trio.Nursery) -> None:
        at_once = AT_ONCE
        for event in events:
            if isinstance(event, Changed):
                stream = self._streams.get(event.stream)
                if stream is not None:
                    stream.changed()
            elif isinstance(event, Opened):
                opened = self._wrap(event.stream)
                # All that came is parsed by now: a question may be there in full behind its start.
                at_once -= 1
                if at_once < 0 or not self._serve_now(self, opened):
                    nursery.start_soon(self._serve, self, opened)
            elif isinstance(event, PingAnswered):
                self._answered(event.value)

    async def _write(self, _nursery: trio.Nursery) -> None:
        session, plain = self._session, self._scratch.plain
        while True:
            if not session.wants_to_send():
                self._emptied.set()
                await self._output.wait()
                self._output = trio.Event()
                continue
            room = self._upload.portion(BATCH * RECORD)
            size = session.fill(plain, _beyond(room))
            if size <= SMALL and not session.behind and not session.wants_to_send():
                small = memoryview(bytearray(2 + size + noise.TAG))
                self._seal(plain[:size], small)
                self._tell_drained()
                await self._send(small)
                continue
            out = self._scratch.take()
            used = 0
            if self._aes_agreed:
                used += self._seal(plain[:0], out)
                self._sending = self._sending.faster()
                self._aes_agreed, self._writes_aes = False, True
            while True:
                used += self._seal(plain[:size], out[used:])
                behind = session.behind
                while behind:
                    used += self._seal(behind[: noise.MAX_PLAINTEXT], out[used:])
                    behind = behind[noise.MAX_PLAINTEXT :]
                if used + RECORD > room or not session.wants_to_send():
                    break
                size = session.fill(plain, _beyond(room - used))
            self._tell_drained()
            await self._send(out[:used])
            self._scratch.give(out)
            await trio.lowlevel.checkpoint()  # what is to follow is queued meanwhile, and others have a turn

    def _seal(self, plain: memoryview, out: memoryview) -> int:
        """One record of ``plain``; bytes written."""
        sealed = len(plain) + noise.TAG
        out[0] = sealed >> 8
        out[1] = sealed & 0xFF
        self._sending.encrypt_into(plain, out[2 : 2 + sealed])
        return 2 + sealed

    async def _send(self, data: memoryview) -> None:
        await self._upload.passage(len(data))
        self._counters.bytes_out += len(data)
        self.bytes_out += len(data)
        self._sending_since = trio.current_time()
        await self._wire.write(data)
        self._sending_since = None

    def _tell_drained(self) -> None:
        for drained in self._session.drained:
            stream = self._streams.get(drained)
            if stream is not None:
                stream.drained()
        self._session.drained.clear()

    async def _keep(self, _nursery: trio.Nursery) -> None:
        limits = self.limits
        since = trio.current_time()  # silence counts from here at the earliest
        was_watched = False
        while True:
            watched = self._watchers > 0
            now = trio.current_time()
            if watched and not was_watched:
                since = now
            was_watched = watched
            self._send_ping()
            wake_at = now + (limits.watched_ping_s if watched else limits.ping_s)
            with trio.move_on_at(wake_at):
                self._watch_changed = trio.Event()
                await self._watch_changed.wait()
            now = trio.current_time()
            late = now - wake_at
            if late > STALL_S:
                # This process stood still (a long computation, a stopped machine): what the peer said
                # meanwhile is not read yet, so that time proves nothing. What went before it still does,
                # or a host that stalls again and again would never notice a dead peer.
                since = min(now, max(self._heard, since) + late)
            silence = now - max(self._heard, since)
            self._patience.woke(late)
            if silence > self._patience.with_peer(limits.watched_silence_s if watched else limits.silence_s):
                self.fell_silent = True
                raise PeerGone(f"the peer was silent for {silence:.1f} s")
            if self._sending_since is not None:
                stuck = now - max(self._sending_since, since)
                if stuck > limits.stuck_s:
                    self.fell_silent = True
                    raise PeerGone(f"the peer took nothing for {stuck:.1f} s")

    # streams and pings

    def _wake(self) -> None:
        self._output.set()

    def _wrap(self, stream: Stream) -> MuxedStream:
        muxed = MuxedStream(self._session, stream, self._wake, self._streams)
        self._streams[stream] = muxed
        return muxed

    def _send_ping(self) -> int:
        self._ping_value = (self._ping_value + 1) & 0xFFFFFFFF
        if len(self._pings) >= OUTSTANDING_PINGS:
            del self._pings[next(iter(self._pings))]
        self._pings[self._ping_value] = (trio.current_time(), self._clock())
        self._session.ping(self._ping_value)
        self._wake()
        return self._ping_value

    def _answered(self, value: int) -> None:
        asked = self._pings.pop(value, None)
        if asked is not None:
            self.lease.renew(asked)
            now = trio.current_time()
            self.rtt = now - asked[0]
            self._patience.answered(self.rtt, now)
        waiter = self._ping_waiters.pop(value, None)
        if waiter is not None:
            waiter.set()
