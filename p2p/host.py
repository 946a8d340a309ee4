"""A host: one identity, its listening addresses, one connection a peer, handlers by protocol.

Theory of operation. ``call`` finds or makes the connection to a peer and opens a stream on it. A
dial races the peer's known addresses, each a little later than the one before; callers that want the
same peer share one dial. Every connection starts with hello (``p2p.hello``) from the dialer; calls
wait for it. When two peers dial each other at once, both keep the connection that the smaller peer id
dialled and drain the other; a connection that comes much later replaces the one it finds, whose peer
must have lost it. Inbound streams are negotiated, gated by membership, and handed to their handler,
each in a task of its connection: when the connection dies, its handlers are cancelled.

A connection *aside* (``Host.aside``) is for looking whether a peer can be reached: it replaces nothing, is
not used by calls, lives for some seconds, is taken from the run's listed nodes only, and serves only what was
registered with ``aside``. Nobody says hello on it.

A handler that raises ``Refused`` answers with it; one that raises RemoteError drops the stream; any
other exception is reported as ``HandlerFailed`` and drops the stream. Nothing a peer does ends the host.

Limits: ``p2p.limits.Limits``. Times that callers give (``deadline``) are seconds from now.
"""

from __future__ import annotations

import os
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import final

import trio

from p2p import hello, identify, multistream
from p2p.connection import Connection, Unread
from p2p.counters import Counters
from p2p.dial import Dialer
from p2p.door import Arrivals, Door, crowding, source_of
from p2p.errors import DialError, LocalError, P2PError, PeerGone, Refused, RemoteError
from p2p.event import Emit, ignore
from p2p.host_events import Connected, Disconnected, HandshakeFailed
from p2p.identity import Identity, PeerId, short
from p2p.limits import Limits
from p2p.multiaddr import Multiaddr
from p2p.rpc import Call
from p2p.sealed import Scratch
from p2p.secure import Entropy, Upgraded, upgrade
from p2p.serving import Entry, Handler, RawHandler, Responder, Server, taking_turns
from p2p.shaper import Shaper
from p2p.transport import Listener, TcpTransport, Transport
from p2p.yamux import Credit

Gate = Callable[[Connection, str], None]

SIMULTANEOUS_S = 3.0
"""Two connections that began within this time come from dialling each other at once."""
DRAIN_S = 10.0


