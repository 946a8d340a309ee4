"""Microbatches whose callers or callees disappear: nothing is lost, and nothing added twice."""

from __future__ import annotations

import time

import pytest
import trio

import stage.nexthop
import stage.work
from stage.events import Busy, Rerouted
from stage.messages import Accepted, Answer, NoReplica
from stage.nexthop import LEASE_S, NoReplicaError, Passed
from tests.net.fake_compute import BOUNDARY, IDS, PATIENCE_S, C
from tests.net.pipelines import TRAINER, Swarm, ask, asking, disappear, reply, swarm, until, with_swarm


@pytest.fixture(autouse=True)
def short_lives_of_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody comes for them here."""
    monkeypatch.setattr(stage.work, "ORPHAN_S", 0.3)


# Callers that disappear


@pytest.mark.parametrize("how", ["reset", "word", "cut", "deadline"])
def test_a_caller_that_goes_before_the_commit_has_nothing_added(how: str) -> None:
    @with_swarm()
    async def run(swarm: Swarm) -> None:
        head, tail = swarm.heads[0], swarm.tails[0]
        tail.compute.at_forward.shut()
        request = swarm.request(deadline_s=0.2 if how == "deadline" else PATIENCE_S)
        async with asking(head, tail, request, [IDS, C]) as call:
            await tail.compute.at_forward.reached()
            await disappear(how, call, head, tail)
            tail.compute.at_forward.open()
            await tail.settled()
        assert tail.added == []
        assert tail.compute.gradients == []

    run()


@pytest.mark.parametrize("how", ["reset", "cut"])
def test_a_caller_that_goes_after_the_commit_leaves_its_answer_to_its_replacement(how: str) -> None:
    @with_swarm(heads=2)
    async def run(swarm: Swarm) -> None:
        (one, two), tail = swarm.heads, swarm.tails[0]
        tail.compute.at_backward.shut()
        request = swarm.request()
        async with asking(one, tail, request, [IDS, C]) as call:
            await tail.compute.at_backward.reached()
            await disappear(how, call, one, tail)
            tail.compute.at_backward.open()
            await tail.settled()
        assert tail.added == [request.ticket.id]
        answer, _ = await ask(two, tail, request, [IDS, C])
        assert answer.path == [TRAINER.peer_id, two.peer, tail.peer]
        assert tail.added == [request.ticket.id]

    run()


@with_swarm()
async def test_a_cancel_goes_through_the_pipeline(swarm: Swarm) -> None:
    head, tail = swarm.heads[0], swarm.tails[0]
    tail.compute.at_forward.shut()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swarm.train)
            await tail.compute.at_forward.reached()
            scope.cancel()
    await head.settled()
    await tail.host.connections[head.peer].ping(PATIENCE_S)
    tail.compute.at_forward.open()
    await tail.settled()
    assert head.added == tail.added == []
    await swarm.train()


@with_swarm()
async def test_too_slow_is_said_and_nothing_is_added(swarm: Swarm) -> None:
    head, tail = swarm.heads[0], swarm.tails[0]
    tail.compute.at_forward.shut()
    with pytest.raises(trio.TooSlowError):
        await swarm.train(swarm.request(deadline_s=0.3))
    await head.settled()
    await tail.host.connections[head.peer].ping(PATIENCE_S)
    tail.compute.at_forward.open()
    await tail.settled()
    assert head.added == tail.added == []


# The lease


@with_swarm()
async def test_no_commit_before_a_ping_was_answered_lately(swarm: Swarm) -> None:
    """The callee's clock jumps ahead in the forward pass: what was fresh is stale, until the next answer."""
    head, tail = swarm.heads[0], swarm.tails[0]
    tail.compute.at_forward.shut()
    async with asking(head, tail, swarm.request(), [IDS, C]) as call:
        await tail.compute.at_forward.reached()
        lease = tail.host.connections[head.peer].lease
        await until(lambda: lease.fresh())
        head.cable.freeze()
        tail.skew_s = 60.0
        assert not lease.fresh()
        tail.compute.at_forward.open()
        await tail.device.run(2, str)  # the forward pass is over, the commit was tried
        await tail.device.run(2, str)
        assert not tail.compute.gradients
        head.cable.thawed.set()
        assert isinstance(await reply(call), Accepted)
        assert isinstance(await reply(call, BOUNDARY), Answer)
    assert len(tail.added) == 1


@with_swarm()
async def test_a_silent_caller_has_nothing_added(swarm: Swarm) -> None:
    head, tail = swarm.heads[0], swarm.tails[0]
    tail.compute.at_forward.shut()
    async with trio.open_nursery() as nursery:
        async with asking(head, tail, swarm.request(), [IDS, C]):
            await tail.compute.at_forward.reached()
            connection = tail.host.connections[head.peer]
            head.cable.freeze()
            tail.skew_s = 60.0
            tail.compute.at_forward.open()
            with trio.fail_after(PATIENCE_S):
                await connection.closed.wait()
            await tail.settled()
            assert tail.added == []
            assert tail.compute.gradients == []
            head.cable.thawed.set()
        nursery.cancel_scope.cancel()


# Callees that disappear


