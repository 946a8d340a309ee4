"""Looks at the node every ``LOOK_S``, hears its events, and does what the rules say.

Every reaction is bounded: a warning is replaced, not repeated; shedding ends when its reason does; what
starts anew is done once a trouble; and the last resort is an exit code on which a manager starts the node
again. ``trouble`` and ``trouble_over`` are its events. Limits: ``WAITING`` events between two turns, older
ones are not heard.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import trio

from agorad.events import Trouble, TroubleOver
from agorad.exitcodes import DaemonExit, ExitCode
from agorad.logfile import rotated
from agorad.metrics import machine
from agorad.steady import passed
from agorad.supervision.clock import Clock, Standstill
from agorad.supervision.disk import Descriptors, Disk
from agorad.supervision.levers import Levers
from agorad.supervision.memory import HostMemory
from agorad.supervision.reactions import Reaction, Rule, Vitals
from agorad.supervision.weights import Weights

if TYPE_CHECKING:
    from agorad.node import Node

LOOK_S: Final = 5.0
WAITING: Final = 256
FORCE_S: Final = 33.0
"""After this an end that hangs is forced; one in order takes 30 s at most."""


class Supervisor:
    """See the file's opening."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._rules: tuple[Rule, ...] = (
            HostMemory(), Disk(), Descriptors(), Clock(), Standstill(LOOK_S)
        )  # fmt: skip
        self._events: deque[dict[str, Any]] = deque(maxlen=WAITING)
        self._news = trio.Event()
        self._known: dict[str, str] = {}
        """Kinds of trouble that were told and are not over, and what was said last."""

    @property
    def _all(self) -> tuple[Rule, ...]:
        return self._rules + self._node.levers.rules

    async def run(self) -> None:
        """Until cancelled."""
        for entry in self._node.bus.since():
            self._hear(entry)
        stop = self._node.bus.subscribe(self._hear)
        try:
            due = trio.current_time()
            while True:
                while self._events:
                    await self._heard(self._events.popleft())
                if trio.current_time() >= due:
                    due = trio.current_time() + LOOK_S
                    await self.look()
                self._news = trio.Event()
                if not self._events:
                    with trio.move_on_at(due):
                        await self._news.wait()
        finally:
            stop()

    def _hear(self, entry: dict[str, Any]) -> None:
        self._events.append(entry)
        self._news.set()

    async def _heard(self, entry: dict[str, Any]) -> None:
        if entry["event"] == "clock_skewed":
            self._node.steady.heard(entry["peer"], entry["seconds"])
        for rule in self._all:
            await self._react(rule.heard(entry, passed()))

    async def look(self) -> None:
        """One regular look."""
        now = self._vitals()
        for rule in self._all:
            await self._react(rule.look(now))
        self._node.steady.look()

    def _vitals(self) -> Vitals:
        node = self._node
        here = machine.look(node.config.node.state)
        return node.levers.vitals(
            Vitals(
                at=passed(),
                wall=time.time(),
                ours=node.steady(),
                memory_total=here.memory_total,
                memory_available=here.memory_available,
                resident=here.resident,
                disk_free=here.disk_free if here.disk_total else None,
                unwritten=node.bus.unwritten,
                descriptors=here.descriptors,
                descriptors_most=here.descriptors_most,
                connections=len(node.host.connections),
                phase=node.status.get("phase", ""),
            )
        )

    async def _react(self, reactions: Iterable[Reaction]) -> None:
        for reaction in reactions:
            await self._do(reaction)

    async def _do(self, reaction: Reaction) -> None:
        levers = self._node.levers
        match reaction.do:
            case "clear":
                self._over(reaction)
                return
            case "resume":
                levers.shed(False)
                self._over(reaction)
                return
            case "trim":
                await levers.trim()
                return
            case "make_room":
                self._make_room(levers)
                return
            case "examine":
                await self._examine(levers)
                return
            case "shed":
                levers.shed(True)
            case "reconnect":
                for connection in list(self._node.host.connections.values()):
                    connection.close(f"made anew: {reaction.why}")
        self._tell(reaction)
        if reaction.do in ("end", "end_now"):
            code = reaction.code or ExitCode.BUG
            if reaction.do == "end_now":
                force_end(code)
            self._node.end(DaemonExit(code, reaction.why))

    async def _examine(self, levers: Levers) -> None:
        finite = await levers.sound()
        for rule in levers.rules:
            if isinstance(rule, Weights):
                for reaction in rule.examined(finite, passed()):
                    if reaction.do == "resync" and not levers.resync(reaction.why):
                        reaction = rule.end("and no other replica of this stage has a state to give")
                    await self._do(reaction)

    def _tell(self, reaction: Reaction) -> None:
        self._node.warnings[f"trouble_{reaction.kind}"] = reaction.why
        if self._known.get(reaction.kind) != reaction.why:
            self._node.emit(Trouble(kind=reaction.kind, why=reaction.why, reaction=reaction.do))
        self._known[reaction.kind] = reaction.why

    def _over(self, reaction: Reaction) -> None:
        self._node.warnings.pop(f"trouble_{reaction.kind}", None)
        if self._known.pop(reaction.kind, None) is not None:
            self._node.emit(TroubleOver(kind=reaction.kind))

    def _make_room(self, levers: Levers) -> None:
        config = self._node.config
        spare = [config.events.with_name(config.events.name + ".1")]
        if (log := config.node.log) is not None:
            spare += rotated(log)
        for path in spare:
            try:
                path.unlink(missing_ok=True)
            except OSError:
                continue
        levers.make_room()


def force_end(code: ExitCode) -> None:
    """End this process with ``code`` in ``FORCE_S``, whatever hangs."""
    timer = threading.Timer(FORCE_S, os._exit, [int(code)])
    timer.daemon = True
    timer.start()
