"""A simulation is a function of its seed: the same seed gives the same trace, to the microsecond.

The trace of a swarm of hosts on the whole stack (dials, handshakes, hello, the hash table, a crash, a
partition) is every event with its time and node, and the bytes that every host moved.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import trio

from p2p.errors import P2PError
from p2p.event import Event, event_fields, event_name
from p2p.kad import Dht
from p2p.membership import Membership, Trust
from p2p.multiaddr import Multiaddr
from p2p.sim import Link, SimNetwork, run

COUNT = 6


def ip(index: int) -> str:
    return f"10.0.0.{index + 1}"


def trace(seed: int) -> list[str]:
    lines: list[str] = []

    async def main() -> None:
        net = SimNetwork(seed, Link(latency_s=0.02, jitter_s=0.02, loss=0.02))
        rng = Random(seed)
        standing = {net.identity(ip(index)).peer_id: "seed" for index in range(COUNT)}
        trust = Trust(run="run", manifest_hash=bytes(32), authorities=frozenset(), standing=standing)
        membership = Membership(trust, lambda: None, net.clock)
        tables: dict[int, Dht] = {}

        async def node(index: int, *, task_status: trio.TaskStatus[None]) -> None:
            def emit(event: Event) -> None:
                now = trio.current_time()
                lines.append(f"{now:.6f} {index} {event_name(type(event))} {event_fields(event)}")

            host = net.host(ip(index), emit=emit)
            host.membership = membership
            dht_rng = Random(rng.getrandbits(32))
            tables[index] = Dht(host, host.identity, clock=net.clock, rng=dht_rng, emit=emit)
            seed_at = (net.identity(ip(0)).peer_id, [Multiaddr.tcp(ip(0), 4000)])
            async with host.run([Multiaddr.tcp(ip(index), 4000)]):
                task_status.started()
                try:
                    await tables[index].run([seed_at] if index else [])
                finally:
                    counters = host.counters
                    lines.append(f"{index} moved {counters.bytes_out} {counters.bytes_in}")

        async def use(index: int) -> None:
            table = tables[index]
            for number in range(4):
                await trio.sleep(rng.uniform(0, 3))
                try:
                    await table.store("k", table.table.own, number, ttl=20.0, deadline=5.0)
                    found = await table.get("k", deadline=5.0)
                    lines.append(f"{index} reads {[record.value for record in found.values()]}")
                except P2PError as error:
                    lines.append(f"{index} {error}")

        with trio.move_on_after(60.0):
            async with trio.open_nursery() as nursery:
                for index in range(COUNT):
                    await nursery.start(node, index)
                for index in range(1, COUNT):
                    nursery.start_soon(use, index)
                await trio.sleep(3.0)
                net.crash(ip(2))
                net.partition([ip(0), ip(1)])
                await trio.sleep(10.0)
                net.heal()
                net.kill(ip(3))

    run(seed, main)
    return lines


def test_the_same_seed_gives_the_same_trace() -> None:
    first = trace(1)
    assert len(first) > 60
    assert first == trace(1)
    assert first != trace(2)


def test_nor_does_it_depend_on_the_process() -> None:
    """Another process has another hash salt and other object addresses."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_replay as t"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program + "; print(*t.trace(1), sep='\\n')"],
            env={**os.environ, "PYTHONHASHSEED": salt},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout
        for salt in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
