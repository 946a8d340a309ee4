"""Microbatches that nobody should serve, and answers that nobody should believe."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import attrs
import pytest
import trio

import stage.microbatch
import stage.nexthop
import stage.work
from p2p.errors import PeerGone, Refused, RemoteError
from p2p.host import Host
from p2p.membership import Membership
from p2p.rpc import Call
from stage import receipts
from stage.clock import Reading
from stage.events import Rerouted
from stage.messages import PROTOCOL, Accepted, Answer, Load, Request
from stage.nexthop import LEASE_S
from tests.net.fake_compute import BOUNDARY, IDS, PATIENCE_S, TOKENS, C
from tests.net.pipelines import (
    TRAINER,
    TRUST,
    Swarm,
    ask,
    asking,
    identity_of,
    reply,
    send_on,
    until,
    with_swarm,
)


@pytest.fixture(autouse=True)
def short_lives_of_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody comes for them here."""
    monkeypatch.setattr(stage.work, "ORPHAN_S", 0.3)


# What is not served


@with_swarm(heads=2)
async def test_microbatches_come_from_the_stage_before_only(swarm: Swarm) -> None:
    (one, two), tail = swarm.heads, swarm.tails[0]
    for caller, callee, payload in ((swarm.trainer, tail, [IDS, C]), (one, two, [IDS]), (tail, one, [IDS])):
        async with asking(caller, callee, swarm.request(), payload) as call:
            with pytest.raises(Refused) as refusal:
                await call.receive()
            assert refusal.value.code == "wrong_hop"
    assert all(not node.compute.forwards for node in swarm.workers)


@with_swarm()
async def test_no_certificate_is_no_hop(swarm: Swarm) -> None:
    head = swarm.heads[0]
    guest = Host(identity_of("guest"))
    guest.membership = Membership(TRUST, lambda: None, time.time)
    async with guest.run():
        call = await guest.call(head.peer, PROTOCOL, addrs=head.host.addrs, deadline=5.0)
        async with call:
            await call.send(swarm.request(path=[guest.peer_id]).to_wire(), IDS)
            with pytest.raises(Refused) as refusal:
                await call.receive()
            assert refusal.value.code == "no_certificate"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"tokens": TOKENS + 1}, "wrong_shape"),
        ({"basis": 1}, "wrong_basis"),
        ({"dtype": "bf16"}, "wrong_dtype"),
        ({"dtype_back": "int8"}, "wrong_dtype"),
    ],
)
def test_another_shape_is_refused(fields: dict[str, Any], code: str) -> None:
    @with_swarm()
    async def run(swarm: Swarm) -> None:
        async with asking(swarm.trainer, swarm.heads[0], swarm.request(**fields), [IDS]) as call:
            with pytest.raises(Refused) as refusal:
                await call.receive()
            assert refusal.value.code == code

    run()


def forged(request: Request, what: str) -> Request:
    ticket = request.ticket
    match what:
        case "signature":
            ticket = attrs.evolve(ticket, signature=bytes(64))
        case "hash":
            ticket = attrs.evolve(ticket, ids_hash=bytes(32)).signed_by(TRAINER)
        case "run":
            ticket = attrs.evolve(ticket, run="another").signed_by(TRAINER)
        case "signer":
            stranger = identity_of("stranger")
            ticket = attrs.evolve(ticket, trainer=stranger.peer_id).signed_by(stranger)
        case "sender":
            return attrs.evolve(request, path=[TRAINER.peer_id])
        case "clock":
            reading = Reading.signed(identity_of("stranger"), "run", 100)
            return attrs.evolve(request, clock=[reading])
    return attrs.evolve(request, ticket=ticket)


async def to_the_end(call: Call, late: Any) -> None:
    """Accepted or not, the callee is expected to drop the stream."""
    assert isinstance(await reply(call), Accepted)
    if late is not None:
        await call.send({"t": "payload"}, late)
    await call.receive()


@pytest.mark.parametrize("what", ["signature", "hash", "run", "signer", "sender", "clock"])
@pytest.mark.parametrize("inline", [True, False])
def test_a_forged_request_drops_the_stream_and_computes_nothing(what: str, inline: bool) -> None:
    @with_swarm()
    async def run(swarm: Swarm) -> None:
        head, tail = swarm.heads[0], swarm.tails[0]
        request = swarm.request(path=[TRAINER.peer_id, head.peer], inline=inline)
        async with asking(head, tail, forged(request, what), [IDS, C], path=False) as call:
            with pytest.raises(RemoteError):
                await to_the_end(call, None if inline else [IDS, C])
        await tail.settled()
        assert not tail.compute.forwards
        assert tail.advances == []
        await ask(head, tail, swarm.request(), [IDS, C])  # the connection still serves

    run()


@pytest.mark.parametrize("payload", [b"", IDS, [IDS, C[1:]], [IDS, C, b"x"]])
@pytest.mark.parametrize("inline", [True, False])
def test_a_payload_of_another_size_drops_the_stream(payload: Any, inline: bool) -> None:
    @with_swarm()
    async def run(swarm: Swarm) -> None:
        head, tail = swarm.heads[0], swarm.tails[0]
        async with asking(head, tail, swarm.request(inline=inline), payload) as call:
            with pytest.raises(PeerGone):
                await to_the_end(call, None if inline else payload)
        await tail.settled()
        assert not tail.compute.forwards

    run()


