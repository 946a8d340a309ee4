"""Swarms of hash table nodes in virtual time, over a network that is one sleep there and one back.

The network here has latency, silent deaths, partitions and guests; what the real one adds is tested with
it. An answer is made in the asker's task, so that a thousand nodes cost minutes. Every run is a function of
its seed.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import attrs
import trio

from p2p.errors import DialError, PeerGone, Refused, RemoteError
from p2p.event import Event
from p2p.identity import Identity, PeerId
from p2p.kad import Dht, KadLimits
from p2p.kad.messages import PROTOCOL
from p2p.kad.record import Record
from p2p.limits import Limits
from p2p.multiaddr import Multiaddr
from p2p.rpc import Message, Packed, pack, whole
from p2p.sim import run

EPOCH = 1_700_000_000.0
LIMITS = Limits()
Responder = Callable[[Any, Message], tuple[dict[str, Any], bytes]]


class FakeCall:
    """The asking side of a stream: ``ask`` carries the question there, has it answered, and comes back."""

    def __init__(self, net: FakeNet, caller: FakeHost, there: FakeHost) -> None:
        self.peer, self.member, self.connection = there.peer_id, there.member or None, self
        self._net, self._caller, self._there = net, caller, there

    async def ask(self, message: Packed, *, max_payload: int = 0) -> Message:
        await self._net.way(self._caller, self._there)
        assert self._there.responder is not None
        asker = FakeConnection(self._caller.peer_id, self._caller.member or None)
        refusal: Refused | None = None
        answer: Message | None = None
        try:
            asked = carried(message, self._there.max_payload)
            answer = carried(pack(*self._there.responder(asker, asked), LIMITS), max_payload)
        except Refused as error:
            refusal = error
        except RemoteError:
            pass
        await self._net.way(self._there, self._caller)
        if refusal is not None:
            raise Refused(refusal.code, refusal.why)
        if answer is None:
            raise PeerGone("reset")
        return answer


@attrs.frozen
class FakeConnection:
    """What an answering node knows of who asks."""

    peer: PeerId
    member: object


def carried(message: Packed, max_payload: int) -> Message:
    """As it comes out of the wire's bytes at the other side."""
    arrived = whole(memoryview(message.wire), 0, PROTOCOL, LIMITS, max_payload)
    assert arrived is not None
    return arrived[0]


class FakeHost:
    def __init__(self, net: FakeNet, identity: Identity, port: int, *, member: bool = True) -> None:
        self.net, self.peer_id, self.member = net, identity.peer_id, member
        self.addrs = self.dialable_addrs = [Multiaddr.tcp("10.0.0.1", port).at(identity.peer_id)]
        self.alive = True
        self.calls = 0
        self.learnt: dict[PeerId, Sequence[Multiaddr]] = {}
        self.limits = LIMITS
        self.dht: Dht | None = None
        self.responder: Responder | None = None
        self.max_payload = 0

    def respond(self, protocol: str, responder: Responder, *, open_to_all: bool, max_payload: int) -> None:
        assert (protocol, open_to_all) == (PROTOCOL, True)
        self.responder, self.max_payload = responder, max_payload

    def gate(self, connection: FakeCall | FakeConnection, _protocol: str) -> None:
        if connection.member is None:
            raise Refused("no_certificate", "guests do not store")

    def keeps(self, key: str, subkey: str, value: Any) -> bool:
        assert self.dht is not None
        record = self.dht.records.get(key, -math.inf).get(subkey)
        return record is not None and record.value == value

    def learn(self, peer: PeerId, addrs: Sequence[Multiaddr]) -> None:
        self.learnt[peer] = addrs

    async def call(self, peer: PeerId, protocol: str, *, addrs: Any = None, deadline: float) -> Any:
        self.calls += 1
        return self.net.open(self, peer, addrs)


