"""Pipelines of real hosts on loopback: a trainer, heads (stage 0), bodies where there are any, and tails.

``Compute`` is a fake whose passes can be held at a gate, so that a caller or callee disappears exactly then;
cables can be frozen or cut (``cables``). A swarm ends with every slot free again, every held microbatch
released, and no handler that failed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import attrs
import trio

from p2p.event import Event
from p2p.host import Host
from p2p.host_events import HandlerFailed
from p2p.identity import Identity, PeerId
from p2p.limits import Limits
from p2p.membership import Membership, Trust, issue
from p2p.multiaddr import Multiaddr
from p2p.records import StageRecord
from p2p.rpc import Call
from stage.clock import StepClock
from stage.device import Device
from stage.events import MicrobatchAdded
from stage.messages import PROTOCOL, Accepted, Answer, Progress, Reply, Request, reply_from_wire
from stage.microbatch import MicrobatchServer, Shape
from stage.nexthop import NextHop, Passed
from stage.roster import Entry, StageView
from stage.router import Router
from stage.ticket import Ticket
from stage.traffic import BoundaryCount
from tests.net.cables import Cable
from tests.net.fake_compute import BOUNDARY, IDS, LIKELIEST, PATIENCE_S, TOKENS, C, FakeCompute

ANY = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")
LIMITS = Limits(watched_ping_s=0.1, watched_silence_s=0.6)


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


async def send_on(node: Node, request: Request) -> Passed:
    assert node.next_hop is not None
    return await node.next_hop.send(request, [IDS, C], back_bytes=BOUNDARY)


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
