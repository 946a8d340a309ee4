"""Reading the step clock from the hash table: what headers do not bring to a node that has no work."""

from __future__ import annotations

from collections.abc import Callable

import trio

from agorad.node import Node
from p2p.errors import P2PError
from p2p.records import ClockRecord, clock_key, read_all
from stage.clock import Reading, StepClock

WATCH_S = 2.0
READ_S = 5.0


async def read_clock(node: Node, clock: StepClock) -> bool:
    """Look once; whether the step advanced. Raises P2PError when the hash table cannot be asked."""
    records = await node.dht.get(clock_key(node.manifest.run.id), deadline=READ_S)
    found = read_all(ClockRecord, records, emit=node.emit)
    advanced = False
    for owner, record in found.items():
        try:
            advanced |= clock.observe([Reading(owner, record.samples, record.signature)])
        except P2PError:
            continue  # anybody may write under this key; only trainers' signatures count
    return advanced


async def watch_clock(node: Node, clock: StepClock, advanced: Callable[[], None]) -> None:
    """Look every ``WATCH_S``, until cancelled."""
    while True:
        try:
            if await read_clock(node, clock):
                advanced()
        except (P2PError, trio.TooSlowError):
            pass  # headers carry the clock too
        await trio.sleep(WATCH_S)
