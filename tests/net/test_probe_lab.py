"""Measuring lines whose speed and delay are known, in a lab; skipped, with the reason, where there is none.

Run as a script this file is the two ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from agorad.lab.network import Line, NoLab, Place, lab
from p2p import selfreport
from p2p.host import Host
from p2p.identity import Identity, PeerId
from p2p.multiaddr import Multiaddr
from p2p.probe import Prober
from p2p.selfreport import SelfReport

PORT = 49200
SIZE = 4_000_000
ATTEMPTS = 3
"""A machine that stands still for a moment spoils a measurement."""


@contextmanager
def line(mbps: float, delay_ms: float) -> Iterator[tuple[Place, Place]]:
    """Two places at the ends of a line; ``delay_ms`` one way."""
    end = Line(up_mbps=mbps, delay_ms=delay_ms / 2)
    try:
        with lab([end, end]) as (here, there):
            yield here, there
    except NoLab as error:
        pytest.skip(str(error))


@contextmanager
def node_in(place: Place) -> Iterator[PeerId]:
    command = place.command(sys.executable, __file__, "serve", place.addr)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield PeerId(process.stdout.readline().strip())
        finally:
            process.kill()


def probe_from(place: Place, other: Place, peer: PeerId) -> dict[str, float]:
    command = place.command(sys.executable, __file__, "probe", place.addr, other.addr, peer)
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    seen: dict[str, float] = json.loads(done.stdout)
    return seen


@pytest.mark.parametrize(
    ("mbps", "delay_ms", "low", "high"),
    [
        (50, 40, 40, 55),
        pytest.param(50, 0, 40, 55, marks=pytest.mark.long),
        pytest.param(4, 20, 3.2, 4.4, marks=pytest.mark.long),  # not done in time: what came by then counts
    ],
)
def test_a_line_is_measured_as_it_is(mbps: int, delay_ms: int, low: float, high: float) -> None:
    tried = []
    with line(mbps, delay_ms) as (here, there):
        for _ in range(ATTEMPTS):
            with node_in(there) as peer:  # a new one, since one is not measured again and again
                seen = probe_from(here, there, peer)
            tried.append(seen)
            delayed = 2 * delay_ms - 1 <= seen["rtt_ms"] <= 2 * delay_ms + 20
            if delayed and all(low <= seen[way] <= high for way in ("up_mbps", "down_mbps")):
                return
    raise AssertionError(tried)


async def serve(addr: str) -> None:
    host = Host(Identity.generate())
    report = SelfReport(bytes(16), lambda _peer: True)
    host.handle(selfreport.PROTOCOL, report.serve, open_to_all=True, aside=True)
    async with host.run([Multiaddr.tcp(addr, PORT)]):
        print(host.peer_id, flush=True)
        await trio.sleep(60)


async def look(own: str, addr: str, peer: PeerId) -> None:
    host = Host(Identity.generate())
    async with host.run([Multiaddr.tcp(own, 0)]):
        seen = await Prober(host, lambda _peer: True).probe(peer, [str(Multiaddr.tcp(addr, PORT))], size=SIZE)
        print(json.dumps({name: getattr(seen, name) for name in ("why", "rtt_ms", "up_mbps", "down_mbps")}))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        trio.run(serve, sys.argv[2])
    else:
        trio.run(look, sys.argv[2], sys.argv[3], PeerId(sys.argv[4]))
