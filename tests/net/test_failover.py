"""Replicas lost in the middle of a three-stage pipeline: what was done further down is not done again.

Real hosts on loopback and a fake ``Compute`` that counts its passes (``fake_compute``).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import stage.work
from agorad.authority.ledger import Rules
from agorad.authority.store import Grant, Store
from p2p.identity import PeerId
from stage.config import ModelConfig
from stage.events import Rerouted, Reused, ReusedStale
from stage.nexthop import Passed
from stage.receipts import Receipt
from tests.net.fake_compute import IDS, C
from tests.net.pipelines import TRAINER, Node, Swarm, ask, asking, swarm, until, waiting_at

MODEL = ModelConfig(d=64, k=8, heads=4, kv_heads=2, head_dim=16, ffn=128, seq=32, layers=(1, 1, 1))
"""Of which only the stages count here, and what their work is worth."""


@pytest.fixture(autouse=True)
def short_lives_of_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough for a replacement here; who was cut off is to end soon."""
    monkeypatch.setattr(stage.work, "ORPHAN_S", 1.5)


@asynccontextmanager
async def three(heads: int = 1, bodies: int = 1, tails: int = 1, slots: int = 4) -> AsyncIterator[Swarm]:
    async with swarm(heads, tails, slots, bodies) as made:
        yield made


class Flight:
    """One microbatch on its way, held where a gate is shut."""

    def __init__(self, made: Swarm) -> None:
        self.swarm = made
        self.request = made.request()
        self.passed: Passed | None = None
        self.ways: list[list[PeerId]] = []

    async def fly(self) -> None:
        assert self.swarm.trainer.next_hop is not None
        self.passed = await self.swarm.trainer.next_hop.send(
            self.request, [IDS], back_bytes=0, passed_on=self.ways.append
        )

    async def reaches(self, nodes: list[Node], passes: str = "forwards") -> Node:
        """The one of these that has it."""
        await until(lambda: any(getattr(node.compute, passes) for node in nodes))
        return next(node for node in nodes if getattr(node.compute, passes))

    def checked(self) -> Passed:
        """It is done; every stage of its path has added it, and they alone are credited for it."""
        assert self.passed is not None
        path = self.passed.answer.path
        for node in self.swarm.workers:
            if node.peer in path:
                assert node.added == [self.request.ticket.id]
        assert set(credited(self.swarm, self.receipt())) == set(path[1:])
        return self.passed

    def receipt(self) -> Receipt:
        """What the trainer hands in."""
        assert self.passed is not None
        answer = self.passed.answer
        return Receipt(
            ticket=self.request.ticket,
            at=time.time(),
            peers=tuple(answer.path[1:]),
            statements=tuple(answer.receipts),
        ).signed_by(TRAINER)


def credited(made: Swarm, *handed_in: Receipt) -> dict[str, int]:
    """What an authority that let all of them in credits each with, for these receipts in this order."""
    rules, now = Rules(run="run", trainers=frozenset({TRAINER.peer_id}), model=MODEL), time.time()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "authority.sqlite")
        try:
            for node in made.workers:
                assert node.stage is not None
                let_in = Grant(
                    peer_id=node.peer, account="x", stage=node.stage, issued=now - 60, expires=now + 600
                )
                store.grant(let_in, max_nodes=99, max_per_account=99, now=now - 60)
            for one in handed_in:
                packed = one.encode()
                read = rules.read(packed, TRAINER.peer_id, now + 1)
                row = rules.credit(read, packed, lambda peer, n, at: store.books.held(peer, n, at, 600.0))
                store.books.add_receipts([row], now)
            return {balance.peer_id: balance.compute for balance in store.books.balances() if balance.compute}
        finally:
            store.close()


def shut(nodes: list[Node], gate: str = "at_forward") -> None:
    for node in nodes:
        getattr(node.compute, gate).shut()


def unlock(nodes: list[Node]) -> None:
    for node in nodes:
        node.compute.at_forward.open()
        node.compute.at_backward.open()


def passes(nodes: list[Node]) -> int:
    return sum(len(node.compute.forwards) for node in nodes)


