"""A thousand nodes in virtual time: they join, store, crash, are cut in two and find each other again.

On two cores that are otherwise idle the thousand take some minutes, the few hundred less than one.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections import Counter
from collections.abc import Iterator

import pytest
import trio

from p2p.errors import P2PError
from tests.sim.kad_swarms import Swarm, put, simulate

DEADLINE_S = 5.0
ROUNDING_S = 1e-6  # two readings of a clock that has counted minutes differ by that of their floats
WAVE = 50
LIFE_S = 3600.0

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]


@pytest.fixture(autouse=True)
def rare_collections() -> Iterator[None]:
    """A thousand nodes are a million objects, and every look through all of them finds next to nothing."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    yield
    gc.set_threshold(*before)
    gc.collect()


async def grown(swarm: Swarm, count: int) -> None:
    while len(swarm.nodes) < count:
        await swarm.grow(min(WAVE, count - len(swarm.nodes)))


async def everybody_writes(swarm: Swarm) -> None:
    """One record of each node, under a key of its own."""
    for first in range(0, len(swarm.nodes), WAVE):
        async with trio.open_nursery() as nursery:
            for index in range(first, min(first + WAVE, len(swarm.nodes))):
                nursery.start_soon(put, swarm.nodes[index], f"key/{index}", index, LIFE_S)


async def found(swarm: Swarm, writers: list[int]) -> tuple[float, float]:
    """The part of these writers' records that random live nodes find, and the slowest read."""
    alive = swarm.alive()
    hits, slowest = 0, 0.0

    async def read(index: int, reader: int) -> None:
        nonlocal hits, slowest
        began = trio.current_time()
        try:
            records = await swarm.nodes[reader].get(f"key/{index}", deadline=DEADLINE_S)
        except P2PError:
            records = {}
        slowest = max(slowest, trio.current_time() - began)
        hits += [record.value for record in records.values()] == [index]

    for first in range(0, len(writers), WAVE):
        async with trio.open_nursery() as nursery:
            for index in writers[first : first + WAVE]:
                others = [node for node in alive if node != index]
                nursery.start_soon(read, index, swarm.rng.choice(others))
    return hits / len(writers), slowest


def hops(swarm: Swarm) -> float:
    """Mean of all reads so far."""
    total: Counter[int] = Counter()
    for node in swarm.nodes:
        total += node.hops
    return sum(depth * count for depth, count in total.items()) / total.total()


@pytest.mark.parametrize(("count", "seed"), [(250, 1), (250, 2), (1000, 3)])
def test_a_swarm_loses_a_third_at_once_and_is_cut_in_two(count: int, seed: int) -> None:
    async def scenario(swarm: Swarm) -> None:
        most_hops = math.log2(count) / 2 + 2
        await grown(swarm, count)
        await everybody_writes(swarm)
        whole, slowest = await found(swarm, list(range(count)))
        assert whole == 1.0
        assert slowest <= DEADLINE_S + ROUNDING_S
        assert hops(swarm) <= most_hops
        for index in swarm.rng.sample(range(1, count), 3 * count // 10):
            swarm.kill(index)
        alive = swarm.alive()
        part, slowest = await found(swarm, alive)
        assert part >= 0.999
        assert slowest <= DEADLINE_S + ROUNDING_S
        assert hops(swarm) <= most_hops
        swarm.net.sides = {host.peer_id: index % 2 for index, host in enumerate(swarm.hosts)}
        _, slowest = await found(swarm, alive[:100])  # those of the other side are taken for dead
        assert slowest <= DEADLINE_S + ROUNDING_S
        await trio.sleep(90.0)
        swarm.net.sides = {}
        await trio.sleep(150.0)
        healed, slowest = await found(swarm, alive)
        assert healed >= 0.999
        assert slowest <= DEADLINE_S + ROUNDING_S
        assert hops(swarm) <= most_hops

    simulate(seed, scenario)


def test_the_same_seed_gives_the_same_events() -> None:
    def digest() -> str:
        async def scenario(swarm: Swarm) -> str:
            await grown(swarm, 150)
            await everybody_writes(swarm)
            for index in swarm.rng.sample(range(1, 150), 45):
                swarm.kill(index)
            await found(swarm, swarm.alive())
            await trio.sleep(60.0)
            text = repr([[repr(event) for event in events] for events in swarm.events])
            return hashlib.sha256(f"{text} {trio.current_time()}".encode()).hexdigest()

        result: str = simulate(7, scenario)
        return result

    assert digest() == digest()
