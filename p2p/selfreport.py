"""/agora/self/1: what a node answers to the run's listed nodes about itself, and how it is measured.

Served by every node, also on connections aside (``Host.aside``), to seeds, trainers and authorities only.
One stream takes up to 16 requests: ``who`` (the random session of this process, which tells a restart
from a second node with the same key), ``ping`` (8 bytes come back), ``measure`` (bytes one way, as
chunks of 64 KiB; the last request of its stream). No figure is the peer's word: pings carry a nonce,
bytes to the peer are random and each chunk is acknowledged by its hash, bytes from the peer are counted
as they arrive.

Rates: the first quarter of the bytes is left out, so that neither TCP's slow start nor a burst that a
shaper lets through counts. Limits: 16 MB a measurement, one asker at a time, 32 MB a caller and minute, 20 s
a stream.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, final

import trio

from p2p.connection import Connection
from p2p.errors import PeerGone, Refused, RemoteError
from p2p.groups import plain
from p2p.identity import PeerId
from p2p.rpc import Call

PROTOCOL: Final = "/agora/self/1"
SESSION_BYTES: Final = 16
NONCE_BYTES: Final = 8
CHUNK: Final = 64 * 1024
MOST_BYTES: Final = 16_000_000
"""Of one measurement, one way."""
SPEND_LIMIT: Final = 32_000_000
"""Bytes of measurements of one peer in ``COOLDOWN_S``."""
COOLDOWN_S: Final = 60.0
MOST_REQUESTS: Final = 16
SERVE_S: Final = 20.0
SKIPPED: Final = 0.25


@final
class Budget:
    """Bytes that may be spent on each peer: ``SPEND_LIMIT`` in ``COOLDOWN_S``; 4096 peers at most."""

    def __init__(self, limit: int = SPEND_LIMIT, cooldown_s: float = COOLDOWN_S) -> None:
        self._limit = limit
        self._cooldown_s = cooldown_s
        self._spent: OrderedDict[PeerId, tuple[float, int]] = OrderedDict()

    def spend(self, peer: PeerId, size: int) -> None:
        """Refused ("busy") where ``size`` more would be too much by now."""
        now = trio.current_time()
        since, spent = self._spent.get(peer, (now, 0))
        if now - since >= self._cooldown_s:
            since, spent = now, 0
        if spent + size > self._limit:
            left_s = since + self._cooldown_s - now
            raise Refused(
                "busy", f"the line of this node was measured less than {self._cooldown_s:g} s ago", left_s
            )
        self._spent[peer] = (since, spent + size)
        self._spent.move_to_end(peer)
        while len(self._spent) > 4096:
            self._spent.popitem(last=False)


@final
class SelfReport:
    """The server. ``may_ask`` says who may."""

    def __init__(self, session: bytes, may_ask: Callable[[PeerId], bool]) -> None:
        self._session = session
        self._may_ask = may_ask
        self._measuring: list[Connection] = []
        """Of measurements that run. One that its asker gave up on a slow line ends when it hears of it."""
        self._budget = Budget()

    async def serve(self, call: Call) -> None:
        """The handler of ``PROTOCOL``."""
        if not self._may_ask(call.peer):
            raise Refused("not_listed", "only seeds, trainers and authorities of the run may ask this")
        with trio.move_on_after(SERVE_S):
            for answered in itertools.count():
                try:
                    header = (await call.receive()).header
                except PeerGone:
                    return
                kind, nonce = header.get("t"), header.get("nonce")
                if answered == MOST_REQUESTS:
                    raise RemoteError(f"{PROTOCOL}: more than {MOST_REQUESTS} requests")
                if kind == "who":
                    await call.send({"t": "me", "session": self._session})
                elif kind == "ping" and isinstance(nonce, bytes) and len(nonce) == NONCE_BYTES:
                    await call.send({"t": "pong", "nonce": nonce})
                elif kind == "measure":
                    await self._measure(call, header.get("way"), header.get("bytes"))
                    return
                else:
                    raise RemoteError(f"{PROTOCOL}: no request that this node knows")
        raise RemoteError(f"{PROTOCOL}: a stream that took longer than {SERVE_S:g} s")

    async def _measure(self, call: Call, way: object, size: object) -> None:
        if way not in ("in", "out") or type(size) is not int or not 0 < size <= MOST_BYTES:
            raise RemoteError(f"{PROTOCOL}: a measurement is in or out and of 1 to {MOST_BYTES} bytes")
        if any(other is not call.connection for other in self._measuring):
            raise Refused("busy", "somebody else measures the line of this node", 5.0)
        self._budget.spend(call.peer, size)
        self._measuring.append(call.connection)
        try:
            await (_take(call, size) if way == "in" else _give(call, size))
        finally:
            self._measuring.remove(call.connection)


async def _take(call: Call, size: int) -> None:
    left = size
    while left:
        message = await call.receive(max_payload=min(CHUNK, left), ahead=left)
        if not message.payload:
            raise RemoteError(f"{PROTOCOL}: an empty chunk")
        left -= len(message.payload)
        await call.send({"t": "got", "digest": _digest(message.payload)})


async def _give(call: Call, size: int) -> None:
    chunk = memoryview(os.urandom(min(CHUNK, size)))  # random, lest a line compresses it
    left = size
    while left:
        await call.send({"t": "chunk"}, chunk[:left])
        left -= min(left, len(chunk))


# the asking side, each on a call just opened on the connection that is looked at


async def who(call: Call) -> bytes:
    """The session of the process that answers."""
    await call.send({"t": "who"})
    header = (await call.receive()).header
    session = header.get("session")
    if header.get("t") != "me" or not isinstance(session, bytes) or len(session) != SESSION_BYTES:
        raise RemoteError("the node does not say which process it is")
    return session


async def ping(call: Call) -> float:
    """Seconds of one round trip."""
    nonce = os.urandom(NONCE_BYTES)
    began = trio.current_time()
    await call.send({"t": "ping", "nonce": nonce})
    header = (await call.receive()).header
    took = trio.current_time() - began
    if header.get("t") != "pong" or header.get("nonce") != nonce:
        raise RemoteError("the node answered a ping with something else")
    return took


async def push(call: Call, size: int, within_s: float) -> float:
    """Mbit/s of up to ``size`` bytes to the peer, within ``within_s`` seconds."""
    await call.send({"t": "measure", "way": "in", "bytes": size})
    meter = Meter()
    under_way: deque[tuple[int, bytes]] = deque()

    async def send() -> None:
        left = size
        while left:
            chunk = os.urandom(min(CHUNK, left))
            under_way.append((len(chunk), _digest(chunk)))
            left -= len(chunk)
            await call.send({"t": "chunk"}, chunk)

    try:
        with trio.move_on_after(within_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while meter.total < size:
                    header = (await call.receive()).header
                    if not under_way or header.get("t") != "got" or header.get("digest") != under_way[0][1]:
                        raise RemoteError("the node acknowledged bytes that it cannot have received")
                    meter.count(under_way.popleft()[0])
            return meter.mbps()
    except BaseExceptionGroup as group:
        raise plain(group) from None
    call.reset()
    return meter.mbps(trio.current_time())


async def pull(call: Call, size: int, within_s: float) -> float:
    """Mbit/s of up to ``size`` bytes from the peer, within ``within_s`` seconds."""
    await call.send({"t": "measure", "way": "out", "bytes": size})
    meter = Meter()
    with trio.move_on_after(within_s):
        while meter.total < size:
            left = size - meter.total
            message = await call.receive(max_payload=min(CHUNK, left), ahead=left)
            if not message.payload:
                raise RemoteError("the node sent an empty chunk")
            meter.count(len(message.payload))
        return meter.mbps()
    call.reset()
    return meter.mbps(trio.current_time())


@final
class Meter:
    """Turns arrivals into a rate."""

    def __init__(self) -> None:
        self.total = 0
        self._began = trio.current_time()
        self._marks: list[tuple[float, int]] = []

    def count(self, size: int) -> None:
        """``size`` bytes more have arrived."""
        self.total += size
        self._marks.append((trio.current_time(), self.total))

    def mbps(self, end: float | None = None) -> float:
        """Behind the first quarter; to the last arrival, or to ``end`` where the rest did not come."""
        if not self._marks:
            return 0.0
        end = self._marks[-1][0] if end is None else end
        since, skipped = next(mark for mark in self._marks if mark[1] >= SKIPPED * self.total)
        if skipped == self.total:
            since, skipped = self._began, 0
        return (self.total - skipped) * 8 / max(end - since, 1e-6) / 1e6


def _digest(chunk: bytes | memoryview) -> bytes:
    return hashlib.sha256(chunk).digest()[:16]
