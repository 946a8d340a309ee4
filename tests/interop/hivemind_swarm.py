"""A hash table of hivemind on this machine, measured as ``agoractl bench dht`` measures ours.

One process makes the nodes, each of which is two more of its own: hivemind's node and the libp2p daemon
beside it. Times are taken inside the node's process, so that hivemind's pipe to it costs nothing here. Its
records are not signed and its peers anybody; ours are signed and members of a run.

``python hivemind_swarm.py PEERS RUNS`` writes one JSON document.
"""

from __future__ import annotations

import functools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import hivemind
from hivemind.utils.timed_storage import get_dht_time

LOCAL = ["/ip4/127.0.0.1/tcp/0"]


async def store(_dht: Any, node: Any, key: str) -> tuple[float, bool]:
    began = time.perf_counter()
    value = (key.encode() * 128)[:128]
    done = await node.store(key, value, get_dht_time() + 900, subkey=str(node.peer_id))
    return (time.perf_counter() - began) * 1e3, bool(done)


async def get(_dht: Any, node: Any, key: str) -> tuple[float, bool]:
    began = time.perf_counter()
    found = await node.get(key, latest=True)
    taken = (time.perf_counter() - began) * 1e3
    values = [] if found is None else [entry.value for entry in found.value.values()]
    return taken, values == [(key.encode() * 128)[:128]]


def private(pid: int) -> float:
    """Megabytes of a process that it shares with nobody, and its part of what it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError("a kernel that does not say Pss")


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def main(peers: int, runs: int) -> None:
    nodes: list[Any] = []
    joins: list[float] = []
    for number in range(peers):
        began = time.perf_counter()
        first = nodes[0].get_visible_maddrs() if nodes else ()
        nodes.append(hivemind.DHT(initial_peers=first, host_maddrs=LOCAL, start=True))
        if number:
            joins.append((time.perf_counter() - began) * 1e3)
    stores: list[float] = []
    gets: list[float] = []
    done: list[bool] = []
    for run in range(runs + 1):
        rng = random.Random(run)
        for writer, node in enumerate(nodes):
            key = f"bench/{run}/{writer}"
            reader = nodes[(writer + rng.randrange(1, peers)) % peers]
            for times, who, what in ((stores, node, store), (gets, reader, get)):
                taken, good = who.run_coroutine(functools.partial(what, key=key))
                if run:
                    times.append(taken)
                    done.append(good)
    sizes = [private(node.pid) + sum(private(child) for child in children(node.pid)) for node in nodes]
    print(
        json.dumps(
            {
                "peers": peers,
                "join_ms": {"p50": statistics.median(joins)},
                "store_ms": {"p50": statistics.median(stores)},
                "get_ms": {"p50": statistics.median(gets)},
                "success": sum(done) / len(done),
                "pss_mb": statistics.median(sizes),
            }
        ),
        flush=True,
    )
    for node in nodes:
        node.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # hivemind's threads may wait for daemons that are gone
