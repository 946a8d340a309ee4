"""Serving microbatches: the callee's side of ``/agora/microbatch/1``.

A microbatch goes through these states, and only the commit changes anything that lasts:

    asked -> busy | refused                      no room, or not for us
    asked -> joined -> answered                  a ticket that we work on or have answered
    asked -> accepted -> forward -> passed on -> gradient here -> commit -> backward -> answered
                                                                  `-> dropped: nothing was added

*Work* belongs to the ticket, not to the call that brought it. Calls join it and leave it. Once its last
caller told us to stop (it ended the stream on a connection that lives), or its deadline passed, the work is
dropped, here and by the calls that it made. One whose caller was lost with its connection is an *orphan*: it
goes on for ``stage.work.ORPHAN_S``, or until its slot is needed, since the replacement of that caller is told
whom to ask, and joins. As soon as a microbatch is accepted by the next stage, callers hear by whom
(``Progress``), so that they can tell a replacement if we are lost.

*Commit*: gradients enter the accumulator from the start of the backward pass, so that is the point
of no return. It is entered only on a fresh lease (a ping that we sent less than 1.5 s ago was answered on the
connection of a caller that still waits); that is looked at on the device thread, right
before the pass. A caller that vanished therefore either gets this answer, or re-routes after our lease
ran out, or (the one fault allowed) its connection broke during our backward pass and the
microbatch counts twice.

*Answers* are kept for a while (``stage.kept``): a caller that lost us mid-answer, or a replacement of it,
gets the kept answer, its path rewritten to begin with this caller's and signed for this caller
(``stage.receipts``). If its ``c`` differs from the one that the answer belongs to, the answer is reused once
and counted as stale; a second time the work is done again. The same holds for work that is joined.

Limits: ``slots`` microbatches in progress; callers that join hold none, each connection has its bound on
calls; ``MAX_ANSWERS`` kept answers and ``MAX_ANSWER_BYTES`` of gradients in them, one payload of the exact
size that the run's shape gives, ``PAYLOAD_S`` for a caller to deliver what it announced. Torch-free:
``Compute`` is what touches tensors.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import attrs
import trio

from p2p.errors import P2PError, Refused, RemoteError
from p2p.event import Emit
from p2p.identity import Identity, PeerId
from p2p.rpc import Call
from stage import receipts
from stage.appointments import Appointments
from stage.clock import StepClock
from stage.device import BACKWARD, FORWARD, Device
from stage.events import MicrobatchAdded, Reused, ReusedStale
from stage.kept import Kept, KeptAnswers
from stage.messages import BASIS, MAX_PATH, Accepted, Answer, BusyReply, Load, NoReplica, Progress, Request
from stage.nexthop import NextHop, NoReplicaError
from stage.traffic import BoundaryCount
from stage.work import Work

T = TypeVar("T")

PAYLOAD_S = 30.0
"""For a header and its payload to arrive; what was promised and does not come must not hold a slot."""
SERVICE_ALPHA = 0.2
"""Weight of the newest microbatch in the average of what one takes."""
LEASE_WAIT_S = 0.1
"""How long to wait for the next ping's answer before looking at the lease again."""


class Held(Protocol):
    """A microbatch after its forward pass, holding what the backward pass needs."""

    loss: float
    """Mean loss a token (tail only)."""
    c: Any
    """Packed boundary for the next stage (empty at the tail)."""
    likeliest: Any
    """Of a ticket of generation, at the tail: what ``stage.likeliest`` packs; else empty."""

    def release(self) -> None:
        """Forget the graph. Safe to call twice."""


class Compute(Protocol):
    """What runs on the device thread."""

    def forward(self, request: Request, ids: memoryview, c: memoryview) -> Held: ...

    def backward(self, held: Any, dc: memoryview) -> Any:
        """Adds the microbatch's gradient and returns the packed gradient of the stage's input."""


