"""One swarm over lines and its twin without limit and delay, through one relay, in turns.

Both are up at once; the trainer of one is held while the other works. So both are in a steady state whenever
they are looked at, and what changes on the machine meets both. Needs what a lab needs.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import psutil

from agorad.ask import ask
from agorad.demo.layout import Plan
from agorad.lab.network import Line, lab
from tests.system.placed import Placed, placed

LINE = Line(up_mbps=200, down_mbps=200, delay_ms=20)
"""Two ends are 80 ms there and back."""
BOUNDARY_100M = (
    "model.seq=1024", "model.k=20", "model.d=64", "model.heads=1", "model.ffn=128", "model.layers=[1, 1, 1]",
    "model.full_rank_tail=true",
)  # fmt: skip
"""Tokens and numbers a token of the 100m preset, in layers so narrow that two cores compute some a second."""
SETTLE_S = 4.0
"""Of a turn, not counted: what comes of the hold before it. A microbatch takes 1 to 3 s on a slow machine."""
HELD_S = 600.0


@attrs.frozen
class Turn:
    """What one swarm did in one turn."""

    tokens_per_second: float
    latency_s: float
    """Of a microbatch, median."""
    in_flight: int
    """Of the trainer, at the end."""
    cpu_s: dict[str, float]
    """Of the swarm's processes, a second, by role."""
    idle: float
    """Share of the machine's processors that nobody used."""
    stolen: float
    """Share that the machine's host gave to others: turns that differ in it do not compare."""
    events: dict[str, int]
    """Of all nodes, by kind."""


class Twin:
    """One of the two swarms."""

    def __init__(self, swarm: Placed) -> None:
        self._swarm = swarm
        self._seq = swarm.made.manifest.model.seq

    def start(self) -> None:
        """With its trainer, until the first microbatches are through, and held then."""
        self._swarm.start("trainer-0")
        self._swarm.wait_for(lambda: self._swarm.phase("trainer-0") == "active", 60, "trainer")
        self._swarm.wait_for(lambda: len(self._of("microbatch_completed", 0.0)) > 8, 100, "work")
        self._ask("pause", seconds=HELD_S)

    def turn(self, seconds: float) -> Turn:
        """Work for so long."""
        self._ask("resume")
        time.sleep(SETTLE_S)
        before, began = self._used(), time.time()
        time.sleep(seconds)
        after, ended = self._used(), time.time()
        status = self._swarm.status("trainer-0") or {}
        self._ask("pause", seconds=HELD_S)
        took = ended - began
        done = [event for event in self._of("microbatch_completed", began) if event["at"] < ended]
        assert done, f"nothing came through in {took:.0f} s"
        issued = {event["ticket"]: event["at"] for event in self._of("microbatch_issued", 0.0)}
        counts = Counter(
            event["event"]
            for node in self._swarm.made.nodes
            for event in self._swarm.events(node.name)
            if began <= event["at"] < ended
        )
        return Turn(
            tokens_per_second=len(done) * self._seq / took,
            latency_s=statistics.median(event["at"] - issued[event["ticket"]] for event in done),
            in_flight=status["microbatches"]["in_flight"],
            cpu_s={role: (used - before[0][role]) / took for role, used in after[0].items()},
            idle=(after[1].idle - before[1].idle) / took / psutil.cpu_count(),
            stolen=(after[1].steal - before[1].steal) / took / psutil.cpu_count(),
            events=dict(counts),
        )

    def _of(self, kind: str, since: float) -> list[dict[str, Any]]:
        events = self._swarm.events("trainer-0")
        return [event for event in events if event["event"] == kind and event["at"] >= since]

    def _ask(self, do: str, **words: Any) -> None:
        ask(self._swarm.made.folder / "trainer-0" / "control.sock", do, **words)

    def _used(self) -> tuple[Counter[str], Any]:
        """Seconds of processors: those of the swarm by role, and those of the machine by use."""
        mine = Counter[str]()
        for name, process in self._swarm.processes.items():
            times = psutil.Process(process.pid).cpu_times()
            mine[name.split("-")[0]] += times.user + times.system
        return mine, psutil.cpu_times()


@attrs.frozen
class Pair:
    """A turn without limit and delay, and one over lines."""

    free: Turn
    limited: Turn

    @property
    def ratio(self) -> float:
        return self.limited.tokens_per_second / self.free.tokens_per_second


def measure(
    folder: Path, settings: Sequence[str], *, pairs: int, seconds: float, wait_s: float | None = None
) -> list[Pair]:
    """Turns of 3 x 2 with these settings, ``pairs`` of them after one that does not count.

    ``wait_s``: what a worker's device takes for a microbatch, waiting where computing is done sooner: then
    this machine's processors, which also do what a line does, are not what bounds either swarm.
    """
    plan = Plan(
        stages=3, workers=2, trainers=1, steps=None, seconds=None, data=None, assignments=tuple(settings)
    )
    nodes = 1 + plan.stages * plan.workers
    slowed = (str(Path(__file__).with_name("slowed.py")), str(wait_s))
    workers = [f"worker-{stage}-{one}" for stage in range(plan.stages) for one in range(plan.workers)]
    programs = dict.fromkeys(workers, slowed) if wait_s is not None else {}
    with ExitStack() as stack:
        places = stack.enter_context(lab([Line()] * nodes + [LINE] * nodes))
        free = Twin(stack.enter_context(placed(plan, folder / "free", places[:nodes], programs)))
        limited = Twin(stack.enter_context(placed(plan, folder / "limited", places[nodes:], programs)))
        for twin in (free, limited):
            twin.start()
            twin.turn(seconds)
        found = []
        for number in range(pairs):
            turns = {twin: twin.turn(seconds) for twin in ((free, limited), (limited, free))[number % 2]}
            found.append(Pair(turns[free], turns[limited]))
        return found
