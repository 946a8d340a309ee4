"""Reading the step clock from the hash table: what headers do not bring to a node that has no work."""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from agorad.node import Node
from p2p.errors import P2PError
from p2p.identity import PeerId
from p2p.records import ClockRecord, clock_key, read_all
from stage.clock import Reading, StepClock

WATCH_S = 2.0
SOON_S = 0.5
"""Between two looks of a node that headers bring nothing: a replica that hears late of many steps at once
counts as one that fell behind."""
QUIET = 8
"""Looks without news after which the run itself stands still and ``WATCH_S`` is soon enough."""
READ_S = 5.0


async def read_clock(node: Node, clock: StepClock) -> bool:
    """Look once; whether the step advanced. Raises P2PError when the hash table cannot be asked."""
    records = await node.dht.get(clock_key(node.manifest.run.id), deadline=READ_S)
    found = read_all(ClockRecord, records, emit=node.emit)
    advanced = False
    for owner, record in found.items():
        told = [(owner, record.samples, record.signature), *record.others]
        for reading in told:
            try:
                advanced |= clock.observe([Reading(PeerId(reading[0]), reading[1], reading[2])])
            except P2PError:
                break  # anybody may write under this key; only trainers' signatures count
    return advanced


async def watch_clock(node: Node, clock: StepClock, advanced: Callable[[], None]) -> None:
    """Look every ``WATCH_S``, and sooner while nothing else brings the clock, until cancelled."""
    looked_at, quiet = -math.inf, 0
    while True:
        seen = clock.samples
        await trio.sleep(SOON_S if quiet < QUIET else WATCH_S)
        if clock.samples > seen:
            quiet = 0
            if trio.current_time() - looked_at < WATCH_S:
                continue
        looked_at = trio.current_time()
        try:
            if await read_clock(node, clock):
                advanced()
        except (P2PError, trio.TooSlowError):
            pass  # headers carry the clock too
        quiet = 0 if clock.samples > seen else quiet + 1
