"""The hash table over the real host: TCP, Noise, yamux, hello and membership."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from random import Random

import pytest
import trio

from p2p.event import Event
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.kad import Contact, Dht
from p2p.kad.events import RecordRefused
from p2p.kad.messages import PROTOCOL
from p2p.membership import Membership, Trust, issue
from p2p.multiaddr import Multiaddr

ANY = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
AUTHORITY = Identity.generate(b"a" * 32)
SEED = Identity.generate(b"s" * 32)
TRUST = Trust(
    run="run",
    manifest_hash=bytes(32),
    authorities=frozenset({AUTHORITY.peer_id}),
    standing={SEED.peer_id: "seed"},
)


class Node:
    """A host with its table, and what it reported."""

    def __init__(self, identity: Identity, run: str | None, life_s: float) -> None:
        self.events: list[Event] = []
        self.host = Host(identity)
        self.dht = Dht(self.host, identity, rng=Random(1), emit=self.events.append)
        self.scope = trio.CancelScope()
        self.certificate: bytes | None = None
        if run is not None:
            now = time.time()
            self.certificate = issue(
                AUTHORITY, run=run, account="x", peer_id=identity.peer_id, issued=now, expires=now + life_s
            ).encode()
        self.host.membership = Membership(TRUST, lambda: self.certificate, time.time)

    async def run(
        self,
        seeds: list[tuple[PeerId, list[Multiaddr]]],
        listen: Multiaddr = ANY,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with self.scope:
            async with self.host.run([listen]), trio.open_nursery() as nursery:
                await nursery.start(self.dht.run, seeds)
                task_status.started()

    async def put(self, value: object = 1) -> int:
        return await self.dht.store("k", self.host.peer_id, value, ttl=30.0, deadline=5.0)

    async def read(self) -> dict[str, object]:
        return {subkey: record.value for subkey, record in (await self.dht.get("k", deadline=5.0)).items()}


class Swarm:
    """A seed, which is a member by being listed, and workers with certificates."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.nodes: list[Node] = []

    async def add(self, *, run: str | None = "run", life_s: float = 600.0) -> Node:
        seeds = [(SEED.peer_id, self.nodes[0].host.addrs)] if self.nodes else []
        node = Node(Identity.generate() if seeds else SEED, run if seeds else None, life_s)
        await self.nursery.start(node.run, seeds)
        self.nodes.append(node)
        return node


def run(scenario: Callable[[Swarm], Awaitable[None]], count: int) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                swarm = Swarm(nursery)
                for _ in range(count):
                    await swarm.add()
                await scenario(swarm)
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_swarm_finds_its_records_and_goes_on_without_the_seed() -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, one, two, *_, last = swarm.nodes
        assert await one.put(b"x" * 3000) == 5
        for node in swarm.nodes:
            assert await node.read() == {one.host.peer_id: b"x" * 3000}
        bare = tuple(addr.bare() for addr in one.host.addrs)
        assert last.host.known(one.host.peer_id) == bare
        seed.scope.cancel()
        assert await two.put("later") >= 4
        assert len(await last.read()) == 2
        late = await swarm.add()  # its only seed is gone, and it must not fail for that
        assert not late.dht.joined.is_set()

    run(scenario, 5)


def test_a_part_that_looks_around_finds_the_other_by_its_seed() -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, one, two = swarm.nodes
        (addr,) = seed.host.addrs
        seed.scope.cancel()
        await two.put("theirs")
        for _ in range(20):  # until nobody reckons with the seed any more
            if any(SEED.peer_id in node.dht.table for node in (one, two)):
                await one.read()
                await two.read()
        again = Node(SEED, None, 600.0)  # which knows nobody
        await swarm.nursery.start(again.run, [], addr.bare())
        await trio.sleep(0.5)
        assert (await one.read(), await again.read()) == ({two.host.peer_id: "theirs"}, {})
        one.dht.look_around()
        for _ in range(100):
            if not await again.read():
                await trio.sleep(0.05)
        assert await again.read() == {two.host.peer_id: "theirs"}
        nudge = one.dht._nudge
        one.dht.look_around()
        assert not nudge.is_set(), "not again and again"

    run(scenario, 3)


@pytest.mark.parametrize(
    ("belongs", "life_s", "code"),
    [(None, 600.0, "no_certificate"), ("other", 600.0, "wrong_run"), ("run", -120.0, "certificate_expired")],
)
def test_a_store_without_membership_is_refused_with_the_reason(
    belongs: str | None, life_s: float, code: str
) -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.nodes[1].put("public")
        guest = await swarm.add(run=belongs, life_s=life_s)
        assert await guest.read() == {swarm.nodes[1].host.peer_id: "public"}
        assert await guest.put("spam") == 1
        refusals = [event for event in guest.events if isinstance(event, RecordRefused)]
        assert {event.code for event in refusals} == {code}
        assert len(refusals) == 3
        for node in swarm.nodes[:3]:
            assert guest.host.peer_id not in node.dht.table
            assert len(await node.read()) == 1

    run(scenario, 3)


def test_a_guest_that_got_its_certificate_is_welcome_on_the_same_connections() -> None:
    async def scenario(swarm: Swarm) -> None:
        guest = await swarm.add(run=None)
        assert await guest.put() == 1
        now = time.time()
        guest.certificate = issue(
            AUTHORITY,
            run="run",
            account="x",
            peer_id=guest.host.peer_id,
            issued=now,
            expires=now + 60,
        ).encode()
        assert await guest.put() == 4
        assert all(guest.host.peer_id in node.dht.table for node in swarm.nodes[:3])

    run(scenario, 3)


def test_hearsay_addresses_are_tried_and_not_believed() -> None:
    async def scenario(swarm: Swarm) -> None:
        one, two = swarm.nodes[1:3]
        liar = Contact(two.host.peer_id, ("/ip4/127.0.0.1/tcp/1",))
        three = await swarm.add()
        three.host._book.clear()
        await three.dht._exchange.find_node(liar, 0)  # connected already, so the address is never dialled
        assert three.host.known(two.host.peer_id) in [(), tuple(addr.bare() for addr in two.host.addrs)]
        found = three.dht.table.find(two.host.peer_id)
        assert found is not None
        assert found.addrs == tuple(str(addr.bare()) for addr in two.host.addrs)
        assert one.host.peer_id in three.dht.table

    run(scenario, 3)


def test_counters_tell_what_the_hash_table_moved() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.nodes[1].put(b"x" * 1000)
        sent, received = swarm.nodes[1].host.counters.protocols[PROTOCOL]
        assert 2000 < sent < 4000
        assert received < 1000

    run(scenario, 3)