@pytest.mark.parametrize("header", [{}, {"t": "answer"}, {"t": "microbatch"}])
def test_a_header_of_nonsense_drops_the_stream(header: dict[str, Any]) -> None:
    @with_swarm()
    async def run(swarm: Swarm) -> None:
        head, tail = swarm.heads[0], swarm.tails[0]
        call = await head.host.call(tail.peer, PROTOCOL, addrs=tail.host.addrs, deadline=5.0)
        async with call:
            await call.send(header)
            with pytest.raises(PeerGone):
                await call.receive()

    run()


def test_a_payload_that_never_comes_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.microbatch, "PAYLOAD_S", 0.2)

    @with_swarm()
    async def run(swarm: Swarm) -> None:
        head, tail = swarm.heads[0], swarm.tails[0]
        async with asking(head, tail, swarm.request(inline=False, deadline_s=600.0), b"") as call:
            assert isinstance(await reply(call), Accepted)
            with pytest.raises(PeerGone), trio.fail_after(PATIENCE_S / 2):
                await call.receive()
        await tail.settled()

    run()


@with_swarm(tails=2)
async def test_a_replica_that_does_not_serve_is_left_for_one_that_does(swarm: Swarm) -> None:
    head = swarm.heads[0]
    swarm.tails[0].serving = False
    for _ in range(4):
        await swarm.train()
    assert swarm.tails[0].added == []
    assert len(swarm.tails[1].added) == 4
    assert all(
        (event.from_, event.to, event.why) == (swarm.tails[0].peer, swarm.tails[1].peer, "not_serving")
        for event in head.of(Rerouted)
    )


# Hostile callees


@pytest.mark.parametrize(
    "lie",
    [
        {"path": []}, {"path": ["somebody", "else"]}, {"c_hash": bytes(32)}, {"c_hash": b""}, {"loss": -1.0},
        {"dc": b""}, {"dc": bytes(BOUNDARY + 1)}, {"t": "busy"}, {"t": "accepted"}, {"t": "nonsense"},
        {"receipts": []}, {"receipts": [bytes(64)]}, {"receipts": [b""]}, {"receipts": "other caller"},
        {"receipts": "other ticket"}, {"receipts": "twice"},
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_true_is_asked_for_elsewhere(
    lie: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage.nexthop, "LEASE_S", 0.1)

    @with_swarm(tails=2)
    async def run(swarm: Swarm) -> None:
        head, (liar, honest) = swarm.heads[0], swarm.tails

        async def handle(call: Call) -> None:
            request = Request.from_wire((await call.receive(max_payload=100)).header)
            await call.send(Accepted(load=Load(1)).to_wire())
            await call.receive(max_payload=100)
            path = [*request.path, liar.peer]
            c_hash = hashlib.sha256(C).digest()
            other = attrs.evolve(request.ticket, position=request.ticket.position + 1)
            true = receipts.sign(liar.identity, request.ticket, 1, call.peer)
            lies = {
                "other caller": [receipts.sign(liar.identity, request.ticket, 1, honest.peer)],
                "other ticket": [receipts.sign(liar.identity, other, 1, call.peer)],
                "twice": [true, true],
            }
            answer = Answer(
                loss=1.0, c_hash=c_hash, path=path, load=Load(1), stale=False, receipts=[true]
            ).to_wire()
            answer |= lie
            answer["receipts"] = lies.get(str(answer["receipts"]), answer["receipts"])
            dc = answer.pop("dc", bytes(BOUNDARY))
            await call.send(answer, dc)

        liar.host._server._handlers[PROTOCOL] = attrs.evolve(
            liar.host._server._handlers[PROTOCOL], handler=handle
        )
        swarm.show(head, liar)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_on, head, swarm.request(path=[TRAINER.peer_id, head.peer]))
            await until(lambda: head.router.wait_s(trio.current_time()))
            swarm.show(head, honest)
        assert len(honest.added) == 1
        assert [(event.from_, event.to) for event in head.of(Rerouted)] == [(liar.peer, honest.peer)]

    run()


def test_who_does_not_accept_in_time_is_told_at_once_that_it_was_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It answers pings, so its lease would last: the reset must not wait for the lease to run out."""
    monkeypatch.setattr(stage.nexthop, "ACCEPT_S", 0.1)

    @with_swarm(tails=2)
    async def run(swarm: Swarm) -> None:
        head, (slow, honest) = swarm.heads[0], swarm.tails
        told_s: list[float] = []

        async def handle(call: Call) -> None:
            await call.receive(max_payload=100)
            try:
                await call.receive()
            finally:
                told_s.append(time.time())

        slow.host._server._handlers[PROTOCOL] = attrs.evolve(
            slow.host._server._handlers[PROTOCOL], handler=handle
        )
        swarm.show(head, slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_on, head, swarm.request(path=[TRAINER.peer_id, head.peer]))
            await until(lambda: told_s)
            swarm.show(head, honest)
        assert honest.compute.forwards[0][0] - told_s[0] > LEASE_S / 2
        assert [event.why for event in head.of(Rerouted)] == ["timeout"]

    run()
