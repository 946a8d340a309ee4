"""One peer of ``bench dht``: ``python -m agorad.bench.dht_peer``, told what to do by lines of JSON on stdin.

The first is its spec; then ``{"seeds": [address]}`` has it join, and each further one asks for one thing:
``{"do": "store" | "get", "key": text, "writer": peer id}`` or ``{"do": "size"}``. Host, hello, membership and
table are the daemon's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

import trio

from agorad.bench import member
from agorad.bench.member import say
from p2p.errors import PeerGone
from p2p.identity import PeerId
from p2p.kad.node import Dht
from p2p.multiaddr import Multiaddr

LOCAL: Final = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
TTL_S: Final = 900.0
DEADLINE_S: Final = 10.0
"""Of one store or get; far more than any takes that counts as done."""


def value_of(key: str) -> bytes:
    """What is stored under a key: 128 bytes that a reader knows."""
    return (key.encode() * 128)[:128]


async def peer(spec: dict[str, Any]) -> None:
    host = member.host(spec)
    dht = Dht(host, host.identity)
    say(ready=True)
    seeds = [Multiaddr.parse(text) for text in json.loads(await _line())["seeds"]]
    began = time.perf_counter()
    async with host.run([LOCAL]), trio.open_nursery() as nursery:
        nursery.start_soon(dht.run, [(addr.peer_id, [addr]) for addr in seeds if addr.peer_id is not None])
        await dht.joined.wait()
        say(ms=(time.perf_counter() - began) * 1e3, addr=str(host.addrs[0]), peer=host.peer_id)
        while line := await _line():
            request = json.loads(line)
            if request["do"] == "size":
                say(rss_mb=resident() / 1e6, contacts=len(dht.table))
                continue
            key = request["key"]
            began = time.perf_counter()
            done = await (store if request["do"] == "store" else get)(dht, key, PeerId(request["writer"]))
            say(ms=(time.perf_counter() - began) * 1e3, done=done)
        nursery.cancel_scope.cancel()


async def store(dht: Dht, key: str, writer: PeerId) -> bool:
    """Whether somebody else keeps it, too."""
    return await dht.store(key, writer, value_of(key), ttl=TTL_S, deadline=DEADLINE_S) > 1


async def get(dht: Dht, key: str, writer: PeerId) -> bool:
    """Whether the writer's record was found and is what was stored."""
    try:
        found = (await dht.get(key, deadline=DEADLINE_S)).get(writer)
    except PeerGone:
        return False
    return found is not None and found.value == value_of(key)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _line() -> str:
    return await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)


def main() -> None:
    trio.run(peer, json.loads(sys.stdin.readline()))


if __name__ == "__main__":
    main()
