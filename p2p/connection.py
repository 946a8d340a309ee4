"""One secured, multiplexed connection to a peer: the trio shell around Noise records and yamux.

Three tasks. The *reader* takes large reads and has their records opened for yamux (``p2p.sealed``). The
*writer* sleeps until yamux has something, has a batch of records sealed and sends them in one call; batches
stay small so that a ping waits behind little. The *keeper* pings: every 10 s normally (silent for 20 s is
gone), every 0.5 s while somebody holds ``watched()`` (silent for 2 s is gone). A peer that lately took long
to answer, on a machine with too much to do, has longer: ``p2p.patience``.

Pings also renew the connection's lease, see ``p2p.lease``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, final

import trio

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
from p2p.sealed import BATCH, NEAR_BATCH, READ_SIZE, RECORD, Opener, Scratch, Sealer, missing
from p2p.secure import Upgraded
from p2p.shaper import Shaper
from p2p.transport import Wire
from p2p.yamux import Changed, Credit, Opened, PingAnswered, Session, Stream, YamuxEvent

OUTSTANDING_PINGS = 64
COUNT_EVERY = 256 * KIB
"""Bytes from a guest after which it is added up what waits."""
AT_ONCE = 8
"""Streams of one read that may be answered before others have their turn."""
STALL_S = 0.25
"""Waking up this much too late means that we were the ones who were silent."""
_NOTHING = memoryview(b"")


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
        self._tail = upgraded.ciphertext
        self._first = upgraded.plaintext
        self._unread = unread
        self._own_unread = 0
        self._uncounted = 0
        """Bytes received since ``_own_unread`` was added up."""
        self._patience = Patience()
        self._sending_since: float | None = None
        """When the batch that is with the transport was given to it."""
        self._batch = BATCH
        """Records of one send at most, by how near the peer is; judged with each ping."""
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
        self.opener = Opener(upgraded.secured.receiving, self._session, scratch)
        self.sealer = Sealer(upgraded.secured.sending, self._session, scratch)
        self._streams: dict[Stream, MuxedStream] = {}
        self._output = trio.Event()
        self._emptied = trio.Event()
        self._idle = True
        """The writer has given all to the transport."""
        self._watchers = 0
        self._watch_changed = trio.Event()
        self._fillers = 0
        self._control = b""
        """How the kernel found this connection's speed before somebody held ``filling``."""
        self.began = self._heard = trio.current_time()
        self._ping_value = 0
        self._pings: dict[int, tuple[float, float]] = {}
        self._ping_waiters: dict[int, trio.Event] = {}
        self._nursery: trio.Nursery | None = None

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

        Who waits for answers meanwhile waits in the queue that this makes. For windows that are open: beside
        others CUBIC opens a small one over seconds.
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
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def promise_window(self, window: int) -> None:
        """Our hello is about to promise this window."""
        self._session.promise(window)

    def agree_window(self, window: int) -> None:
        """The peer's hello promised this window."""
        self._session.agree(window)

    # lifecycle

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until the connection ends; never raises for what the peer did."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self.why_closed is not None:
                    nursery.cancel_scope.cancel()
                nursery.start_soon(self._guard, self._read)
                nursery.start_soon(self._guard, self._write)
                nursery.start_soon(self._guard, self._keep)
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
                while (self._session.wants_to_send() or not self._idle) and not self.closed.is_set():
                    self._emptied = trio.Event()
                    await self._emptied.wait()
        self.close("closed by this host")

    def replace(self) -> None:
        """Another connection takes over: no new streams here, GOAWAY to the peer."""
        if not self.draining:
            self.draining = True
            self._session.go_away()
            self._wake()

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except RemoteError as error:
            self.close(str(error))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.close("the transport broke")
        except Exception as error:  # a bug of ours must cost one connection, not the host
            self.close(f"internal error: {error!r}")

    # the three tasks

    async def _read(self) -> None:
        session, opener, dispatch = self._session, self.opener, self._dispatch
        if self._first:
            dispatch(session.receive(memoryview(self._first)))
        begun = opener.open(memoryview(self._tail), dispatch)
        if session.wants_to_send():
            self._wake()
        while True:
            most = self._download.portion(READ_SIZE)
            await self._wire.readable(most, missing(begun))
            buffer = self._scratch.came
            kept = len(begun)
            buffer[:kept] = begun
            size = self._wire.read(buffer[kept : min(kept + most, READ_SIZE)])
            if size:
                self._counters.bytes_in += size
                self.bytes_in += size
                self._heard = trio.current_time()
                self.last_heard = self._clock()
                self._bound_unread(size)
                begun = opener.open(buffer[: kept + size], dispatch)
                if session.wants_to_send():
                    self._wake()
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

    def _dispatch(self, events: list[YamuxEvent]) -> None:
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
                    assert self._nursery is not None
                    self._nursery.start_soon(self._serve, self, opened)
            elif isinstance(event, PingAnswered):
                self._answered(event.value)

    async def _write(self) -> None:
        session, sealer = self._session, self.sealer
        while True:
            if self._wire.rest:
                await self._wire.writable()  # first: what is sealed now would not be sent earlier
                if not session.wants_to_send():
                    await self._send(_NOTHING)
                    continue
            elif not session.wants_to_send():
                self._idle = True
                self._emptied.set()
                await self._output.wait()
                self._output = trio.Event()
                self._idle = False
                continue
            records, buffer = sealer.batch(self._upload.portion(self._batch * RECORD))
            for drained in session.drained:
                stream = self._streams.get(drained)
                if stream is not None:
                    stream.drained()
            session.drained.clear()
            await self._send(records)
            if buffer is not None:
                self._scratch.give(buffer)
                # What is to follow is queued meanwhile, and others have a turn.
                await trio.lowlevel.checkpoint()

    async def _send(self, data: memoryview) -> None:
        await self._upload.passage(len(data))
        self._counters.bytes_out += len(data)
        self.bytes_out += len(data)
        self._sending_since = trio.current_time()
        await self._wire.write(data)
        self._sending_since = trio.current_time() if self._wire.rest else None

    async def _keep(self) -> None:
        limits = self.limits
        since = trio.current_time()  # silence counts from here at the earliest
        was_watched = False
        while True:
            watched = self._watchers > 0
            now = trio.current_time()
            if watched and not was_watched:
                since = now
            was_watched = watched
            path = self.path()
            self._batch = NEAR_BATCH if path is not None and path.near else BATCH
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