def knows(flight: Flight, *way: Node) -> Callable[[], bool]:
    return lambda: bool(flight.ways) and flight.ways[-1] == [node.peer for node in way]


def test_the_path_is_told_upstream_as_soon_as_it_is_known() -> None:
    async def main() -> None:
        async with three() as made:
            shut(made.tails)
            flight = Flight(made)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flight.fly)
                await flight.reaches(made.tails)
                await until(knows(flight, *made.workers))
                unlock(made.tails)
            head, body, tail = (node.peer for node in made.workers)
            assert flight.ways == [[head], [head, body], [head, body, tail]]

    trio.run(main)


@pytest.mark.parametrize("tails", [1, 3])
def test_a_lost_head_costs_no_work_of_later_stages(tails: int) -> None:
    """The body is still at it and is joined; the tail notices nothing."""

    async def main() -> None:
        async with three(heads=2, bodies=3, tails=tails) as made:
            shut(made.tails)
            flight = Flight(made)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flight.fly)
                tail = await flight.reaches(made.tails)
                head, body = await flight.reaches(made.heads), await flight.reaches(made.bodies)
                await until(knows(flight, head, body, tail))
                head.cable.cut()
                await until(lambda: passes(made.heads) == 2)
                await until(lambda: waiting_at(body) == 1)
                unlock(made.tails)
            other = next(node for node in made.heads if node is not head)
            assert flight.checked().answer.path == [TRAINER.peer_id, other.peer, body.peer, tail.peer]
            assert (passes(made.bodies), passes(made.tails)) == (1, 1)
            assert head.added == []
            assert len(body.of(Reused)) + len(body.of(ReusedStale)) == 1

    trio.run(main)


@pytest.mark.parametrize("when", ["forward", "answered"])
def test_a_lost_body_costs_no_work_of_the_tail(when: str) -> None:
    """Whether the tail is still at it, or has answered and the body was lost in its own backward pass."""

    async def main() -> None:
        async with three(bodies=2, tails=3) as made:
            shut(made.tails if when == "forward" else [])
            shut(made.bodies if when == "answered" else [], "at_backward")
            flight = Flight(made)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flight.fly)
                tail = await flight.reaches(made.tails)
                body = await flight.reaches(made.bodies)
                await until(knows(flight, made.heads[0], body, tail))
                if when == "answered":
                    await body.compute.at_backward.reached()
                body.cable.cut()
                await until(lambda: passes(made.bodies) == 2)
                other = next(node for node in made.bodies if node is not body)
                other.compute.at_backward.open()
                await until(lambda: when == "answered" or waiting_at(tail) == 1)
                unlock(made.workers)
            path = flight.checked().answer.path
            assert path == [TRAINER.peer_id, made.heads[0].peer, other.peer, tail.peer]
            assert (passes(made.tails), passes(made.heads)) == (1, 1)
            assert [event.to for event in made.heads[0].of(Rerouted)] == [other.peer]
            # The replacement computed another c: the tail's one answer is for the lost one's, and says so.
            assert len(tail.of(ReusedStale)) == 1
            assert flight.checked().answer.stale
            # In its backward pass it was past the commit point: the one microbatch that counts twice.
            await until(lambda: body.added == ([flight.request.ticket.id] if when == "answered" else []))

    trio.run(main)


def test_head_and_body_lost_at_once_cost_no_work_of_the_tail() -> None:
    async def main() -> None:
        async with three(heads=2, bodies=2, tails=3) as made:
            shut(made.tails)
            flight = Flight(made)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flight.fly)
                tail = await flight.reaches(made.tails)
                head, body = await flight.reaches(made.heads), await flight.reaches(made.bodies)
                await until(knows(flight, head, body, tail))
                body.cable.cut()
                head.cable.cut()
                await until(lambda: waiting_at(tail) == 1 and passes(made.bodies) == 2)
                unlock(made.tails)
            assert not {head.peer, body.peer} & set(flight.checked().answer.path)
            assert passes(made.tails) == 1

    trio.run(main)


