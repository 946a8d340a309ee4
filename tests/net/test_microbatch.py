"""Microbatches over real hosts on loopback: who is served, what is added, and that no slot ever leaks."""

from __future__ import annotations

import hashlib

import attrs
import msgpack
import pytest
import trio

import stage.work
from p2p.identity import PeerId
from stage.clock import Reading
from stage.events import Busy, MicrobatchAdded, Rerouted, ReusedStale
from stage.messages import Accepted, Answer, BusyReply
from stage.nexthop import Passed
from tests.net.fake_compute import BOUNDARY, IDS, OTHER_C, C
from tests.net.pipelines import (
    TRAINER,
    Node,
    Swarm,
    ask,
    asking,
    disappear,
    reply,
    send_on,
    until,
    waiting_at,
    with_swarm,
)


@pytest.fixture(autouse=True)
def short_lives_of_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody comes for them here."""
    monkeypatch.setattr(stage.work, "ORPHAN_S", 0.3)


# The way of a microbatch


@with_swarm()
async def test_a_microbatch_is_added_once_a_stage_and_its_path_names_who(swarm: Swarm) -> None:
    head, tail = swarm.heads[0], swarm.tails[0]
    for number in range(3):
        passed = await swarm.train()
        assert passed.answer.path == [TRAINER.peer_id, head.peer, tail.peer]
        assert (passed.answer.loss, passed.answer.stale, bytes(passed.dc)) == (1.5, False, b"")
        assert passed.answer.load.slots == head.slots
        assert head.added == tail.added == [f"train:0:{n + 1}" for n in range(number + 1)]
    # The tail's gradient is what reached the head, and bytes are those of the formula.
    assert head.compute.gradients[0] == hashlib.sha256(b"tail 0").digest()[:BOUNDARY]
    assert (head.count.forward_hops, head.count.bytes) == (3, 3 * (len(IDS) + BOUNDARY))
    assert (tail.count.backward_hops, tail.count.bytes) == (3, 3 * BOUNDARY)
    assert swarm.trainer.count.bytes == 0


@with_swarm(slots=1)
async def test_the_payload_goes_along_once_a_slot_is_known_to_be_free(swarm: Swarm) -> None:
    for _ in range(3):
        await swarm.train()
    for node in swarm.workers:
        assert [request.inline for _, request in node.compute.forwards] == [False, True, True]


@with_swarm()
async def test_the_clock_travels_with_the_work(swarm: Swarm) -> None:
    head, tail = swarm.heads[0], swarm.tails[0]
    for samples in (1, 2, 2, 5):
        await swarm.train(swarm.request(clock=[Reading.signed(TRAINER, "run", samples)]))
    assert head.advances == tail.advances == [1, 2]
    assert [event.step for event in tail.of(MicrobatchAdded)] == [0, 1, 1, 2]


@with_swarm()
async def test_evaluation_is_never_added_nor_kept(swarm: Swarm) -> None:
    head, tail = swarm.heads[0], swarm.tails[0]
    request = swarm.request("eval")
    for _ in range(2):
        passed = await swarm.train(request)
        assert passed.answer.loss == 1.5
    assert head.added == tail.added == []
    assert len(head.compute.forwards) == len(tail.compute.forwards) == 2
    assert head.compute.gradients == tail.compute.gradients == []
    assert tail.count.backward_hops == 0


@with_swarm(bodies=1)
async def test_generation_brings_what_the_tail_answers_and_leaves_no_trace(swarm: Swarm) -> None:
    passed = await swarm.generate()
    assert bytes(passed.dc) == swarm.tails[0].compute.likeliest
    assert [request.place for _, request in swarm.tails[0].compute.forwards] == [2]
    for node in swarm.workers:
        assert (node.added, node.compute.gradients, node.count.backward_hops) == ([], [], 0)
        assert passed.answer.path.count(node.peer) == 1


@with_swarm(tails=2)
async def test_generation_goes_to_another_replica_where_one_is_lost(swarm: Swarm) -> None:
    first = swarm.tails[0]
    swarm.show(swarm.heads[0], first)
    first.compute.at_forward.shut()
    answers: list[Passed] = []

    async def ask() -> None:
        answers.append(await swarm.generate())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await first.compute.at_forward.reached()
        swarm.show(*swarm.workers)
        first.cable.cut()
        await until(lambda: answers)
    assert bytes(answers[0].dc) == swarm.tails[1].compute.likeliest
    assert [event.from_ for event in swarm.heads[0].of(Rerouted)] == [first.peer]


# Room


@with_swarm(slots=1)
async def test_busy_at_once_when_no_slot_is_free_and_the_slot_comes_back(swarm: Swarm) -> None:
    tail, head = swarm.tails[0], swarm.heads[0]
    tail.compute.at_forward.shut()
    async with asking(head, tail, swarm.request(), [IDS, C]) as first:
        accepted = await reply(first)
        assert isinstance(accepted, Accepted)
        assert accepted.load.slots == 0
        await tail.compute.at_forward.reached()
        async with asking(head, tail, swarm.request(), [IDS, C]) as second:
            busy = await reply(second)
            assert isinstance(busy, BusyReply)
            assert busy.retry_after_s > 0
        assert len(tail.compute.forwards) == 1
        tail.compute.at_forward.open()
        answer = await reply(first, BOUNDARY)
        assert isinstance(answer, Answer)
        assert answer.load.slots == 1


@with_swarm(tails=2, slots=1)
async def test_who_is_busy_is_passed_over_and_nothing_counts_as_rerouted(swarm: Swarm) -> None:
    head = swarm.heads[0]
    async with trio.open_nursery() as nursery:
        for tail in swarm.tails:
            tail.compute.at_forward.shut()
        assert head.next_hop is not None
        for _ in range(3):
            request = swarm.request(path=[TRAINER.peer_id, head.peer])
            nursery.start_soon(send_on, head, request)
        for tail in swarm.tails:
            await tail.compute.at_forward.reached()
        await until(lambda: head.of(Busy))
        for tail in swarm.tails:
            tail.compute.at_forward.open()
    assert sum(len(tail.added) for tail in swarm.tails) == 3
    assert head.of(Rerouted) == []


# Idempotence


@with_swarm(heads=2, slots=1)
async def test_a_known_ticket_is_joined_even_with_no_slot_free(swarm: Swarm) -> None:
    tail = swarm.tails[0]
    tail.compute.at_forward.shut()
    request, answers = swarm.request(), dict[PeerId, tuple[Answer, bytes]]()

    async def one(head: Node) -> None:
        answers[head.peer] = await ask(head, tail, request, [IDS, C])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, swarm.heads[0])
        await tail.compute.at_forward.reached()
        nursery.start_soon(one, swarm.heads[1])
        await until(lambda: waiting_at(tail) == 2)
        tail.compute.at_forward.open()
    assert len(tail.compute.forwards) == len(tail.added) == 1
    assert len({dc for _, dc in answers.values()}) == 1
    for head in swarm.heads:
        answer = answers[head.peer][0]
        assert answer.path == [TRAINER.peer_id, head.peer, tail.peer], "each caller is named to its own"
        assert not answer.stale


@with_swarm(heads=2)
async def test_work_goes_on_for_who_joined_when_the_first_caller_goes(swarm: Swarm) -> None:
    tail = swarm.tails[0]
    tail.compute.at_forward.shut()
    request = swarm.request()
    async with trio.open_nursery() as nursery:
        async with asking(swarm.heads[0], tail, request, [IDS, C]) as first:
            await tail.compute.at_forward.reached()
            nursery.start_soon(ask, swarm.heads[1], tail, request, [IDS, C])
            await until(lambda: waiting_at(tail) == 2)
            await disappear("reset", first, swarm.heads[0], tail)
        tail.compute.at_forward.open()
    assert len(tail.compute.forwards) == 1
    assert tail.added == [request.ticket.id]


@with_swarm(heads=2)
async def test_a_kept_answer_is_given_again_and_reused_once_for_another_c(swarm: Swarm) -> None:
    tail, (one, two) = swarm.tails[0], swarm.heads
    request = swarm.request()
    first, dc = await ask(one, tail, request, [IDS, C])
    assert await ask(one, tail, request, [IDS, C]) == (first, dc)
    same, dc_same = await ask(two, tail, request, [IDS, C])
    assert (same.stale, dc_same, same.path[1]) == (False, dc, two.peer)
    assert first.c_hash == hashlib.sha256(C).digest()
    stale, dc_stale = await ask(two, tail, request, [IDS, OTHER_C])
    assert (stale.stale, dc_stale, stale.c_hash) == (True, dc, first.c_hash)
    assert tail.added == [request.ticket.id]
    assert [event.ticket for event in tail.of(ReusedStale)] == [request.ticket.id]
    # A second time the work is done again; that answer is kept instead.
    again, _ = await ask(one, tail, request, [IDS, OTHER_C])
    assert not again.stale
    assert again.c_hash == hashlib.sha256(OTHER_C).digest()
    assert tail.added == [request.ticket.id] * 2
    assert len(tail.of(ReusedStale)) == 1


@with_swarm(heads=2, slots=1)
async def test_staleness_is_told_to_the_trainer(swarm: Swarm) -> None:
    """A replacement head computes another ``c``; the tail has its answer to the first one's."""
    one, two = swarm.heads
    request = swarm.request()
    swarm.show(one, *swarm.tails)
    assert not (await swarm.train(request)).answer.stale
    swarm.show(two, *swarm.tails)
    passed = await swarm.train(request)
    assert passed.answer.stale
    assert passed.answer.path == [TRAINER.peer_id, two.peer, swarm.tails[0].peer]
    assert (one.added, two.added, swarm.tails[0].added) == ([request.ticket.id],) * 3


