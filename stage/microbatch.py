"""Serving microbatches: the callee's side of ``/agora/microbatch/1``.

A microbatch goes through these states, and only the commit changes anything that lasts:

    asked -> busy | refused                      no room, or not for us
    asked -> joined -> answered                  a ticket that we work on or have answered
    asked -> accepted -> forward -> passed on -> gradient here -> commit -> backward -> answered
                                                                  `-> cancelled: nothing was added

*Commit*: gradients enter the accumulator from the start of the backward pass, so that is the point
of no return. It is entered only on a fresh lease (a ping that we sent less than 1.5 s ago was answered on the
caller's connection) and with no cancel pending; both are looked at on the device thread, right
before the pass. A caller that vanished therefore either gets this answer, or re-routes after our lease
ran out, or (the one fault allowed) its connection broke during our backward pass and the
microbatch counts twice.

*Answers* are kept for a while: a caller that lost us mid-answer, or a replacement of it, gets the kept
answer, its path rewritten to begin with this caller's and signed for this caller (``stage.receipts``). If
its ``c`` differs from the one that the answer belongs to (the replacement's weights differ), the answer is
reused once and counted as stale; a second time the work is done again.

Limits: ``slots`` microbatches in progress, ``MAX_ANSWERS`` kept answers and ``MAX_ANSWER_BYTES`` of
gradients in them, one payload of the exact size that the run's shape gives, ``PAYLOAD_S`` for a caller to
deliver what it announced. Torch-free: ``Compute`` is what touches tensors.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import attrs
import trio

from p2p.errors import P2PError, Refused, RemoteError
from p2p.event import Emit
from p2p.identity import Identity, PeerId
from p2p.rpc import Call
from stage import receipts
from stage.clock import StepClock
from stage.device import BACKWARD, FORWARD, Device
from stage.events import MicrobatchAdded, ReusedStale
from stage.messages import BASIS, MAX_PATH, Accepted, Answer, BusyReply, NoReplica, Request
from stage.nexthop import NextHop, NoReplicaError
from stage.pace import Pace
from stage.ticket import Ticket
from stage.traffic import BoundaryCount

MAX_ANSWERS = 512
MAX_ANSWER_BYTES = 64 << 20
PAYLOAD_S = 30.0
"""For a header and its payload to arrive; what was promised and does not come must not hold a slot."""
LEASE_WAIT_S = 0.1
"""How long to wait for the next ping's answer before looking at the lease again."""


class Held(Protocol):
    """A microbatch after its forward pass, holding what the backward pass needs."""

    loss: float
    """Mean loss a token (tail only)."""
    c: Any
    """Packed boundary for the next stage (empty at the tail)."""

    def release(self) -> None:
        """Forget the graph. Safe to call twice."""


class Compute(Protocol):
    """What runs on the device thread."""

    def forward(self, request: Request, ids: memoryview, c: memoryview) -> Held: ...

    def backward(self, held: Any, dc: memoryview) -> Any:
        """Adds the microbatch's gradient and returns the packed gradient of the stage's input."""


