"""``bench dht``: joining, storing and reading in a table of processes over loopback, one at a time."""

from __future__ import annotations

import random
import statistics
import time
from contextlib import ExitStack
from typing import Any, Final

from agorad.bench.ends import End, end, said, spread, tell
from p2p.identity import Identity

MODULE: Final = "agorad.bench.dht_peer"
RUNS: Final = 3
"""Rounds that count, in each of which every peer stores once and reads once; one before them does not,
in which peers that never spoke to each other connect."""
ANSWER_S: Final = 60.0
START_S: Final = 300.0
"""For all processes to be up; they start at once, on as many cores as there are."""


def run(peers: int) -> dict[str, Any]:
    """Measure; the result is what ``--json`` prints. NoAnswer, CommandFailed when a peer hangs or ends."""
    authority = Identity.generate()
    with ExitStack() as stack:
        began = time.perf_counter()
        ends = [stack.enter_context(end(MODULE, {}, authority)) for _ in range(peers)]
        for process in ends:
            said(process, max(1.0, began + START_S - time.perf_counter()))
        started_s = time.perf_counter() - began
        joins: list[float] = []
        names: list[str] = []
        seeds: list[str] = []
        for process in ends:
            facts = _asked(process, {"seeds": seeds})
            names.append(facts["peer"])
            if seeds:
                joins.append(facts["ms"])
            else:
                seeds = [facts["addr"]]
        stores: list[float] = []
        gets: list[float] = []
        done: list[bool] = []
        for number in range(RUNS + 1):
            facts_of = _round(ends, names, number)
            if number:
                stores += facts_of["store"]
                gets += facts_of["get"]
                done += facts_of["done"]
        sizes = [_asked(process, {"do": "size"})["rss_mb"] for process in ends]
    return {
        "peers": peers,
        "start_s": started_s,
        "join_ms": spread(joins),
        "store_ms": spread(stores),
        "get_ms": spread(gets),
        "success": sum(done) / len(done),
        "rss_mb": statistics.median(sizes),
        "rss_mb_most": max(sizes),
    }


def lines(result: dict[str, Any]) -> str:
    """For people."""
    out = [f"{result['peers']} peers, their processes started in {result['start_s']:.1f} s"]
    for name in ("join", "store", "get"):
        times = result[f"{name}_ms"]
        out.append(f"{name:<8}{times['p50']:8.1f} ms (p50){times['p95']:8.1f} (p95){times['max']:8.1f} (max)")
    out.append(f"success {result['success'] * 100:8.2f} %")
    out.append(f"memory  {result['rss_mb']:8.1f} MB a peer (median), {result['rss_mb_most']:.1f} (most)")
    return "\n".join(out)


def _round(ends: list[End], names: list[str], number: int) -> dict[str, list[Any]]:
    """Every peer stores a record of its own under a key that nobody used; another peer, drawn, reads it."""
    rng = random.Random(number)
    found: dict[str, list[Any]] = {"store": [], "get": [], "done": []}
    for writer, process in enumerate(ends):
        reader = (writer + rng.randrange(1, len(ends))) % len(ends)
        request = {"key": f"bench/{number}/{writer}", "writer": names[writer]}
        for do, who in (("store", process), ("get", ends[reader])):
            facts = _asked(who, {"do": do, **request})
            found[do].append(facts["ms"])
            found["done"].append(facts["done"])
    return found


def _asked(process: End, request: dict[str, Any]) -> dict[str, Any]:
    tell(process, request)
    return said(process, ANSWER_S)
