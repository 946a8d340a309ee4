"""Holding a node: it keeps its place in the run and does no work, until it is let go.

A role that can be held gives ``attach`` a function that is called with True and False. Held means: no new
microbatches, what it has is finished; no steps and no averaging either, since both are what loads a machine
and a line; the certificate is renewed and the hash table served as before. Other nodes see the phase
``paused`` in the roster and route around it at once. A hold by hand ends at a time, with ``release`` or with
the process: it is not kept over a restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import attrs
import trio

from agorad.events import Held, LetGo
from p2p.errors import LocalError
from p2p.event import Emit

LOOK_S: Final = 1.0


@attrs.define(eq=False)
class Pausing:
    """Whether this node is held, and why."""

    emit: Emit
    clock: Callable[[], float]
    """Unix time."""
    until: float | None = None
    """Held by hand until then; infinite until released; None: not."""
    outside_hours: Callable[[float], str] = lambda _now: ""
    """Why the time of day holds this node; empty where it does not."""
    why: str = ""
    """Empty: not held."""
    _apply: Callable[[bool], None] | None = None

    def attach(self, apply: Callable[[bool], None]) -> None:
        """The role can be held from now on."""
        self._apply = apply
        if self.why:
            apply(True)
        self.look()

    def hold(self, until: float) -> None:
        """Until a time; LocalError where there is nothing to hold."""
        if self._apply is None:
            raise LocalError("only workers and trainers at work can be paused; agoractl leave stops a node")
        self.until = until
        self.look()

    def release(self) -> None:
        """Let go what was held by hand; the hours of the settings still count."""
        self.until = None
        self.look()

    def look(self) -> None:
        """Hold or let go by what is so now."""
        now = self.clock()
        if self.until is not None and now >= self.until:
            self.until = None
        why = "asked to" if self.until is not None else self.outside_hours(now)
        if why == self.why or self._apply is None:
            return
        before, self.why = self.why, why
        if why:
            self.emit(Held(why=why, until=None if self.until in (None, math.inf) else self.until))
        else:
            self.emit(LetGo())
        if bool(before) != bool(why):
            self._apply(bool(why))

    async def run(self) -> None:
        """Follow the clock until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            self.look()
