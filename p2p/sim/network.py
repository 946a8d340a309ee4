"""A network in memory, in virtual time: what the sans-IO cores and their shells are tested on.

Hosts have IPv4 addresses; a stream between two of them behaves like TCP seen from above: in order,
nothing lost, back-pressure. Bytes leave at the sender's uplink rate (shared by its streams), arrive a
latency later (plus jitter, plus a retransmission where a segment is lost) and wait while a partition
lasts. No background tasks: each chunk carries its arrival time and the reader sleeps until then, so
that trio's autojump clock skips whatever nobody waits for.

``crash`` is a machine that vanishes: nothing of it is heard any more, not even an end of stream.
``kill`` is a process that dies: its peers see their streams break.

All randomness comes from the seed; see ``p2p.sim.replay`` for what else a replay needs.
Limits: ``BUFFER`` bytes a stream and direction between ``send_all`` and ``receive_some``.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections import deque
from collections.abc import Iterable
from typing import final

import attrs
import trio

from p2p.errors import DialError, LocalError
from p2p.event import Emit, ignore
from p2p.host import Host
from p2p.identity import Identity
from p2p.limits import Limits
from p2p.multiaddr import Multiaddr
from p2p.transport import Accept

BUFFER = 256 * 1024
SEGMENT = 64 * 1024
RETRANSMIT_S = 0.2
EPOCH = 1_700_000_000.0
"""Unix time of the simulation's second 0."""


@attrs.frozen(kw_only=True)
class Link:
    """One host's access line; a pair's latency is half of each end's."""

    latency_s: float = 0.02
    """One way, between two hosts of this kind."""
    jitter_s: float = 0.0
    bytes_per_s: float = 25e6
    loss: float = 0.0
    """Part of 64 KiB segments that arrive a retransmission late."""


