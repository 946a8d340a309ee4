"""Microbatches over real hosts on loopback: who is served, what is added, and that no slot ever leaks.

A trainer, heads (stage 0) and tails (stage 1) with a fake ``Compute``. Its passes can be held at a gate, so
that a caller or callee disappears exactly then; the cable of a node can be frozen (nothing passes, nobody
is told) or cut (as after kill -9). Every test ends with every slot free again, every held microbatch
released, and no handler that failed.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import attrs
import msgpack
import pytest
import trio

import stage.microbatch
import stage.nexthop
import stage.work
from p2p.errors import DialError, PeerGone, Refused, RemoteError
from p2p.event import Event
from p2p.host import Host
from p2p.host_events import HandlerFailed
from p2p.identity import Identity, PeerId
from p2p.limits import Limits
from p2p.membership import Membership, Trust, issue
from p2p.multiaddr import Multiaddr
from p2p.records import StageRecord
from p2p.rpc import Call
from p2p.transport import Accept, Listener, TcpTransport
from stage import receipts
from stage.clock import Reading, StepClock
from stage.device import Device
from stage.events import Busy, MicrobatchAdded, Rerouted, ReusedStale
from stage.messages import (
    PROTOCOL,
    Accepted,
    Answer,
    BusyReply,
    Load,
    NoReplica,
    Progress,
    Reply,
    Request,
    reply_from_wire,
)
from stage.microbatch import MicrobatchServer, Shape
from stage.nexthop import LEASE_S, NextHop, NoReplicaError, Passed
from stage.roster import Entry, StageView
from stage.router import Router
from stage.ticket import Ticket
from stage.traffic import BoundaryCount

ANY = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
PATIENCE_S = 15.0
TOKENS, BOUNDARY, LIKELIEST = 4, 8, 24
IDS = bytes(4 * (TOKENS + 1))
LIMITS = Limits(watched_ping_s=0.1, watched_silence_s=0.6)


@pytest.fixture(autouse=True)
def short_lives_of_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody comes for them here."""
    monkeypatch.setattr(stage.work, "ORPHAN_S", 0.3)


def identity_of(name: str) -> Identity:
    return Identity.generate(hashlib.sha256(name.encode()).digest())


