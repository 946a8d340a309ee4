"""When the hash table is asked for the clock: soon by who hears nothing, seldom by who is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from agorad import clockwatch
from agorad.clockwatch import QUIET, SOON_S, WATCH_S, watch_clock
from agorad.node import Node
from p2p.errors import PeerGone
from p2p.identity import Identity
from stage.clock import Reading, StepClock

TRAINER = Identity.generate(bytes([1]) * 32)


def looks(monkeypatch: Any, seconds: float, *, header_every: float | None, moving: bool) -> list[float]:
    """When the clock was read, in ``seconds`` of a run that moves by headers, by the table, or not."""
    at: list[float] = []
    clock = StepClock("run", frozenset({TRAINER.peer_id}), 1)
    steps = 0

    def move() -> bool:
        nonlocal steps
        steps += 1
        return clock.observe([Reading.signed(TRAINER, "run", steps)])

    async def read(_node: Node, _clock: StepClock) -> bool:
        await trio.lowlevel.checkpoint()
        at.append(trio.current_time())
        if len(at) == 2:
            raise PeerGone("nobody there")
        return moving and move()

    async def main() -> None:
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch_clock, cast(Node, SimpleNamespace()), clock, lambda: None)
                while True:
                    await trio.sleep(header_every or 1e9)
                    move()

    monkeypatch.setattr(clockwatch, "read_clock", read)
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return at


def test_who_is_told_nothing_looks_soon(monkeypatch: Any) -> None:
    at = looks(monkeypatch, 10.2, header_every=None, moving=True)
    assert len(at) == round(10.0 / SOON_S)


def test_who_is_told_looks_seldom_but_looks(monkeypatch: Any) -> None:
    """A trainer's own count moves all the time; the other trainers' it reads here."""
    at = looks(monkeypatch, 10.2, header_every=0.1, moving=True)
    assert len(at) == round(10.0 / WATCH_S)


def test_a_run_that_stands_still_is_not_asked_about_all_the_time(monkeypatch: Any) -> None:
    at = looks(monkeypatch, QUIET * SOON_S + 10 * WATCH_S + 0.2, header_every=None, moving=False)
    assert len(at) == QUIET + 10