@final
class SimNetwork:
    """All hosts, lines and partitions of one simulation."""

    def __init__(self, seed: int = 0, link: Link = Link()) -> None:
        self.rng = random.Random(f"network {seed}")
        self._seed = seed
        self._default = link
        self._links: dict[str, Link] = {}
        self._free_at: dict[str, float] = {}
        self._listeners: dict[tuple[str, int], _SimListener] = {}
        self._streams: list[SimStream] = []
        self._gone: set[str] = set()
        self._islands: dict[str, int] = {}
        self._changed = trio.Event()
        self._next_port = 40_000

    # what tests do

    def transport(self, ip: str) -> SimTransport:
        """What the host at ``ip`` dials and listens with."""
        return SimTransport(self, ip)

    def clock(self) -> float:
        """The wall clock of all hosts."""
        return EPOCH + trio.current_time()

    def identity(self, name: str) -> Identity:
        """The identity that this seed gives to a name."""
        return Identity.generate(hashlib.sha256(f"{self._seed} {name}".encode()).digest())

    def host(self, ip: str, *, emit: Emit = ignore, limits: Limits = Limits()) -> Host:
        """A host at ``ip``, with identity, keys and randomness from the seed."""
        secret = random.Random(f"keys {self._seed} {ip}")
        return Host(
            self.identity(ip),
            transport=self.transport(ip),
            emit=emit,
            clock=self.clock,
            rng=random.Random(f"host {self._seed} {ip}"),
            entropy=secret.randbytes,
            limits=limits,
        )

    def set_link(self, ip: str, link: Link) -> None:
        """Change one host's line."""
        self._links[ip] = link

    def partition(self, *islands: Iterable[str]) -> None:
        """Hosts of different islands hear nothing of each other; hosts not named form one more."""
        self._islands = {ip: number for number, island in enumerate(islands, 1) for ip in island}
        self._notify()

    def heal(self) -> None:
        """One network again; what was sent meanwhile arrives."""
        self.partition()

    def crash(self, ip: str) -> None:
        """The machine is gone without a word."""
        self._gone.add(ip)
        self._notify()

    def kill(self, ip: str) -> None:
        """The process is gone: its streams break, its ports are closed."""
        for stream in self._streams:
            if stream.local == ip:
                stream.abort()
        for key in [key for key in self._listeners if key[0] == ip]:
            del self._listeners[key]

    def revive(self, ip: str) -> None:
        """A crashed machine is back; its old streams are broken."""
        self.kill(ip)
        self._gone.discard(ip)
        self._notify()

    # what transports and streams do

    def reachable(self, one: str, other: str) -> bool:
        if one in self._gone or other in self._gone:
            return False
        return self._islands.get(one, 0) == self._islands.get(other, 0)

    async def wait_reachable(self, one: str, other: str) -> None:
        while not self.reachable(one, other):
            await self._changed.wait()

    @property
    def changed(self) -> trio.Event:
        return self._changed

    def latency(self, one: str, other: str) -> float:
        ends = (self._links.get(one, self._default), self._links.get(other, self._default))
        jitter = sum(end.jitter_s for end in ends) / 2
        return sum(end.latency_s for end in ends) / 2 + (self.rng.uniform(0, jitter) if jitter else 0.0)

    def schedule(self, sender: str, receiver: str, size: int) -> tuple[float, float]:
        """When ``size`` bytes have left the sender, and when they arrive."""
        link = self._links.get(sender, self._default)
        sent = max(trio.current_time(), self._free_at.get(sender, 0.0)) + size / link.bytes_per_s
        self._free_at[sender] = sent
        arrives = sent + self.latency(sender, receiver)
        if link.loss and self.rng.random() < link.loss:
            arrives += RETRANSMIT_S
        return sent, arrives

    def connect(self, one: str, other: str) -> tuple[SimStream, SimStream]:
        first, second = SimStream(self, one, other), SimStream(self, other, one)
        first.pair(second)
        self._streams += (first, second)
        return first, second

    def forget(self, stream: SimStream) -> None:
        if stream in self._streams:
            self._streams.remove(stream)

    def bind(self, ip: str, port: int) -> _SimListener:
        if port == 0:
            self._next_port += 1
            port = self._next_port
        if (ip, port) in self._listeners:
            raise LocalError(f"cannot listen on /ip4/{ip}/tcp/{port}: address already in use")
        listener = self._listeners[ip, port] = _SimListener(self, ip, port)
        return listener

    def listener(self, ip: str, port: int) -> _SimListener | None:
        return self._listeners.get((ip, port))

    def unbind(self, listener: _SimListener) -> None:
        if self._listeners.get((listener.ip, listener.port)) is listener:
            del self._listeners[listener.ip, listener.port]

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


@final
class SimTransport:
    """``p2p.transport.Transport`` of one simulated host."""

    def __init__(self, network: SimNetwork, ip: str) -> None:
        self._network = network
        self._ip = ip

    def speaks(self, addr: Multiaddr) -> bool:
        return addr.port is not None and addr.port > 0

    async def dial(self, addr: Multiaddr) -> trio.abc.Stream:
        ip, port = addr.host or "", addr.port or 0
        await self._network.wait_reachable(self._ip, ip)
        await trio.sleep(2 * self._network.latency(self._ip, ip))
        await self._network.wait_reachable(self._ip, ip)
        listener = self._network.listener(ip, port)
        if listener is None:
            raise DialError(f"{addr}: connection refused")
        ours, theirs = self._network.connect(self._ip, ip)
        listener.push(theirs)
        return ours

    async def listen(self, addr: Multiaddr) -> _SimListener:
        await trio.lowlevel.checkpoint()
        ip = self._ip if addr.host in (None, "0.0.0.0") else addr.host
        return self._network.bind(ip or self._ip, addr.port or 0)


