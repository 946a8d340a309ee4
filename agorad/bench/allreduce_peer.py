"""One member of ``bench allreduce``: ``python -m agorad.bench.allreduce_peer``, told what to do by JSON.

The first line is its spec; then ``{"seeds": [address]}`` has it join the hash table, ``{"mates": {peer:
address}}`` names the members, each ``{"round": number, "seconds": deadline}`` is one round, answered by what
it brought, and ``{"check": true}`` asks what it holds since. Host, hello, membership, table, averager and
reducer are the daemon's.

A member that is to die does so by a timer of the kernel's, set at the roster's commit: no code of ours runs
when it is due, and no code of ours is told. The numbers of every member follow from the seed, so that who
finishes can check what it holds against the exact weighted mean of those who contributed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from typing import Any, Final

import numpy
import trio
from blake3 import blake3

from agorad.bench import member
from agorad.bench.member import say
from p2p.averaging import Averager, Outcome, RosterCommitted, RoundConfig, RoundFailed
from p2p.averaging.roster import MAX_MEMBERS
from p2p.event import Event
from p2p.identity import PeerId
from p2p.kad.node import Dht
from p2p.multiaddr import Multiaddr
from stage.codec import CODECS
from stage.reduce import KernelReducer

STAGE: Final = 0
CHUNK: Final = 1 << 20
"""Floats made, and checked, at a time."""
SLOW_BYTES_S: Final = 2_500_000.0
"""20 Mbit/s: what the link of a slow member carries, each way."""

Floats = numpy.ndarray[Any, numpy.dtype[numpy.float32]]


def numbers(member_index: int, start: int, stop: int) -> Floats:
    """Floats [start, stop) of a member's vector, from -1 to 1: the same in every process."""
    made = []
    for chunk in range(start // CHUNK, -(-stop // CHUNK)):
        generator = numpy.random.default_rng([member_index, chunk])
        values = generator.random(CHUNK, dtype=numpy.float32) * 2 - 1
        made.append(values[max(0, start - chunk * CHUNK) : stop - chunk * CHUNK])
    return numpy.concatenate(made) if made else numpy.empty(0, numpy.float32)


def weight_of(member_index: int) -> float:
    """Members count differently, as samples do."""
    return 1.0 + member_index % 3


def error_of(outcome: Outcome, order: list[PeerId]) -> float:
    """The largest distance of an averaged number to the weighted mean of those who contributed to it."""
    result = numpy.frombuffer(outcome.vector, numpy.dtype("<f4"))
    worst = 0.0
    for start, stop, contributors in outcome.contributors:
        indices = [order.index(peer) for peer in contributors]
        total = sum(weight_of(index) for index in indices)
        for begin in range(start, stop, CHUNK):
            end = min(stop, begin + CHUNK)
            mean = numpy.zeros(end - begin)
            for index in indices:
                mean += weight_of(index) / total * numbers(index, begin, end).astype(numpy.float64)
            worst = max(worst, float(numpy.abs(result[begin:end] - mean).max()))
    return worst


def hash_of(outcome: Outcome) -> str:
    """Of the bytes that this member holds now, wherever they were averaged."""
    held = blake3()
    for start, stop in outcome.averaged:
        held.update(b"%d-%d:" % (start, stop))
        held.update(memoryview(outcome.vector)[start * 4 : stop * 4])
    return str(held.hexdigest())


async def peer(spec: dict[str, Any]) -> None:
    index, floats = int(spec["index"]), int(spec["floats"])
    host = member.host(spec)
    if spec["slow"]:
        host.upload.rate = host.download.rate = SLOW_BYTES_S
    vector = memoryview(numbers(index, 0, floats).astype(numpy.dtype("<f4")).tobytes())
    committed_at = 0.0
    outcome: Outcome | None = None

    def emit(event: Event) -> None:
        nonlocal committed_at
        if isinstance(event, RosterCommitted):
            committed_at = time.monotonic()
            die_after(spec["kill_s"])

    dht = Dht(host, host.identity)
    averager = Averager(
        host, dht, host.identity, run=member.RUN, stage=STAGE, reducer=KernelReducer,
        codec=CODECS[spec["dtype"]], emit=emit,
        config=RoundConfig(group_size=MAX_MEMBERS),
    )  # fmt: skip
    say(ready=True)
    async with host.run([Multiaddr.tcp(spec["address"], 0)]), trio.open_nursery() as nursery:
        seeds = [Multiaddr.parse(text) for text in (await _line())["seeds"]]
        nursery.start_soon(dht.run, [(addr.peer_id, [addr]) for addr in seeds if addr.peer_id is not None])
        await dht.joined.wait()
        say(peer=host.peer_id, addr=str(host.addrs[0]))
        mates = (await _line())["mates"]
        order = [PeerId(name) for name in mates]
        for name, addr in mates.items():
            host.learn(PeerId(name), [Multiaddr.parse(addr)])
        while request := await _line():
            if "check" in request and outcome is not None:
                say(max_error=error_of(outcome, order), hash=hash_of(outcome))
                continue
            facts: dict[str, Any]
            outcome = None  # a replica has merged the last one by now
            try:
                outcome = await averager.average(
                    request["round"], 0, vector, weight_of(index), expected=order,
                    deadline=request["seconds"], fill=True,
                )  # fmt: skip
            except RoundFailed as failure:
                facts = {"failed": str(failure)}
            else:
                facts = {
                    "fraction": outcome.fraction,
                    "drops": outcome.drops,
                    "members": len(outcome.members),
                    "bytes_out": outcome.payload_out,
                    "bytes_in": outcome.payload_in,
                }
            ended_at = time.monotonic()
            die_after(None)
            say(committed_at=committed_at, ended_at=ended_at, rss_mb=_most_memory() / 1e6, **facts)
        nursery.cancel_scope.cancel()


def die_after(seconds: float | None) -> None:
    """Have the kernel end this process then, as abruptly as a power cut; None: not any more."""
    if seconds == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)


def _most_memory() -> int:
    """Bytes of this process that were in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def _line() -> dict[str, Any]:
    line = await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
    words: dict[str, Any] = json.loads(line) if line else {}
    return words


def main() -> None:
    trio.run(peer, json.loads(sys.stdin.readline()))


if __name__ == "__main__":
    main()