@attrs.frozen(kw_only=True)
class Shape:
    """What every microbatch of the run looks like at this stage, in bytes."""

    stage: int
    stages: int
    tokens: int
    ids_bytes: int
    c_bytes: int
    """Packed ``c`` from the previous stage (0 at the head)."""
    dc_bytes: int
    """Packed ``dc`` towards the previous stage (0 at the head)."""
    next_back_bytes: int
    """Packed ``dc`` expected from the next stage (0 at the tail)."""
    likeliest_bytes: int
    """What the tail answers to a ticket of generation."""
    dtype: str
    dtype_back: str

    def answer_bytes(self, kind: str) -> int:
        """Exact payload of the next stage's answer to a ticket of this kind."""
        return {"train": self.next_back_bytes, "generate": self.likeliest_bytes}.get(kind, 0)

    @property
    def head(self) -> bool:
        return self.stage == 0

    @property
    def tail(self) -> bool:
        return self.stage == self.stages - 1


class MicrobatchServer:
    """Handler of ``/agora/microbatch/1`` at one replica."""

    def __init__(
        self,
        *,
        identity: Identity,
        run: str,
        trainers: frozenset[PeerId],
        shape: Shape,
        clock: StepClock,
        device: Device,
        compute: Compute,
        next_hop: NextHop | None,
        slots: int,
        emit: Emit,
        serving: Callable[[], bool],
        step: Callable[[], int],
        clock_advanced: Callable[[], None],
        count: BoundaryCount,
    ) -> None:
        self._identity = identity
        self._peer_id = identity.peer_id
        self._run = run
        self._trainers = trainers
        self._shape = shape
        self._clock = clock
        self._device = device
        self._compute = compute
        self._next_hop = next_hop
        self._emit = emit
        self._serving = serving
        self._step = step
        self._clock_advanced = clock_advanced
        self._count = count
        self._working: dict[str, Work] = {}
        self._nursery: trio.Nursery | None = None
        self.kept = KeptAnswers(shape.dc_bytes)
        self.slots_free = slots
        self._appointments = Appointments()
        self.shedding = False
        """Takes no microbatch that it does not work on already."""
        self.added = 0
        """Microbatches whose gradient this replica added."""
        self.last_loss: float | None = None
        self.service_s = 0.0
        """Seconds of the device that a microbatch takes, a moving average; 0 before the first."""
        self._idle = trio.Event()
        self._idle.set()

    @property
    def request_bytes(self) -> int:
        """Exact payload of a microbatch here."""
        return self._shape.ids_bytes + self._shape.c_bytes

    @property
    def in_progress(self) -> int:
        return len(self._working)

    @property
    def load(self) -> Load:
        """What callers are told."""
        return Load(max(0, self.slots_free), len(self._working), self.service_s)

    async def wait_idle(self) -> None:
        """Until no microbatch is in progress here."""
        while self._working:
            await self._idle.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Where the work goes on while callers come and go; beside ``handle``, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def handle(self, call: Call) -> None:
        """One call: see the module's docstring."""
        size = self.request_bytes
        with trio.fail_after(PAYLOAD_S):
            message = await call.receive(max_payload=size)
        request = Request.from_wire(message.header)
        self._check(call, request)
        if self._clock.observe(request.clock):
            self._clock_advanced()
        known = request.ticket.id in self._working or request.ticket.id in self.kept
        if not known and (self.shedding or not self._room()):
            await call.send(
                BusyReply(retry_after_s=self._appointments.retry_after_s(trio.current_time())).to_wire()
            )
            return
        slot = _Slot(self, held=not known)
        try:
            with trio.move_on_after(request.deadline_s):
                await self._accepted(call, request, message.payload, slot)
        finally:
            slot.free()

    def _room(self) -> bool:
        """Whether a slot is free, or was by dropping the work that has been without a caller for longest."""
        if self.slots_free > 0:
            return True
        orphans = [work for work in self._working.values() if work.orphan and not work.scope.cancel_called]
        if orphans:
            min(orphans, key=lambda work: work.scope.deadline).scope.cancel()
        return bool(orphans)

    async def _accepted(self, call: Call, request: Request, payload: memoryview, slot: _Slot) -> None:
        """The payload, its checks, and the work."""
        size = self.request_bytes
        async with call.connection.watched():
            with trio.fail_after(PAYLOAD_S):
                await call.send(Accepted(load=self.load).to_wire())
                if not request.inline:
                    payload = (await call.receive(max_payload=size)).payload
            if len(payload) != size:
                raise RemoteError(f"microbatch: {len(payload)} bytes of payload, {size} expected")
            ids, c = payload[: self._shape.ids_bytes], payload[self._shape.ids_bytes :]
            request.ticket.check(self._run, self._trainers, ids)
            kept = await self._join_or_work(call, request, ids, c, slot)
            if kept is not None:
                await self._answer(call, request, kept)

    def _check(self, call: Call, request: Request) -> None:
        shape, member = self._shape, call.member
        if not self._serving():
            raise Refused("not_serving", "this replica takes no microbatches in its present phase", 1.0)
        before = ("trainer", None) if shape.head else ("worker", shape.stage - 1)
        if member is None or (member.role, member.stage) != before:
            raise Refused("wrong_hop", f"stage {shape.stage} takes microbatches from {before} only")
        if request.tokens != shape.tokens:
            raise Refused("wrong_shape", f"this run has {shape.tokens} tokens a microbatch")
        if request.basis != BASIS:
            raise Refused("wrong_basis", f"c is in basis {request.basis}, this replica computes in {BASIS}")
        if (request.dtype, request.dtype_back) != (shape.dtype, shape.dtype_back):
            raise Refused("wrong_dtype", f"this run's wire is {shape.dtype} / {shape.dtype_back}")
        if len(request.path) >= MAX_PATH or request.path[-1:] != [call.peer]:
            raise RemoteError("microbatch: the path is full or does not end with its sender")

    async def _join_or_work(
        self, call: Call, request: Request, ids: memoryview, c: memoryview, slot: _Slot
    ) -> Kept | None:
        """What to answer; None if the caller was told that there is no replica, or said that it is gone."""
        c_hash = b"" if self._shape.head else hashlib.sha256(c).digest()
        while True:
            kept = self.kept.reuse(request.ticket, c_hash)
            if kept is not None:
                self._reused(request, stale=kept.answer.c_hash != c_hash)
                return kept
            work = self._working.get(request.ticket.id)
            own = work is None
            if work is None:
                slot.hand_over()
                work = self._begin(request, ids, c, c_hash)
            if not await self._wait(call, work):
                return None
            if not own and work.request.ticket.ids_hash != request.ticket.ids_hash:
                continue  # a trainer that began anew, with other data
            if isinstance(work.failure, NoReplicaError):
                await call.send(NoReplica(stage=work.failure.stage).to_wire())
                return None
            if work.failure is not None:
                raise work.failure
            if work.result is not None and (own or work.c_hash == c_hash):
                if not own:
                    self._reused(request, stale=False)
                return work.result

    def _reused(self, request: Request, *, stale: bool) -> None:
        event = ReusedStale if stale else Reused
        self._emit(event(ticket=request.ticket.id, stage=self._shape.stage, replica=self._peer_id))

    async def _wait(self, call: Call, work: Work) -> bool:
        """Until the work is done, telling the caller how far it got; False if the caller ended its stream.

        A caller says nothing more after its payload: whatever comes is the end.
        """
        ended = False

        async def listen(scope: trio.CancelScope) -> None:
            nonlocal ended
            try:
                await call.receive()
            except P2PError:
                pass  # reset, or the connection is lost
            ended = True
            scope.cancel()

        failure: P2PError | None = None
        work.join(call)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen, nursery.cancel_scope)
                try:
                    await self._follow(call, work)
                except P2PError as error:
                    failure = error  # raised outside, where no nursery wraps it
                nursery.cancel_scope.cancel()
        finally:
            work.leave(call, lost=call.connection.why_closed is not None)
        if failure is not None:
            raise failure
        return not ended

    async def _follow(self, call: Call, work: Work) -> None:
        told: list[PeerId] = []
        while not work.done:
            if work.path != told:
                told = work.path
                await call.send(Progress(path=told).to_wire())
                continue
            await work.news()

    async def _answer(self, call: Call, request: Request, kept: Kept) -> None:
        path = [*request.path, *kept.answer.path]
        own = receipts.sign(self._identity, request.ticket, self._shape.stage, call.peer)
        answer = attrs.evolve(kept.answer, path=path, load=self.load, receipts=[own, *kept.answer.receipts])
        await call.send(answer.to_wire(), kept.dc)
        if len(kept.dc) and request.ticket.kind == "train":
            self._count.backward(len(kept.dc))

    def _begin(self, request: Request, ids: memoryview, c: memoryview, c_hash: bytes) -> Work:
        """Start the work; it holds a slot until it is done."""
        assert self._nursery is not None, "serving microbatches needs run()"
        work = self._working[request.ticket.id] = Work(request, ids, c, c_hash)
        if self._idle.is_set():
            self._idle = trio.Event()
        self._nursery.start_soon(self._carry, work)
        return work

    async def _carry(self, work: Work) -> None:
        """The work's own task."""
        try:
            with work.scope:
                work.result = await self._work(work)
        except Exception as error:  # whoever waits for it raises it, in the call that it costs
            work.failure = error
        finally:
            del self._working[work.request.ticket.id]
            self.slots_free += 1
            self._appointments.ended(trio.current_time())
            work.done = True
            work.tell()
            if not self._working:
                self._idle.set()

    async def _work(self, work: Work) -> Kept:
        request = work.request
        held, forward_s = await self._device.run(
            FORWARD, _timed, self._compute.forward, request, work.ids, work.c
        )
        try:
            answer = Answer(
                loss=held.loss, c_hash=work.c_hash, path=[self._peer_id], load=Load(0), stale=False
            )
            dc = memoryview(held.likeliest)
            train, ids_hash = request.ticket.kind == "train", request.ticket.ids_hash
            if self._next_hop is not None:
                so_far = [*request.path, self._peer_id]
                onward = attrs.evolve(request, path=so_far, clock=self._clock.readings)
                passed = await self._next_hop.send(
                    onward,
                    [work.ids, held.c],
                    back_bytes=self._shape.answer_bytes(request.ticket.kind),
                    passed_on=work.passed_on,
                )
                path, dc = passed.answer.path[len(request.path) :], passed.dc
                answer = attrs.evolve(passed.answer, c_hash=work.c_hash, path=path)
            if not train:
                return Kept(answer, dc, ids_hash)
            dc_in, backward_s = await self._commit(work, held, dc)
            if self._next_hop is None:  # the tail's loss comes out of the pass that makes its gradient
                answer = attrs.evolve(answer, loss=held.loss)
            # No checkpoint between the backward pass and here: what was added is always on record.
            self.added += 1
            self.last_loss = answer.loss
            took_s = forward_s + backward_s
            self.service_s += (SERVICE_ALPHA if self.service_s else 1.0) * (took_s - self.service_s)
            self._emit(
                MicrobatchAdded(
                    ticket=request.ticket.id,
                    stage=self._shape.stage,
                    replica=self._peer_id,
                    step=self._step(),
                )
            )
            kept = Kept(answer, dc_in, ids_hash)
            self.kept.add(request.ticket.id, kept)
            return kept
        finally:
            held.release()

    async def _commit(self, work: Work, held: Held, dc: memoryview) -> tuple[Any, float]:
        """Waits for a fresh lease, then the backward pass and the seconds it took."""

        def backward() -> tuple[Any, float] | None:
            return _timed(self._compute.backward, held, dc) if work.leased else None

        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            if not work.orphan:
                done = await self._device.run(BACKWARD, backward)
                if done is not None:
                    return done
            await trio.sleep(LEASE_WAIT_S)


def _timed(call: Callable[..., T], *args: Any) -> tuple[T, float]:
    """What ``call(*args)`` returns, and the seconds it took."""
    began = time.monotonic()
    return call(*args), time.monotonic() - began


class _Slot:
    """A slot that a call may hold until its work has begun, which frees it at its end."""

    def __init__(self, server: MicrobatchServer, *, held: bool) -> None:
        self._server = server
        self._held = held
        server.slots_free -= held

    def hand_over(self) -> None:
        """To work that begins. A call that meant to join holds none; its work has one all the same."""
        self._server.slots_free -= not self._held
        self._held = False

    def free(self) -> None:
        self._server.slots_free += self._held
        self._held = False
