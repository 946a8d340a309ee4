"""A donor's line while it gives a state away, in a lab: full, and without a queue before it.

Run as a script this file is one of the three nodes: the donor, the newcomer, and a peer that asks the donor
for a few bytes over and over, as microbatches do.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import trio

from agorad.lab.network import Line, NoLab, Place, lab
from p2p import transport
from p2p.event import Event
from p2p.host import Host
from p2p.identify import ping
from p2p.identity import Identity, PeerId
from p2p.multiaddr import Multiaddr
from stage import donor as donor_module
from stage.donor import PROTOCOL, Donor
from stage.events import StateFetched
from stage.fetch import Fetch, Source
from stage.snapshot import SnapshotStore
from tests.net.test_averager import admit
from tests.net.test_state import Held

MODULE = "tests.net.test_pacing_lab"
PORT = 49200
MBPS = 40.0
DELAY_MS = 10.0
FLOATS = 256 * 8192
STAGE = 1
ALONE_S = 2.0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_line_is_used_and_others_do_not_wait_in_its_queue(tmp_path: Path) -> None:
    # The narrow place is in the net, with a queue of 100 ms, like behind a home's router; a queue of the
    # donor's own machine would be another thing, since the kernel keeps it short by itself. Whoever is behind
    # the narrow place stands for all whom the donor talks to through it.
    lines = [Line(delay_ms=DELAY_MS), Line(down_mbps=MBPS, delay_ms=DELAY_MS)]
    try:
        with lab(lines) as (donor, other):
            paced = downloaded(donor, other, other, "paced")
            free = downloaded(donor, other, other, "free")
    except NoLab as error:
        pytest.skip(str(error))
    print(paced, free)
    alone, under = paced["alone_s"], paced["under_s"]
    assert under - alone < 0.04, paced
    queue_s = free["under_s"] - free["alone_s"]
    assert queue_s < 0.02 or under - alone < 0.6 * queue_s, (paced, free)
    assert paced["seconds"] < 1.3 * free["seconds"], (paced, free)


def downloaded(donor: Place, newcomer: Place, peer: Place, how: str) -> dict[str, float]:
    command = donor.command(sys.executable, "-m", MODULE, "donor", donor.addr, how)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            who = process.stdout.readline().strip()
            asking = peer.command(sys.executable, "-m", MODULE, "peer", peer.addr, donor.addr, who)
            with subprocess.Popen(asking, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peers:
                assert peers.stdout is not None
                assert peers.stdout.readline() == "asking\n"
                words = (sys.executable, "-m", MODULE, "newcomer", newcomer.addr, donor.addr, who)
                taking = newcomer.command(*words)
                done = subprocess.run(taking, capture_output=True, text=True, timeout=90, check=True)
                out, _ = peers.communicate("", timeout=30)
            seen: dict[str, float] = json.loads(done.stdout)
            times: list[tuple[float, float]] = json.loads(out)
            began, ended = seen["began"], seen["ended"]
            alone = [took for at, took in times if at < began]
            under = [took for at, took in times if began + 1.0 < at < ended]
            return {**seen, "alone_s": statistics.median(alone), "under_s": statistics.median(under)}
        finally:
            process.kill()


def member() -> Host:
    host = Host(Identity.generate())
    admit(host, STAGE)
    return host


async def give(addr: str, how: str) -> None:
    tune = transport.tune

    def tune_and_fill(stream: trio.SocketStream) -> None:
        """What nearly all machines have: it fills a queue as far as it goes."""
        tune(stream)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")

    transport.tune = tune_and_fill
    if how == "free":
        donor_module.TICK_S = 1e6
    with tempfile.TemporaryDirectory() as folder:
        store = SnapshotStore(Path(folder))
        store.save(Held(7, floats=FLOATS))
        host = member()

        async def fresh() -> None:
            await trio.lowlevel.checkpoint()

        host.handle(PROTOCOL, Donor(host.identity, store, STAGE, fresh, host.membership).handle)
        async with host.run([Multiaddr.tcp(addr, PORT)]):
            print(host.peer_id, flush=True)
            await trio.sleep(120)


async def take(own: str, addr: str, peer: PeerId) -> None:
    host = member()
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        fetch = Fetch(
            host, STAGE, floats=FLOATS, fingerprint="f" * 64, store=SnapshotStore(Path(folder)),
            emit=events.append,
        )  # fmt: skip
        async with host.run([Multiaddr.tcp(own, 0)]):
            await trio.sleep(ALONE_S)
            began = time.time()
            (await fetch.run([Source(peer, [Multiaddr.tcp(addr, PORT)])])).close()
            ended = time.time()
    last = events[-1]
    assert isinstance(last, StateFetched)
    print(json.dumps({"line_bytes": last.line, "seconds": last.seconds, "began": began, "ended": ended}))


async def ask(own: str, addr: str, peer: PeerId) -> None:
    """Round trips of 32 bytes, each with the time at which it began, until our input ends."""
    host = member()
    times: list[tuple[float, float]] = []
    async with host.run([Multiaddr.tcp(own, 0)]), trio.open_nursery() as nursery:

        async def until_told() -> None:
            await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()

        connection = await host.connect(peer, addrs=[Multiaddr.tcp(addr, PORT)], deadline=10.0)
        nursery.start_soon(until_told)
        print("asking", flush=True)
        while True:
            times.append((time.time(), await ping(connection, block=bytes(32), deadline=10.0)))
            await trio.sleep(0.02)
    print(json.dumps(times))


if __name__ == "__main__":
    words = sys.argv[2:]
    match sys.argv[1]:
        case "donor":
            trio.run(give, words[0], words[1])
        case "newcomer":
            trio.run(take, words[0], words[1], PeerId(words[2]))
        case _:
            trio.run(ask, words[0], words[1], PeerId(words[2]))