@final
class Host:
    """See the file's opening."""

    def __init__(
        self,
        identity: Identity,
        *,
        transport: Transport | None = None,
        emit: Emit = ignore,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        entropy: Entropy = os.urandom,
        limits: Limits = Limits(),
    ) -> None:
        self.identity = identity
        self.limits = limits
        self.clock = clock
        self.counters = Counters(emit)
        self.upload = Shaper()
        """Cap on what is sent; its rate may be set at any time."""
        self.download = Shaper()
        self.connections: dict[PeerId, Connection] = {}
        self.announce: Sequence[Multiaddr] = ()
        """Addresses to tell others instead of the bound ones."""
        self.reachable: bool | None = None
        """Whether others can dial this host, if somebody found out; told to it by who asked."""
        self.membership: hello.Admission | None = None
        """Who may speak; None (tests, benchmarks) lets everybody."""
        self.gate: Gate = self._member_gate
        """Raises Refused for a stream that may not be; replaceable."""
        self._transport = transport or TcpTransport()
        self._emit = emit
        self._rng = rng or random.Random()
        self._entropy = entropy
        self._server = Server(
            limits, self.counters, emit, lambda connection, protocol: self.gate(connection, protocol)
        )
        self._book: OrderedDict[PeerId, tuple[Multiaddr, ...]] = OrderedDict()
        self._bound: list[Multiaddr] = []
        self._scratch = Scratch()
        self._credit = Credit(limits.host_window_budget)
        self._unread = Unread()
        self._nursery: trio.Nursery | None = None
        self._all: dict[Connection, None] = {}  # ordered, so that simulations replay
        self._door = Door(limits.handshakes)
        self._arrivals = Arrivals(limits.arrivals, limits.arrivals_per_s)
        self._asides = 0
        self._closing = False
        self._dialer = Dialer(self._transport, self._upgrade, limits, self._rng)
        self.handle(hello.PROTOCOL, self._answer_hello, open_to_all=True)
        identify.install(self)

    # addresses

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def addrs(self) -> list[Multiaddr]:
        """Where this host can be reached, each with its peer id."""
        return [addr.at(self.peer_id) for addr in self.announce or self._bound]

    @property
    def dialable_addrs(self) -> list[Multiaddr]:
        """``addrs``, to tell those who would dial them: none if nobody can."""
        return [] if self.reachable is False else self.addrs

    def learn(self, peer_id: PeerId, addrs: Sequence[Multiaddr]) -> None:
        """Remember addresses of a peer, newest first; the book forgets whom it heard of longest ago."""
        if peer_id == self.peer_id:
            return
        fresh = [addr.bare() for addr in addrs if self._transport.speaks(addr)]
        known = dict.fromkeys([*fresh, *self._book.get(peer_id, ())])
        if known:
            self._book[peer_id] = tuple(known)[: self.limits.known_addrs]
            self._book.move_to_end(peer_id)
            while len(self._book) > self.limits.known_peers:
                self._book.popitem(last=False)

    def known(self, peer_id: PeerId) -> tuple[Multiaddr, ...]:
        """Addresses in the book."""
        return self._book.get(peer_id, ())

    # protocols

    def handle(
        self,
        protocol: str,
        handler: Handler,
        *,
        open_to_all: bool = False,
        max_payload: int = 0,
        aside: bool = False,
    ) -> None:
        """Serve ``protocol``. ``max_payload`` is what ``call.receive`` accepts without being told.

        ``aside``: also on connections aside, on which nobody says hello.
        """
        self._server.add(protocol, Entry(handler, open_to_all, max_payload, aside))

    def respond(
        self, protocol: str, responder: Responder, *, open_to_all: bool = False, max_payload: int = 0
    ) -> None:
        """Serve a protocol of one question and one answer, both small, found without waiting."""
        entry = Entry(taking_turns(responder), open_to_all, max_payload, aside=False, responder=responder)
        self._server.add(protocol, entry)

    def handle_stream(self, protocol: str, handler: RawHandler) -> None:
        """Serve a protocol that is not ours as a raw stream, open to all."""
        self._server.add(protocol, handler)

    @property
    def protocols(self) -> list[str]:
        """What this host serves."""
        return self._server.protocols

    async def call(
        self, peer_id: PeerId, protocol: str, *, addrs: Sequence[Multiaddr] | None = None, deadline: float
    ) -> Call:
        """Open a call: ``async with await host.call(...) as call``.

        Dials if need be, at ``addrs`` and what the book knows. ``deadline``: seconds for this step
        (an exchange that follows has the deadline that its user sets). DialError when it fails.
        """
        connection = await self.connect(peer_id, addrs=addrs, deadline=deadline)
        return self.call_on(connection, protocol)

    async def connect(
        self, peer_id: PeerId, *, addrs: Sequence[Multiaddr] | None = None, deadline: float
    ) -> Connection:
        """The connection to a peer, greeted; made if there is none."""
        if peer_id == self.peer_id:
            raise LocalError("a host does not call itself")
        ready = self.connections.get(peer_id)
        if (
            ready is not None
            and ready.usable
            and ready.greeted.is_set()
            and not hello.needed(ready, self.membership)
        ):
            return ready
        with trio.move_on_after(deadline):
            while True:
                connection = self.connections.get(peer_id)
                if connection is None or not connection.usable:
                    await self._dial(peer_id, [*(addrs or ()), *self.known(peer_id)])
                    continue
                with trio.move_on_after(self.limits.hello_s):
                    await connection.greeted.wait()
                connection.greeted.set()  # a dialer that says no hello is waited for once
                if hello.needed(connection, self.membership):
                    async with connection.greeting:
                        if hello.needed(connection, self.membership):
                            await self._greet(connection)
                if connection.usable:
                    return connection
        raise DialError(f"{short(peer_id)} could not be reached within {deadline:g} s")

    @asynccontextmanager
    async def aside(
        self, peer_id: PeerId, addrs: Sequence[Multiaddr], *, deadline: float
    ) -> AsyncIterator[Connection]:
        """A fresh connection to exactly these addresses, for ``call_on``; closed when the block ends.

        It neither uses nor replaces the one that calls use, here and at the peer. Nothing but a
        handshake is sent before the peer proved its id. ``deadline``: seconds for the dial. DialError.
        """
        if self._nursery is None or self._closing:
            raise LocalError("the host does not run")
        upgraded, addr = await self._dialer.dial(peer_id, addrs, aside=True, deadline=deadline)
        connection = self._connection(upgraded, str(addr), dialer=True)
        self._nursery.start_soon(self._live_aside, connection)
        try:
            yield connection
        finally:
            connection.close("what it was made for is done")

    # life

    @asynccontextmanager
    async def run(self, listen: Sequence[Multiaddr] = ()) -> AsyncIterator[Host]:
        """Serve until the block is left. LocalError when an address cannot be bound."""
        if self._nursery is not None:
            raise LocalError("this host runs already")
        listeners: list[Listener] = []
        failure: BaseException | None = None
        try:
            for addr in listen:
                listeners.append(await self._transport.listen(addr))
            self._bound = [listener.addr for listener in listeners]
            self._closing = False
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for listener in listeners:
                    nursery.start_soon(listener.serve, self._accept)
                try:
                    yield self
                except BaseException as error:  # raised again below, not wrapped in a group
                    failure = error
                self._closing = True
                with trio.CancelScope(shield=True), trio.move_on_after(self.limits.close_s):
                    async with trio.open_nursery() as closing:
                        for connection in list(self._all):
                            closing.start_soon(connection.shut_down)
                nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            self._bound = []
            with trio.CancelScope(shield=True):
                for listener in listeners:
                    await listener.aclose()
        if failure is not None:
            raise failure

    # making connections

    async def _dial(self, peer_id: PeerId, addrs: Sequence[Multiaddr]) -> None:
        """Returns once there is a usable connection, whoever made it."""
        if self._nursery is None or self._closing:
            raise LocalError("the host does not run")
        attempt = self._dialer.join(peer_id)
        if attempt is None:
            why = self._dialer.resting(peer_id, addrs, trio.current_time())
            if why is not None:
                await trio.lowlevel.checkpoint()
                raise DialError(why)
            attempt = self._dialer.begin(peer_id)
            self._nursery.start_soon(self._dial_task, peer_id, list(dict.fromkeys(addrs)))
        await attempt.done.wait()
        if attempt.error is not None:
            raise DialError(attempt.error)

    async def _dial_task(self, peer_id: PeerId, addrs: list[Multiaddr]) -> None:
        error: str | None = "cancelled"
        try:
            upgraded, addr = await self._dialer.dial(peer_id, addrs)
            assert self._nursery is not None
            connection = self._adopt(upgraded, str(addr), dialer=True)
            self._nursery.start_soon(self._live, connection)
            self._nursery.start_soon(self._greet, connection)
            self.learn(peer_id, [addr])
            error = None
        except P2PError as failure:
            error = str(failure)
            self._dialer.failed(peer_id, addrs, error, trio.current_time())
        finally:
            self._dialer.end(peer_id, error)

    async def _accept(self, stream: trio.abc.Stream, addr: str) -> None:
        scope = trio.CancelScope()
        full = self._no_room(addr, scope) if not self._closing else None
        if full is not None:
            self.counters.turned_away(full, addr)
        if self._closing or full is not None:
            await trio.aclose_forcefully(stream)
            return
        upgraded = None
        try:
            with scope:
                upgraded = await self._upgrade(stream, None)
        except RemoteError as error:
            self._emit(HandshakeFailed(addr=addr, why=str(error)))
            return
        finally:
            self._door.leave(addr, scope.cancel)
        if upgraded is None:
            self.counters.turned_away("handshakes", addr)
            return
        if upgraded.secured.peer_id == self.peer_id:
            await trio.aclose_forcefully(stream)
            return
        if upgraded.aside:
            await self._live_aside(self._connection(upgraded, addr, dialer=False))
            return
        connection = self._adopt(upgraded, addr, dialer=False)
        self._few_of_a_peer(connection)
        if self.membership is not None and len(self._all) >= self.limits.connections - self.limits.reserved:
            assert self._nursery is not None
            self._nursery.start_soon(self._members_only, connection)
        await self._live(connection)  # returning would close the stream

    def _no_room(self, addr: str, handshake: trio.CancelScope) -> str | None:
        """The limit that keeps a newcomer out, or None: then its handshake has a place at the door."""
        source = source_of(addr)
        if not self._arrivals.admit(source, trio.current_time()):
            return "arrivals"
        if len(self._all) >= self.limits.connections and not self._close_a_guest(source):
            return "connections"
        return None if self._door.enter(addr, handshake.cancel) else "handshakes"

    def _close_a_guest(self, newcomer: str) -> bool:
        """Whether one made room: of the address that has most of them, unless the newcomer's has as many."""
        guests = [one for one in self._all if one.guest] if self.membership is not None else []
        guest = crowding(guests, newcomer)
        if guest is None:
            return False
        self.counters.turned_away("reserved", guest.peer)
        guest.close("no room for guests at the moment")
        self._all.pop(guest, None)
        return True

    def _few_of_a_peer(self, new: Connection) -> None:
        """A peer that connects again and again loses its oldest connection that is being replaced."""
        same = [one for one in self._all if one.peer == new.peer and not one.aside]
        if len(same) >= self.limits.peer_connections:
            self.counters.turned_away("peer_connections", new.peer)
            oldest = next((one for one in same if one.draining), new)
            oldest.close(f"more than {self.limits.peer_connections} connections of one peer")

    async def _members_only(self, connection: Connection) -> None:
        """The last connections are for members: once a hello told that this is a guest, one is closed."""
        with trio.move_on_after(self.limits.hello_s):
            await connection.greeted.wait()
        if not connection.guest or len(self._all) <= self.limits.connections - self.limits.reserved:
            return
        if not self._close_a_guest(connection.source):
            self.counters.turned_away("reserved", connection.peer)
            connection.close("no room for guests at the moment")

    async def _upgrade(
        self, stream: trio.abc.Stream, expected: PeerId | None, aside: bool = False
    ) -> Upgraded:
        """Handshakes within their deadline; the stream is closed when they fail."""
        try:
            with trio.move_on_after(self.limits.handshake_s):
                return await upgrade(
                    stream,
                    self.identity,
                    expected=expected,
                    entropy=self._entropy,
                    dialer=expected is not None,
                    aside=aside,
                )
            raise PeerGone(f"the handshake took longer than {self.limits.handshake_s:g} s")
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise

    def _adopt(self, upgraded: Upgraded, addr: str, *, dialer: bool) -> Connection:
        """Make the connection known; the caller runs it."""
        connection = self._connection(upgraded, addr, dialer=dialer)
        if self.membership is None:
            connection.greeted.set()  # no run, nothing to say or to wait for
        self._settle(connection)
        self._dialer.came(connection.peer)
        return connection

    def _connection(self, upgraded: Upgraded, addr: str, *, dialer: bool) -> Connection:
        return Connection(
            upgraded,
            dialer=dialer,
            limits=self.limits,
            clock=self.clock,
            scratch=self._scratch,
            serve=self._server.serve,
            serve_now=self._server.serve_now,
            counters=self.counters,
            upload=self.upload,
            download=self.download,
            credit=self._credit,
            unread=self._unread,
            addr=addr,
        )

    async def _live_aside(self, connection: Connection) -> None:
        """Like ``_live``, for a while, and nobody is told."""
        connection.aside = True
        if not connection.dialer:
            if self.membership is not None and connection.peer not in self.membership.trust.standing:
                connection.close("connections aside are for listed nodes")
            elif self._asides >= self.limits.asides:
                self.counters.turned_away("asides", connection.peer)
                connection.close("too many connections aside")
        self._asides += not connection.dialer
        self._all[connection] = None
        try:
            with trio.move_on_after(self.limits.aside_s):
                await connection.run()
        finally:
            self._asides -= not connection.dialer
            self._all.pop(connection, None)

    async def _live(self, connection: Connection) -> None:
        self._all[connection] = None
        self._emit(Connected(peer=connection.peer, addr=connection.addr, dialed=connection.dialer))
        try:
            await connection.run()
        finally:
            self._all.pop(connection, None)
            connection.greeted.set()
            if self.connections.get(connection.peer) is connection:
                del self.connections[connection.peer]
            self._emit(Disconnected(peer=connection.peer, why=connection.why_closed or ""))

    def _settle(self, new: Connection) -> None:
        """Decide which connection to a peer is the one that calls use."""
        old = self.connections.get(new.peer)
        assert self._nursery is not None
        if old is None or not old.usable:
            self.connections[new.peer] = new
            if old is not None and not old.draining and not old.closed.is_set():
                # Its peer said goodbye. Most close it then; one that does not must not collect them.
                self._nursery.start_soon(self._drain, old)
            return
        winner, loser = new, old
        if old.dialer != new.dialer and abs(new.opened_at - old.opened_at) < SIMULTANEOUS_S:
            ours_wins = self.peer_id < new.peer
            winner, loser = (new, old) if new.dialer == ours_wins else (old, new)
        self.connections[new.peer] = winner
        self._nursery.start_soon(self._drain, loser)

    async def _drain(self, connection: Connection) -> None:
        connection.replace()
        with trio.move_on_after(DRAIN_S):
            # Grace for a stream that the peer opened before it knew; then until the last one ends.
            await trio.sleep(1.0)
            while connection.streams and not connection.closed.is_set():  # noqa: ASYNC110 (rare, and bounded)
                await trio.sleep(0.25)
        connection.close("replaced by another connection")

    # hello

    async def _greet(self, connection: Connection) -> None:
        """Our hello, as the dialer or because our certificate changed."""
        try:
            if self.membership is not None:
                with trio.move_on_after(self.limits.hello_s):
                    await hello.greet(self.call_on(connection, hello.PROTOCOL), self.membership)
        except P2PError:
            pass  # it stays a guest; what is wrong with the connection shows by itself
        finally:
            connection.greeted.set()

    async def _answer_hello(self, call: Call) -> None:
        try:
            if self.membership is None:
                raise Refused("no_membership", "this node has no run to compare yet")
            await hello.answer(call, self.membership)
        finally:
            call.connection.greeted.set()

    def _member_gate(self, connection: Connection, _protocol: str) -> None:
        if self.membership is not None:
            hello.check_gate(connection, self.membership)

    def call_on(self, connection: Connection, protocol: str) -> Call:
        """Open a call on this very connection."""
        return Call(
            connection,
            connection.open_stream(),
            protocol,
            self.counters,
            prefix=multistream.proposal(protocol),
            confirmation=multistream.Confirmation(protocol),
        )