@with_swarm()
async def test_kept_answers_are_bounded(swarm: Swarm) -> None:
    tail, head = swarm.tails[0], swarm.heads[0]
    tail.server.kept.most = 2
    requests = [swarm.request() for _ in range(3)]
    for request in requests:
        await ask(head, tail, request, [IDS, C])
    await ask(head, tail, requests[1], [IDS, C])
    assert len(tail.compute.forwards) == 3
    await ask(head, tail, requests[0], [IDS, C])
    assert len(tail.compute.forwards) == 4, "the oldest answer was let go"


@with_swarm()
async def test_a_trainer_that_began_anew_with_other_data_gets_no_old_answer(swarm: Swarm) -> None:
    head = swarm.heads[0]
    request = swarm.request()
    await swarm.train(request)
    ids = bytes(range(len(IDS)))
    other = attrs.evolve(request.ticket, ids_hash=hashlib.sha256(ids).digest()).signed_by(TRAINER)
    await ask(swarm.trainer, head, attrs.evolve(request, ticket=other), [ids])
    assert len(head.compute.forwards) == 2


def test_headers_are_small() -> None:
    """What is not payload is counted as control; it should stay a few hundred bytes."""
    swarm = Swarm(0, 0, 1)
    assert len(msgpack.packb(swarm.request().to_wire())) < 600