AUTHORITY, TRAINER = identity_of("authority"), identity_of("trainer")
TRUST = Trust(
    run="run",
    manifest_hash=bytes(32),
    authorities=frozenset({AUTHORITY.peer_id}),
    standing={TRAINER.peer_id: "trainer"},
)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what no event tells, within a bound."""
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


class Wire(trio.abc.Stream):
    """One end of a connection whose cable somebody may freeze or cut."""

    def __init__(self, stream: trio.abc.Stream, cable: Cable) -> None:
        self._stream, self._cable = stream, cable
        cable.wires.append(self)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._cable.thawed.wait()
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        await self._cable.thawed.wait()
        return data

    async def aclose(self) -> None:
        if self._cable.thawed.is_set():
            await self._stream.aclose()
        else:
            self._cable.closing.append(self._stream)  # nor does the other end hear of this

    def cut(self) -> None:
        assert isinstance(self._stream, trio.SocketStream)
        self._stream.socket.close()


class Cable:
    """TCP of one node."""

    def __init__(self) -> None:
        self._tcp = TcpTransport()
        self.wires: list[Wire] = []
        self.closing: list[trio.abc.Stream] = []
        self.dead = False
        self.thawed = trio.Event()
        self.thawed.set()

    def freeze(self) -> None:
        self.thawed = trio.Event()

    def cut(self) -> None:
        self.dead = True
        for wire in self.wires:
            wire.cut()

    def speaks(self, addr: Multiaddr) -> bool:
        return self._tcp.speaks(addr)

    async def dial(self, addr: Multiaddr) -> trio.abc.Stream:
        if self.dead:
            raise DialError("the cable is cut")
        return Wire(await self._tcp.dial(addr), self)

    async def listen(self, addr: Multiaddr) -> Listener:
        return Socket(await self._tcp.listen(addr), self)


class Socket:
    """A listening socket behind a cable."""

    def __init__(self, listener: Listener, cable: Cable) -> None:
        self._listener, self._cable = listener, cable

    @property
    def addr(self) -> Multiaddr:
        return self._listener.addr

    async def serve(self, accept: Accept) -> None:
        async def through_cable(stream: trio.abc.Stream, addr: str) -> None:
            if self._cable.dead:
                await trio.aclose_forcefully(stream)
            else:
                await accept(Wire(stream, self._cable), addr)

        await self._listener.serve(through_cable)

    async def aclose(self) -> None:
        await self._listener.aclose()


class Gate:
    """Where the device thread waits once it is shut."""

    def __init__(self) -> None:
        self._began = threading.Event()
        self._go = threading.Event()
        self._go.set()

    def shut(self) -> None:
        self._began.clear()
        self._go.clear()

    def open(self) -> None:
        self._go.set()

    def __call__(self) -> None:
        self._began.set()
        self._go.wait(PATIENCE_S)

    async def reached(self) -> None:
        assert await trio.to_thread.run_sync(self._began.wait, PATIENCE_S)


class FakeHeld:
    """A microbatch after its forward pass."""

    def __init__(self, compute: FakeCompute, c: bytes) -> None:
        self.loss, self.c, self.likeliest = 1.5, c, b""
        self._compute = compute
        compute.held.add(self)

    def release(self) -> None:
        self._compute.held.discard(self)


class FakeCompute:
    """Bytes in, bytes out that depend on ``weights``, and a memory of what was asked."""

    def __init__(self, shape: Shape, weights: bytes) -> None:
        self._shape = shape
        self._weights = weights
        self.forwards: list[tuple[float, Request]] = []
        self.gradients: list[bytes] = []
        self.held: set[FakeHeld] = set()
        self.at_forward, self.at_backward = Gate(), Gate()
        self.refuses_gradients = False
        self.likeliest = b""
        """What it answered last to a ticket of generation."""

    def forward(self, request: Request, ids: memoryview, c: memoryview) -> FakeHeld:
        assert (len(ids), len(c)) == (len(IDS), self._shape.c_bytes)
        self.forwards.append((time.time(), request))
        self.at_forward()
        out = hashlib.sha256(self._weights + bytes(ids) + bytes(c)).digest()
        held = FakeHeld(self, b"" if self._shape.tail else out[:BOUNDARY])
        if self._shape.tail and request.ticket.kind == "generate":
            self.likeliest = held.likeliest = out[:LIKELIEST]
        return held

    def backward(self, held: FakeHeld, dc: memoryview) -> bytes:
        assert held in self.held
        assert len(dc) == self._shape.next_back_bytes
        self.at_backward()
        if self.refuses_gradients:
            raise RemoteError("not finite")
        self.gradients.append(bytes(dc))
        return hashlib.sha256(self._weights + bytes(dc)).digest()[: self._shape.dc_bytes]


class Node:
    """A host, and what its role adds: a server for workers, a next hop for all but tails."""

    def __init__(
        self, name: str, stage: int | None, later: StageView | None, slots: int = 2, *, stages: int = 2
    ) -> None:
        self.identity = TRAINER if stage is None else identity_of(name)
        self.stage = stage
        self.stages = stages
        self.slots = slots
        self.events: list[Event] = []
        self.cable = Cable()
        self.count = BoundaryCount()
        self.skew_s = 0.0
        self.serving = True
        self.advances: list[int] = []
        self.clock = StepClock("run", frozenset({TRAINER.peer_id}), 2)
        self.device = Device()
        self.host = Host(
            self.identity,
            transport=self.cable,
            emit=self.events.append,
            clock=lambda: time.time() + self.skew_s,
            limits=LIMITS,
        )
        certificate = None
        if stage is not None:
            now = time.time()
            certificate = issue(
                AUTHORITY,
                run="run",
                account=name,
                peer_id=self.peer,
                stage=stage,
                issued=now,
                expires=now + 600,
            ).encode()
        self.certificate = certificate
        self.host.membership = Membership(TRUST, lambda: certificate, time.time)
        self.router = Router(Random(1))
        count = None if stage is None else self.count
        self.next_hop = None
        if later is not None:
            self.next_hop = NextHop(self.host, later, self.router, self.events.append, count, stages=stages)
        if stage is not None:
            self._serve(name, stage)

    def _serve(self, name: str, stage: int) -> None:
        shape = Shape(
            stage=stage,
            stages=self.stages,
            tokens=TOKENS,
            ids_bytes=len(IDS),
            c_bytes=BOUNDARY * (stage > 0),
            dc_bytes=BOUNDARY * (stage > 0),
            next_back_bytes=BOUNDARY * (stage < self.stages - 1),
            likeliest_bytes=LIKELIEST,
            dtype="fp32",
            dtype_back="fp32",
        )
        self.compute = FakeCompute(shape, name.encode())
        self.server = MicrobatchServer(
            identity=self.identity,
            run="run",
            trainers=frozenset({TRAINER.peer_id}),
            shape=shape,
            clock=self.clock,
            device=self.device,
            compute=self.compute,
            next_hop=self.next_hop,
            slots=self.slots,
            emit=self.events.append,
            serving=lambda: self.serving,
            step=lambda: self.clock.step,
            clock_advanced=lambda: self.advances.append(self.clock.step),
            count=self.count,
        )
        self.host.handle(PROTOCOL, self.server.handle, max_payload=self.server.request_bytes)

    @property
    def peer(self) -> PeerId:
        return self.identity.peer_id

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def added(self) -> list[str]:
        assert self.server.added == len(self.of(MicrobatchAdded))
        return [event.ticket for event in self.of(MicrobatchAdded)]

    def entry(self) -> Entry:
        assert self.certificate is not None
        record = StageRecord(
            addrs=tuple(str(addr) for addr in self.host.addrs),
            phase="active",
            step=0,
            slots=self.slots,
            rate=1.0,
            certificate=self.certificate,
            disagreement=None,
            snapshot_step=None,
        )
        return Entry(self.peer, record, self.host.addrs, 1.0)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.device:
            async with self.host.run([ANY]), trio.open_nursery() as nursery:
                if self.stage is not None:
                    await nursery.start(self.server.run)
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    for stream in self.cable.closing:
                        await trio.aclose_forcefully(stream)

    async def settled(self) -> None:
        """Every slot is free again, and nothing is held."""
        await until(lambda: self.server.slots_free == self.slots)
        await self.server.wait_idle()
        assert (self.server.in_progress, self.compute.held) == (0, set())


class Swarm:
    """A trainer, ``heads``, ``tails``, and ``bodies`` between them where there are any."""

    def __init__(self, heads: int, tails: int, slots: int, bodies: int = 0) -> None:
        stages = 3 if bodies else 2
        self.views = [StageView(stage) for stage in range(stages)]
        self.trainer = Node("trainer", None, self.views[0], stages=stages)
        self.heads = [Node(f"head {n}", 0, self.views[1], slots, stages=stages) for n in range(heads)]
        self.bodies = [Node(f"body {n}", 1, self.views[-1], slots, stages=stages) for n in range(bodies)]
        self.tails = [Node(f"tail {n}", stages - 1, None, slots, stages=stages) for n in range(tails)]
        self.positions = 0

    @property
    def workers(self) -> list[Node]:
        return [*self.heads, *self.bodies, *self.tails]

    def show(self, *nodes: Node) -> None:
        """The stages consist of these."""
        for view in self.views:
            view.replace({node.peer: node.entry() for node in nodes if node.stage == view.stage})

    def request(self, kind: str = "train", **fields: Any) -> Request:
        self.positions += 1
        ticket = Ticket(
            run="run", trainer=TRAINER.peer_id, kind=kind, shard=0, position=self.positions,
            ids_hash=hashlib.sha256(IDS).digest(), weight=1.0,
        ).signed_by(TRAINER)  # fmt: skip
        basic: dict[str, Any] = {
            "ticket": ticket, "clock": [], "basis": 0, "path": [TRAINER.peer_id], "tokens": TOKENS,
            "documents": [], "dtype": "fp32", "dtype_back": "fp32", "inline": True, "deadline_s": PATIENCE_S,
        }  # fmt: skip
        return Request(**(basic | fields))

    async def train(self, request: Request | None = None) -> Passed:
        """One microbatch from the trainer through the pipeline."""
        assert self.trainer.next_hop is not None
        return await self.trainer.next_hop.send(request or self.request(), [IDS], back_bytes=0)

    async def generate(self) -> Passed:
        """One token from the pipeline."""
        assert self.trainer.next_hop is not None
        request = self.request("generate", place=2)
        return await self.trainer.next_hop.send(request, [IDS], back_bytes=LIKELIEST)


@asynccontextmanager
async def swarm(heads: int = 1, tails: int = 1, slots: int = 2, bodies: int = 0) -> AsyncIterator[Swarm]:
    made = Swarm(heads, tails, slots, bodies)
    nodes = [made.trainer, *made.workers]
    with trio.fail_after(2 * PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for node in nodes:
                await nursery.start(node.run)
            made.show(*made.workers)
            try:
                yield made
                for worker in made.workers:
                    worker.compute.at_forward.open()
                    worker.compute.at_backward.open()
                    await worker.settled()
            finally:
                for worker in made.workers:  # or the device threads could not be joined
                    worker.compute.at_forward.open()
                    worker.compute.at_backward.open()
            nursery.cancel_scope.cancel()
    assert [event for node in nodes for event in node.of(HandlerFailed)] == []


def with_swarm(
    *arguments: Any, **options: Any
) -> Callable[[Callable[[Swarm], Awaitable[None]]], Callable[[], None]]:
    """Run an async test with a swarm of this size."""

    def decorate(body: Callable[[Swarm], Awaitable[None]]) -> Callable[[], None]:
        async def main() -> None:
            async with swarm(*arguments, **options) as made:
                await body(made)

        def run() -> None:
            trio.run(main)

        run.__doc__, run.__name__ = body.__doc__, body.__name__
        return run

    return decorate


@asynccontextmanager
async def asking(
    caller: Node, callee: Node, request: Request, payload: Any, *, path: bool = True
) -> AsyncIterator[Call]:
    """A caller by hand: the request has been sent, with its payload if it says so."""
    if path and caller.stage is not None:
        request = attrs.evolve(request, path=[*request.path, caller.peer])
    call = await caller.host.call(callee.peer, PROTOCOL, addrs=callee.host.addrs, deadline=5.0)
    async with call:
        await call.send(request.to_wire(), payload if request.inline else b"")
        yield call


async def reply(call: Call, max_payload: int = 0) -> Reply:
    return reply_from_wire((await call.receive(max_payload=max_payload)).header)


def waiting_at(node: Node) -> int:
    """Calls that wait for work there."""
    return sum(len(work.callers) for work in node.server._working.values())


async def ask(caller: Node, callee: Node, request: Request, payload: Any) -> tuple[Answer, bytes]:
    async with asking(caller, callee, request, payload) as call:
        assert isinstance(await reply(call), Accepted)
        while True:
            message = await call.receive(max_payload=BOUNDARY)
            answer = reply_from_wire(message.header)
            if not isinstance(answer, Progress):
                assert isinstance(answer, Answer)
                return answer, bytes(message.payload)


C = bytes(range(BOUNDARY))
OTHER_C = bytes(BOUNDARY)


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


async def send_on(node: Node, request: Request) -> Passed:
    assert node.next_hop is not None
    return await node.next_hop.send(request, [IDS, C], back_bytes=BOUNDARY)


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


async def disappear(how: str, call: Call, caller: Node, callee: Node) -> None:
    """On return the callee has seen it."""
    connection = callee.host.connections[caller.peer]
    match how:
        case "reset":
            call.reset()
            await connection.ping(PATIENCE_S)  # the answer comes behind the reset
        case "word":  # a caller has nothing more to say: this is a cancel, whatever it says
            await call.send({"t": "refused", "code": "x", "why": "y", "retry_after": None})
            await connection.ping(PATIENCE_S)
        case "cut":
            caller.cable.cut()
            await until(lambda: connection.why_closed)
        case _:
            await trio.sleep(0.25)  # its deadline passes


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


def test_headers_are_small() -> None:
    """What is not payload is counted as control; it should stay a few hundred bytes."""
    swarm = Swarm(0, 0, 1)
    assert len(msgpack.packb(swarm.request().to_wire())) < 600
