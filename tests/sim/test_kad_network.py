"""The hash table on the whole stack (Noise, yamux, hello) over the simulated network."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest
import trio

from p2p.errors import P2PError
from p2p.event import Event
from p2p.host import Host
from p2p.identity import PeerId
from p2p.kad import Dht
from p2p.membership import Membership, Trust
from p2p.multiaddr import Multiaddr
from p2p.sim import Link, SimNetwork, run

PORT = 4000


class Swarm:
    """Nodes 0..n-1 at addresses of their own; the first is everybody's seed."""

    def __init__(self, nursery: trio.Nursery, seed: int) -> None:
        self.net = SimNetwork(seed, Link(latency_s=0.02, jitter_s=0.01))
        self.rng = Random(seed)
        # Everybody is listed, which spares the simulation fifty certificates.
        standing = {self.net.identity(self.ip(index)).peer_id: "seed" for index in range(64)}
        trust = Trust(run="run", manifest_hash=bytes(32), authorities=frozenset(), standing=standing)
        self.membership = Membership(trust, lambda: None, self.net.clock)
        self.nodes: list[Dht] = []
        self.hosts: list[Host] = []
        self.trace: list[tuple[float, int, Event]] = []
        self._nursery = nursery
        self._seed = seed

    @staticmethod
    def ip(index: int) -> str:
        return f"10.0.{index // 250}.{index % 250 + 1}"

    async def add(self) -> None:
        index = len(self.nodes)

        def emit(event: Event) -> None:
            self.trace.append((trio.current_time(), index, event))

        host = self.net.host(self.ip(index), emit=emit)
        host.membership = self.membership
        rng = Random(f"dht {self._seed} {index}")
        self.hosts.append(host)
        self.nodes.append(Dht(host, host.identity, clock=self.net.clock, rng=rng, emit=emit))
        await self._nursery.start(self._run, index)

    async def _run(self, index: int, *, task_status: trio.TaskStatus[None]) -> None:
        seed = Multiaddr.tcp(self.ip(0), PORT)
        seeds: list[tuple[PeerId, list[Multiaddr]]] = [(self.hosts[0].peer_id, [seed])] if index else []
        async with (
            self.hosts[index].run([Multiaddr.tcp(self.ip(index), PORT)]),
            trio.open_nursery() as nursery,
        ):
            await nursery.start(self.nodes[index].run, seeds)
            task_status.started()

    async def grow(self, count: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(self.add)

    async def put(self, index: int, key: str, value: Any) -> int:
        """How many nodes keep it in the end."""
        node = self.nodes[index]
        await node.store(key, node.table.own, value, ttl=600.0, deadline=5.0)
        while node.placing:  # noqa: ASYNC110 (of virtual time)
            await trio.sleep(0.02)
        kept = [other.records.get(key, self.net.clock()).get(node.table.own) for other in self.nodes]
        return sum(record is not None and record.value == value for record in kept)

    async def read(self, index: int, key: str) -> list[Any]:
        return [record.value for record in (await self.nodes[index].get(key, deadline=5.0)).values()]


def simulate(seed: int, scenario: Callable[[Swarm], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with trio.open_nursery() as nursery:
            result = await scenario(Swarm(nursery, seed))
            nursery.cancel_scope.cancel()
        return result

    return run(seed, main)


@pytest.mark.parametrize(
    ("count", "seed"), [(14, 1), pytest.param(50, 2, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
def test_everything_is_found_and_nearly_everything_with_a_third_of_the_nodes_crashed(
    count: int, seed: int
) -> None:
    async def scenario(swarm: Swarm) -> tuple[float, float]:
        await swarm.add()
        while len(swarm.nodes) < count:
            await swarm.grow(min(7, count - len(swarm.nodes)))
        writers = swarm.rng.sample(range(count), count // 2)
        for index in writers:
            assert await swarm.put(index, f"key/{index}", index) >= 8
        alive = list(range(count))

        async def success() -> float:
            reads: list[bool] = []

            async def one(reader: int, index: int) -> None:
                try:
                    reads.append(await swarm.read(reader, f"key/{index}") == [index])
                except P2PError:
                    reads.append(False)

            async with trio.open_nursery() as nursery:
                for index in writers:
                    for reader in swarm.rng.sample(alive, 4):
                        nursery.start_soon(one, reader, index)
            return sum(reads) / len(reads)

        calm = await success()
        for index in swarm.rng.sample(range(count), 3 * count // 10):
            alive.remove(index)
            swarm.net.crash(swarm.ip(index))
        return calm, await success()

    calm, after = simulate(seed, scenario)
    assert calm == 1.0
    assert after >= 0.99


def test_two_halves_of_a_swarm_find_each_other_again() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.add()
        await swarm.grow(5)
        swarm.net.partition([swarm.ip(index) for index in range(3)])
        await trio.sleep(90.0)
        assert await swarm.put(1, "k", "here") == 3
        assert await swarm.put(4, "k", "there") == 3
        assert await swarm.read(2, "k") == ["here"]
        assert await swarm.read(5, "k") == ["there"]
        assert {len(node.table) for node in swarm.nodes} == {2}
        swarm.net.heal()
        await trio.sleep(90.0)
        assert {len(node.table) for node in swarm.nodes} == {5}
        assert await swarm.put(4, "k", "again") == 6
        assert sorted(await swarm.read(2, "k")) == ["again", "here"]

    simulate(2, scenario)


def test_a_node_that_comes_back_at_its_address_is_found() -> None:
    async def scenario(swarm: Swarm) -> None:
        await swarm.add()
        await swarm.grow(5)
        swarm.net.crash(swarm.ip(3))
        await trio.sleep(90.0)
        assert await swarm.put(1, "k", 1) == 5
        assert all(swarm.hosts[3].peer_id not in swarm.nodes[index].table for index in (0, 1, 2, 4, 5))
        swarm.net.revive(swarm.ip(3))
        await trio.sleep(90.0)
        assert all(swarm.hosts[3].peer_id in swarm.nodes[index].table for index in (0, 1, 2, 4, 5))

    simulate(3, scenario)