@attrs.define
class _Kept:
    answer: Answer
    """Its path begins with this replica; whoever gets the answer has its own path before it.

    Its receipts are those of later stages; this replica's own is signed for whoever gets the answer.
    """
    dc: Any
    ids_hash: bytes
    reused: bool = False


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
    dtype: str
    dtype_back: str

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
        self._working: dict[str, trio.Event] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._most_kept = max(1, min(MAX_ANSWERS, MAX_ANSWER_BYTES // max(1, shape.dc_bytes)))
        self.slots_free = slots
        self._pace = Pace()
        self.shedding = False
        """Takes no microbatch that it does not work on already."""
        self.added = 0
        """Microbatches whose gradient this replica added."""
        self.last_loss: float | None = None
        self._idle = trio.Event()
        self._idle.set()

    @property
    def request_bytes(self) -> int:
        """Exact payload of a microbatch here."""
        return self._shape.ids_bytes + self._shape.c_bytes

    @property
    def in_progress(self) -> int:
        return len(self._working)

    async def wait_idle(self) -> None:
        """Until no microbatch is in progress here."""
        while self._working:
            await self._idle.wait()

    async def handle(self, call: Call) -> None:
        """One call: see the module's docstring."""
        size = self.request_bytes
        with trio.fail_after(PAYLOAD_S):
            message = await call.receive(max_payload=size)
        request = Request.from_wire(message.header)
        self._check(call, request)
        if self._clock.observe(request.clock):
            self._clock_advanced()
        known = request.ticket.id in self._working or request.ticket.id in self._kept
        if not known and (self.slots_free <= 0 or self.shedding):
            await call.send(BusyReply(retry_after_s=self._pace.retry_after_s(trio.current_time())).to_wire())
            return
        self.slots_free -= 1  # held while joining too, so that joins are bounded like work
        try:
            with trio.move_on_after(request.deadline_s):
                await self._accepted(call, request, message.payload)
        finally:
            self.slots_free += 1
            self._pace.ended(trio.current_time())

    async def _accepted(self, call: Call, request: Request, payload: memoryview) -> None:
        """With a slot held: the payload, its checks, and the work."""
        size = self.request_bytes
        async with call.connection.watched():
            with trio.fail_after(PAYLOAD_S):
                await call.send(Accepted(slots=max(0, self.slots_free)).to_wire())
                if not request.inline:
                    payload = (await call.receive(max_payload=size)).payload
            if len(payload) != size:
                raise RemoteError(f"microbatch: {len(payload)} bytes of payload, {size} expected")
            ids, c = payload[: self._shape.ids_bytes], payload[self._shape.ids_bytes :]
            request.ticket.check(self._run, self._trainers, ids)
            await self._serve(call, request, ids, c)

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

    async def _serve(self, call: Call, request: Request, ids: memoryview, c: memoryview) -> None:
        """Join or work, while watching for the caller's cancel (a reset or the end of its stream)."""
        failure: P2PError | trio.TooSlowError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_end_of, call, nursery.cancel_scope)
            try:
                await self._answer(call, request, ids, c)
            except (P2PError, trio.TooSlowError) as error:
                failure = error  # raised outside, where no nursery wraps it
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _answer(self, call: Call, request: Request, ids: memoryview, c: memoryview) -> None:
        try:
            kept = await self._join_or_work(call, request, ids, c)
        except NoReplicaError as error:
            await call.send(NoReplica(stage=error.stage).to_wire())
            return
        path = [*request.path, *kept.answer.path]
        own = receipts.sign(self._identity, request.ticket, self._shape.stage, call.peer)
        answer = attrs.evolve(
            kept.answer,
            path=path,
            slots=max(0, self.slots_free + 1),
            receipts=[own, *kept.answer.receipts],
        )
        await call.send(answer.to_wire(), kept.dc)
        if len(kept.dc):
            self._count.backward(len(kept.dc))

    async def _join_or_work(self, call: Call, request: Request, ids: memoryview, c: memoryview) -> _Kept:
        ticket = request.ticket
        while (working := self._working.get(ticket.id)) is not None:
            await working.wait()
        c_hash = b"" if self._shape.head else hashlib.sha256(c).digest()
        kept = self._reusable(ticket, c_hash)
        if kept is not None:
            return kept
        self._working[ticket.id] = done = trio.Event()
        if self._idle.is_set():
            self._idle = trio.Event()
        try:
            return await self._work(call, request, ids, c, c_hash)
        finally:
            del self._working[ticket.id]
            done.set()
            if not self._working:
                self._idle.set()

    def _reusable(self, ticket: Ticket, c_hash: bytes) -> _Kept | None:
        kept = self._kept.get(ticket.id)
        if kept is None or kept.ids_hash != ticket.ids_hash:
            return None  # a trainer that began anew, with other data
        if kept.answer.c_hash == c_hash:
            return kept
        if kept.reused:
            return None
        kept.reused = True
        self._emit(ReusedStale(ticket=ticket.id, stage=self._shape.stage, replica=self._peer_id))
        return attrs.evolve(kept, answer=attrs.evolve(kept.answer, stale=True))

    async def _work(
        self, call: Call, request: Request, ids: memoryview, c: memoryview, c_hash: bytes
    ) -> _Kept:
        held = await self._device.run(FORWARD, self._compute.forward, request, ids, c)
        try:
            answer = Answer(loss=held.loss, c_hash=c_hash, path=[self._peer_id], slots=0, stale=False)
            dc = memoryview(b"")
            train, ids_hash = request.ticket.kind == "train", request.ticket.ids_hash
            if self._next_hop is not None:
                so_far = [*request.path, self._peer_id]
                onward = attrs.evolve(request, path=so_far, clock=self._clock.readings)
                back = self._shape.next_back_bytes if train else 0
                passed = await self._next_hop.send(onward, [ids, held.c], back_bytes=back)
                path, dc = passed.answer.path[len(request.path) :], passed.dc
                answer = attrs.evolve(passed.answer, c_hash=c_hash, path=path)
            if not train:
                return _Kept(answer, b"", ids_hash)
            dc_in = await self._commit(call, held, dc)
            if self._next_hop is None:  # the tail's loss comes out of the pass that makes its gradient
                answer = attrs.evolve(answer, loss=held.loss)
            # No checkpoint between the backward pass and here: what was added is always on record.
            self.added += 1
            self.last_loss = answer.loss
            self._emit(
                MicrobatchAdded(
                    ticket=request.ticket.id,
                    stage=self._shape.stage,
                    replica=self._peer_id,
                    step=self._step(),
                )
            )
            kept = _Kept(answer, dc_in, ids_hash)
            self._kept[request.ticket.id] = kept
            while len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
            return kept
        finally:
            held.release()

    async def _commit(self, call: Call, held: Held, dc: memoryview) -> Any:
        """Waits for a fresh lease, then the backward pass. Raises Cancelled if the caller is gone first."""

        def backward() -> Any:
            if not call.connection.lease.fresh():
                return None
            return self._compute.backward(held, dc)

        while True:
            await trio.lowlevel.checkpoint_if_cancelled()
            dc_in = await self._device.run(BACKWARD, backward)
            if dc_in is not None:
                return dc_in
            await trio.sleep(LEASE_WAIT_S)


async def _cancel_at_end_of(call: Call, scope: trio.CancelScope) -> None:
    """A caller says nothing more after its payload, so this returns only when its stream ends."""
    try:
        await call.receive()
    except P2PError:
        pass  # reset or connection lost: that is the cancel that is waited for
    scope.cancel()