@final
class _SimListener:
    def __init__(self, network: SimNetwork, ip: str, port: int) -> None:
        self.ip = ip
        self.port = port
        self._network = network
        self._waiting: deque[SimStream] = deque()
        self._arrived = trio.Event()

    @property
    def addr(self) -> Multiaddr:
        return Multiaddr.tcp(self.ip, self.port)

    def push(self, stream: SimStream) -> None:
        self._waiting.append(stream)
        self._arrived.set()

    async def serve(self, accept: Accept) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                while self._waiting:
                    stream = self._waiting.popleft()
                    nursery.start_soon(accept, stream, str(Multiaddr.tcp(stream.remote, 1)))
                self._arrived = trio.Event()
                await self._arrived.wait()

    async def aclose(self) -> None:
        self._network.unbind(self)
        await trio.lowlevel.checkpoint()


@final
class SimStream(trio.abc.HalfCloseableStream):
    """One end of a simulated TCP connection."""

    def __init__(self, network: SimNetwork, local: str, remote: str) -> None:
        self.local = local
        self.remote = remote
        self._network = network
        self._peer: SimStream = self
        self._arriving: deque[tuple[float, bytes]] = deque()  # b"" is the end
        self._unread = 0
        self._last_arrival = 0.0
        self._wake = trio.Event()
        self._room = trio.Event()
        self._broken = False
        self._closed = False
        self._eof_sent = False
        self._sending = False
        self._receiving = False

    def pair(self, peer: SimStream) -> None:
        self._peer, peer._peer = peer, self

    def abort(self) -> None:
        """Break both ends, as a reset does."""
        for end in (self, self._peer):
            end._broken = True
            end._signal()

    def _signal(self) -> None:
        self._wake.set()
        self._room.set()

    def _check_sending(self) -> None:
        if self._closed or self._eof_sent:
            raise trio.ClosedResourceError
        if self._broken or self._peer._closed:
            raise trio.BrokenResourceError("the peer closed the stream")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            self._check_sending()
            view = memoryview(data)
            for start in range(0, len(view), SEGMENT):
                piece = bytes(view[start : start + SEGMENT])
                sent_at = self._peer._put(piece)
                if sent_at > trio.current_time():
                    await trio.sleep_until(sent_at)
                while self._peer._unread > BUFFER:
                    self._check_sending()
                    self._room = trio.Event()
                    await self._room.wait()
                self._check_sending()
        finally:
            self._sending = False

    def _put(self, piece: bytes) -> float:
        """Called by the sender on the receiving end; when the piece has left."""
        sent, arrives = self._network.schedule(self.remote, self.local, len(piece))
        self._last_arrival = max(arrives, self._last_arrival)
        self._arriving.append((self._last_arrival, piece))
        self._unread += len(piece)
        self._wake.set()
        return sent

    async def wait_send_all_might_not_block(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        await trio.lowlevel.checkpoint()
        self._check_sending()

    async def send_eof(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError
        if not self._eof_sent:
            self._eof_sent = True
            self._peer._put(b"")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError
                if self._broken:
                    raise trio.BrokenResourceError("the stream was reset")
                if self._arriving and self._network.reachable(self.local, self.remote):
                    at, piece = self._arriving[0]
                    if at <= trio.current_time():
                        return self._take(piece, max_bytes)
                await self._wait()
        finally:
            self._receiving = False

    def _take(self, piece: bytes, max_bytes: int | None) -> bytes:
        if not piece:
            return b""  # the end stays
        taken, rest = (piece, b"") if max_bytes is None else (piece[:max_bytes], piece[max_bytes:])
        if rest:
            self._arriving[0] = (self._arriving[0][0], rest)
        else:
            self._arriving.popleft()
        self._unread -= len(taken)
        self._peer._room.set()
        return taken

    async def _wait(self) -> None:
        """Until something may have changed for the reader."""
        self._wake = trio.Event()
        if not self._network.reachable(self.local, self.remote):
            async with trio.open_nursery() as nursery:
                for event in (self._wake, self._network.changed):
                    nursery.start_soon(_first, event, nursery.cancel_scope)
            return
        with trio.CancelScope(deadline=self._arriving[0][0] if self._arriving else float("inf")):
            await self._wake.wait()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._network.forget(self)
            self._signal()
            if not self._eof_sent:
                self._peer._put(b"")
            self._peer._room.set()
        await trio.lowlevel.checkpoint()


async def _first(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