class FakeNet:
    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.hosts: dict[PeerId, FakeHost] = {}
        self.silent = True
        """Whether the dead swallow calls (a lost machine) or refuse them (a lost process)."""
        self.sides: dict[PeerId, int] = {}
        """While it is not empty the net is cut between those of different sides."""

    async def way(self, one: FakeHost, other: FakeHost) -> None:
        """From one to the other; nothing arrives where there is no way."""
        await trio.sleep(self.rng.uniform(0.01, 0.06))
        cut = self.sides and self.sides[one.peer_id] != self.sides[other.peer_id]
        if cut or not (one.alive and other.alive):
            if self.silent:
                await trio.sleep_forever()
            raise DialError("connection refused")

    @asynccontextmanager
    async def open(self, caller: FakeHost, peer: PeerId, addrs: Any) -> AsyncIterator[FakeCall]:
        there = self.hosts.get(peer)
        ports = {addr.port for addr in [*(addrs or ()), *caller.learnt.get(peer, ())]}
        if there is None or (ports and there.addrs[0].port not in ports):
            await trio.sleep(0.03)
            raise DialError("somebody else, or nobody, answers there")
        yield FakeCall(self, caller, there)


class Swarm:
    """Nodes 0..n-1, the first of which is everybody's seed."""

    def __init__(self, nursery: trio.Nursery, seed: int, limits: KadLimits = KadLimits()) -> None:
        self.nursery, self.rng, self.limits = nursery, Random(seed), limits
        self.net = FakeNet(self.rng)
        self.nodes: list[Dht] = []
        self.hosts: list[FakeHost] = []
        self.events: list[list[Event]] = []
        self.scopes: list[trio.CancelScope] = []

    def now(self) -> float:
        return EPOCH + trio.current_time()

    def add(self, *, member: bool = True, ahead: float = 0.0) -> Dht:
        identity = Identity.generate(self.rng.randbytes(32))
        host = FakeHost(self.net, identity, 1000 + len(self.nodes), member=member)
        self.net.hosts[identity.peer_id] = host
        events: list[Event] = []
        dht = Dht(
            host,  # type: ignore[arg-type]
            identity,
            clock=lambda: self.now() + ahead,
            rng=Random(self.rng.getrandbits(32)),
            emit=events.append,
            limits=self.limits,
        )
        host.dht = dht
        self.nodes.append(dht)
        self.hosts.append(host)
        self.events.append(events)
        self.scopes.append(trio.CancelScope())
        return dht

    async def start(self, index: int) -> None:
        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            with self.scopes[index]:
                await self.nodes[index].run(self.seeds() if index else [], task_status=task_status)

        await self.nursery.start(run)

    def seeds(self) -> list[tuple[PeerId, list[Multiaddr]]]:
        return [(self.hosts[0].peer_id, [self.hosts[0].addrs[0]])]

    async def grow(self, count: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                self.add()
                nursery.start_soon(self.start, len(self.nodes) - 1)

    def kill(self, index: int) -> None:
        self.hosts[index].alive = False
        self.scopes[index].cancel()

    def alive(self) -> list[int]:
        return [index for index, host in enumerate(self.hosts) if host.alive]


def simulate(seed: int, scenario: Callable[[Swarm], Awaitable[Any]], limits: KadLimits = KadLimits()) -> Any:
    async def main() -> Any:
        async with trio.open_nursery() as nursery:
            result = await scenario(Swarm(nursery, seed, limits))
            nursery.cancel_scope.cancel()
        return result

    return run(seed, main)


async def placed(dht: Dht) -> None:
    """Until all the nodes that should keep what it stored have been told, as far as they can be."""
    while dht.placing:  # noqa: ASYNC110 (of virtual time)
        await trio.sleep(0.02)


async def put(dht: Dht, key: str, value: Any = 1, ttl: float = 60.0) -> int:
    """How many nodes keep it in the end. A store says how many do so far, which may be fewer."""
    so_far = await dht.store(key, dht.table.own, value, ttl=ttl, deadline=5.0)
    await placed(dht)
    host = dht._exchange._host
    assert isinstance(host, FakeHost)
    kept = sum(other.keeps(key, dht.table.own, value) for other in host.net.hosts.values())
    assert 1 <= so_far <= kept
    return kept


def values(records: dict[str, Record]) -> dict[str, Any]:
    return {subkey: record.value for subkey, record in records.items()}
