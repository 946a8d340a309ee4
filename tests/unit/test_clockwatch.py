"""When the hash table is asked for the clock: soon by who hears nothing, seldom by who is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import trio
import trio.testing

from agorad import clockwatch
from agorad.clockwatch import QUIET, SOON_S, WATCH_S, read_clock, watch_clock
from agorad.node import Node
from p2p.errors import PeerGone
from p2p.identity import Identity, PeerId
from p2p.kad.record import Record, Verifier, seal
from p2p.records import ClockRecord
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


LIVING, GONE, LIAR = (Identity.generate(bytes([number]) * 32) for number in (2, 3, 4))


def record_of(who: Identity, samples: int, *others: Reading) -> tuple[PeerId, Record]:
    told = ClockRecord(
        samples=samples,
        at=0.0,
        signature=Reading.signed(who, "run", samples).signature,
        others=tuple((r.trainer, r.samples, r.signature) for r in others),
    )
    sealed = seal(who, "clock/run", who.peer_id, told.to_value(), seq=1, issued=0.0, ttl=10)
    return who.peer_id, Verifier().open(sealed.wire)


def read_by_a_newcomer(*records: tuple[PeerId, Record]) -> StepClock:
    clock = StepClock("run", frozenset({LIVING.peer_id, GONE.peer_id}), 10)

    async def get(_key: str, *, deadline: float) -> dict[PeerId, Record]:
        await trio.lowlevel.checkpoint()
        return dict(records)

    node = SimpleNamespace(
        dht=SimpleNamespace(get=get),
        manifest=SimpleNamespace(run=SimpleNamespace(id="run")),
        emit=lambda _event: None,
    )
    trio.run(read_clock, cast(Node, node), clock)
    return clock


def test_what_a_trainer_did_that_is_gone_for_ever_still_counts() -> None:
    """Its own record has expired, and a newcomer must not take the run for half as far as it is."""
    gone = Reading.signed(GONE, "run", 500)
    clock = read_by_a_newcomer(record_of(LIVING, 300, gone))
    assert (clock.samples, clock.step) == (800, 80)
    # It comes back, from before: nobody goes back with it.
    assert not clock.observe([Reading.signed(GONE, "run", 40)])
    assert clock.step == 80


def test_what_is_told_of_others_is_believed_with_their_signature_only() -> None:
    forged = Reading(GONE.peer_id, 10**9, Reading.signed(LIAR, "run", 10**9).signature)
    assert read_by_a_newcomer(record_of(LIVING, 300, forged)).samples == 300
    stranger = Reading.signed(GONE, "run", 500)
    assert read_by_a_newcomer(record_of(LIAR, 1, stranger)).samples == 0