@with_swarm(tails=2, slots=4)
async def test_a_callee_that_dies_is_replaced_and_nothing_is_lost_or_added_twice(swarm: Swarm) -> None:
    head = swarm.heads[0]
    results: list[Passed] = []
    for tail in swarm.tails:
        tail.compute.at_forward.shut()

    async def one() -> None:
        results.append(await swarm.train())

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(one)
        for tail in swarm.tails:
            await tail.compute.at_forward.reached()
        dead, alive = swarm.tails
        dead.cable.cut()
        alive.compute.at_forward.open()
        with trio.fail_after(LEASE_S + 3.5):
            await until(lambda: len(results) == 4)
    assert len({result.answer.path[1] for result in results}) == 1
    assert {result.answer.path[2] for result in results} == {alive.peer}
    assert len(set(alive.added)) == len(alive.added) == 4
    assert sorted(head.added) == sorted(alive.added)
    assert dead.added == []
    rerouted = head.of(Rerouted)
    assert {(event.from_, event.to) for event in rerouted} == {(dead.peer, alive.peer)}
    assert 1 <= len(rerouted) <= 3


@with_swarm(tails=2)
async def test_a_silent_callee_is_left_no_sooner_than_its_lease_ends(swarm: Swarm) -> None:
    head = swarm.heads[0]
    for tail in swarm.tails:
        tail.compute.at_forward.shut()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(swarm.train)
        await until(lambda: any(tail.compute.forwards for tail in swarm.tails))
        silent, other = sorted(swarm.tails, key=lambda tail: -len(tail.compute.forwards))
        connection = head.host.connections[silent.peer]
        other.compute.at_forward.open()
        silent.cable.freeze()
    began = other.compute.forwards[0][0]
    assert LEASE_S <= began - connection.last_answer <= LEASE_S + 2.0
    assert [event.to for event in head.of(Rerouted)] == [other.peer]
    assert other.added == head.added
    silent.compute.at_forward.open()
    await silent.settled()
    assert silent.added == []
    silent.cable.thawed.set()


def test_a_stage_that_is_only_busy_is_not_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to a microbatch that has been on its way for longer than all may be failing."""
    monkeypatch.setattr("stage.nexthop.PATIENCE_S", 0.0)

    async def main() -> None:
        async with swarm(slots=1) as made:
            made.heads[0].compute.at_forward.shut()
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(made.train)
                await until(lambda: len(made.trainer.of(Busy)) >= 4)
                made.heads[0].compute.at_forward.open()
            assert len(made.heads[0].added) == 3

    trio.run(main)


@with_swarm(tails=2)
async def test_a_callee_whose_connection_closes_is_left_at_once(swarm: Swarm) -> None:
    """It does not wait for the lease: who ended the connection has ended what it did for the caller."""
    head = swarm.heads[0]
    for tail in swarm.tails:
        tail.compute.at_forward.shut()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(swarm.train)
        await until(lambda: any(tail.compute.forwards for tail in swarm.tails))
        cut, other = sorted(swarm.tails, key=lambda tail: -len(tail.compute.forwards))
        other.compute.at_forward.open()
        cut.cable.cut()
        cut_at = time.time()
    assert other.compute.forwards[0][0] - cut_at < LEASE_S / 2
    assert other.added == head.added
    cut.compute.at_forward.open()
    await cut.settled()
    assert cut.added == []


@with_swarm(tails=2)
async def test_a_gradient_that_is_refused_is_added_nowhere_and_the_work_done_elsewhere(swarm: Swarm) -> None:
    bad, good = swarm.tails
    bad.compute.refuses_gradients = True
    for _ in range(2):
        await swarm.train()
    assert bad.added == []
    assert len(good.added) == len(swarm.heads[0].added) == 2


# Nobody there


@with_swarm()
async def test_an_empty_stage_is_said_at_once_and_changes_nothing(swarm: Swarm) -> None:
    head = swarm.heads[0]
    swarm.show(head)
    with pytest.raises(NoReplicaError) as later:
        await swarm.train()
    assert later.value.stage == 1
    await head.settled()
    assert head.added == []
    assert swarm.trainer.router._replicas[head.peer].virtual == 0, "it is not charged for that"
    swarm.show()
    with pytest.raises(NoReplicaError) as first:
        await swarm.train()
    assert first.value.stage == 0
    swarm.show(head, *swarm.tails)
    await swarm.train()
    assert len(head.added) == 1


def test_a_stage_whose_replicas_all_fail_counts_as_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.nexthop, "PATIENCE_S", 0.3)

    @with_swarm()
    async def run(swarm: Swarm) -> None:
        head, tail = swarm.heads[0], swarm.tails[0]
        tail.serving = False
        with pytest.raises(NoReplicaError), trio.fail_after(5):
            await swarm.train()
        await head.settled()
        assert head.added == []

    run()


@with_swarm()
async def test_no_replica_is_the_word_on_the_wire(swarm: Swarm) -> None:
    head = swarm.heads[0]
    swarm.show(head)
    async with asking(swarm.trainer, head, swarm.request(), [IDS]) as call:
        assert isinstance(await reply(call), Accepted)
        assert await reply(call) == NoReplica(stage=1)