def test_a_frozen_body_costs_its_detection_and_no_work_of_the_tail() -> None:
    async def main() -> None:
        async with three(bodies=2, tails=2) as made:
            shut(made.tails)
            flight = Flight(made)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flight.fly)
                tail = await flight.reaches(made.tails)
                body = await flight.reaches(made.bodies)
                await until(knows(flight, made.heads[0], body, tail))
                body.cable.freeze()
                await until(lambda: passes(made.bodies) == 2)
                await until(lambda: waiting_at(tail) == 1)
                unlock(made.tails)
            assert flight.checked()
            assert passes(made.tails) == 1
            body.cable.thawed.set()
            await body.settled()
            assert body.added == []

    trio.run(main)


def test_an_orphan_is_dropped_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.work, "ORPHAN_S", 0.3)

    async def main() -> None:
        async with three(heads=1) as made:
            shut(made.tails)
            flight = Flight(made)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flight.fly)
                await flight.reaches(made.tails)
                made.heads[0].cable.cut()
                await until(lambda: waiting_at(made.bodies[0]) == 0)
                assert made.bodies[0].server.in_progress == 1
                await made.bodies[0].settled()
                await until(lambda: waiting_at(made.tails[0]) == 0)
                unlock(made.tails)
                await made.tails[0].settled()
                nursery.cancel_scope.cancel()
            assert made.bodies[0].added == made.tails[0].added == []

    trio.run(main)


def test_an_orphan_makes_room_for_who_needs_its_slot() -> None:
    async def main() -> None:
        async with three(heads=2, slots=1) as made:
            (lost, other), body, tail = made.heads, made.bodies[0], made.tails[0]
            shut(made.tails)
            late = made.request()
            async with trio.open_nursery() as nursery:
                async with asking(lost, body, made.request(), [IDS, C]):
                    await until(lambda: passes([tail]) == 1)
                    lost.cable.cut()
                    await until(lambda: waiting_at(body) == 0)
                    assert body.server.in_progress == 1
                nursery.start_soon(ask, other, body, late, [IDS, C])
                await until(lambda: waiting_at(body) == 1 and waiting_at(tail) == 0)
                unlock(made.tails)
            assert body.added == tail.added == [late.ticket.id]

    trio.run(main)


def test_who_gives_up_cancels_every_later_stage() -> None:
    """Its connection lives: nobody waits for a replacement of it."""

    async def main() -> None:
        async with three() as made:
            shut(made.tails)
            flight = Flight(made)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flight.fly)
                await flight.reaches(made.tails)
                nursery.cancel_scope.cancel()
            with trio.fail_after(stage.work.ORPHAN_S / 2):
                await until(lambda: not waiting_at(made.tails[0]))
                unlock(made.tails)
                for node in made.workers:
                    await node.settled()
            assert all(node.added == [] for node in made.workers)

    trio.run(main)


def test_the_same_microbatch_sent_again_finds_its_way() -> None:
    """A caller asks whom it asked before, though others would have their turn."""

    async def main() -> None:
        async with three(heads=3, bodies=3, tails=3) as made:
            flight = Flight(made)
            await flight.fly()
            first = flight.checked()
            for _ in range(3):
                await flight.fly()
                assert flight.checked().answer.path == first.answer.path
            assert [passes(nodes) for nodes in (made.heads, made.bodies, made.tails)] == [1, 1, 1]

    trio.run(main)


def test_work_done_twice_is_credited_once() -> None:
    """A trainer that lost its journal issues the same ticket again, and other replicas do all of it again."""

    async def main() -> None:
        async with three(heads=2, bodies=2, tails=2) as made:
            flight = Flight(made)
            await flight.fly()
            first = flight.checked()
            used = [node for node in made.workers if node.peer in first.answer.path]
            receipt = flight.receipt()
            made.show(*(node for node in made.workers if node not in used))
            await flight.fly()
            assert not set(flight.checked().answer.path[1:]) & set(first.answer.path)
            assert all(node.added == [flight.request.ticket.id] for node in made.workers)
            assert credited(made, receipt, flight.receipt()) == credited(made, receipt)
            assert set(credited(made, flight.receipt())) == set(flight.checked().answer.path[1:])

    trio.run(main)
