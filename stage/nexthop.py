"""Handing a microbatch to a replica of the next stage and awaiting its gradient: the caller's side.

One ``send`` is one microbatch. It chooses a replica, calls, and, if that replica does not answer, chooses
another with the same payload, until the deadline. One whose connection is closed is left at once. One that
lives and does not answer is given up after some times what its answers usually take, within bounds; it is
told so, and the microbatch goes elsewhere no sooner than ``LEASE_S`` after it was last heard, because until
then it may still commit (architecture, decision 3). One that refused or had no room has added nothing and is
left at once.

*The hint.* A replica tells by whom it had a microbatch accepted. If it is lost, the one that replaces it is
told so, and asks there first: what was done further down is joined or answered again instead of done again.
The same list, kept for the last ``MAX_PATHS`` microbatches, makes a caller that sends one again ask the same
replica.

What an answer says of itself is checked: it continues the path of its request, every
stage from here on signed that it worked (``stage.receipts``), and it belongs to the ``c`` that was sent
unless it says that it is stale. An attempt is charged to the router when chosen and corrected by its reply.
Torch-free: trainers use it for stage 0.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import trio

from p2p.errors import DialError, P2PError, Refused, RemoteError
from p2p.event import Emit
from p2p.host import Host
from p2p.identity import PeerId
from p2p.rpc import Call
from stage.events import Busy, Rerouted
from stage.messages import (
    MAX_PATH,
    PROTOCOL,
    Accepted,
    Answer,
    BusyReply,
    NoReplica,
    Progress,
    Reply,
    Request,
    reply_from_wire,
)
from stage.receipts import check_chain
from stage.roster import StageView
from stage.router import Choice, Router
from stage.traffic import BoundaryCount

LEASE_S = 1.5
DIAL_S = 5.0
ACCEPT_S = 10.0
"""A replica accepts or says BUSY at once; silence for this long is a failure."""
ANSWER_LEAST_S = 10.0
"""Times the stages that are still to come: so a fault further down is noticed by who is next to it."""
MAX_PROGRESS = 4 * MAX_PATH
"""Messages about one microbatch's way; a replica that sends more makes them up."""
MAX_PATHS = 1024
PATIENCE_S = 5.0
"""How long all replicas of a stage may be failing before the stage counts as empty."""


class NoReplicaError(Exception):
    """The stage (or a later one) has no live replica at present; nothing was added by this attempt."""

    def __init__(self, stage: int) -> None:
        super().__init__(f"stage {stage} has no live replica")
        self.stage = stage


@attrs.frozen
class Passed:
    """A finished microbatch as the caller sees it."""

    answer: Answer
    dc: memoryview
    """Packed gradient of ``c`` (empty for the trainer and for evaluation); of a ticket of generation the
    likeliest tokens."""
    peer: PeerId


@attrs.define
class _Way:
    """Who works on one microbatch, or did last, from this stage on, as far as it is known."""

    ticket: str
    path: list[PeerId]


class NextHop:
    """Calls to the replicas of one stage."""

    def __init__(
        self,
        host: Host,
        view: StageView,
        router: Router,
        emit: Emit,
        count: BoundaryCount | None = None,
        *,
        stages: int,
    ) -> None:
        """``count``: where boundary crossings are counted; None for a trainer, whose hop is none.

        ``stages``: of the run; each from this one on has to have signed an answer.
        """
        self._host = host
        self._view = view
        self._stages = stages
        self._router = router
        self._emit = emit
        self._count = count
        self._paths: OrderedDict[str, list[PeerId]] = OrderedDict()
        """By ticket: who worked on it last, from this stage on."""

    async def send(
        self,
        request: Request,
        payload: Sequence[Any],
        *,
        back_bytes: int,
        passed_on: Callable[[list[PeerId]], None] = lambda _path: None,
    ) -> Passed:
        """Returns when some replica has answered.

        ``payload``: buffers of ids and packed ``c``; ``back_bytes``: exact size of the answer's payload;
        ``passed_on`` is told who works on it from this stage on, whenever more of that is known. The
        request's ``hint`` begins with this stage. Raises NoReplicaError, or trio.TooSlowError after
        ``request.deadline_s``.
        """
        way = _Way(request.ticket.id, list(request.hint or self._paths.get(request.ticket.id, [])))
        prefer = way.path[0] if way.path else None
        failed: tuple[PeerId, str] | None = None
        patience = trio.current_time() + PATIENCE_S
        with trio.fail_after(request.deadline_s):
            while True:
                self._router.update(self._view.serving())
                if self._router.empty():
                    raise NoReplicaError(self._view.stage)
                choice = self._router.choose(trio.current_time(), prefer=prefer)
                if choice is None:
                    await self._wait_for_somebody(patience)
                    continue
                peer, knew, prefer = choice.peer, choice.peer == prefer, None
                if failed is not None:
                    if failed[0] != peer:
                        self._emit(
                            Rerouted(ticket=request.ticket.id, from_=failed[0], to=peer, why=failed[1])
                        )
                    failed = None

                def heard(path: list[PeerId]) -> None:
                    way.path = path
                    self._remember(way)
                    passed_on(path)

                asked = attrs.evolve(request, inline=choice.room, hint=way.path[1:])
                try:
                    outcome = await self._attempt(choice, asked, payload, back_bytes, heard, knew)
                except (P2PError, trio.TooSlowError) as error:
                    self._router.failed(choice, trio.current_time())
                    failed = (peer, _why(error))
                    continue
                except trio.Cancelled:
                    self._router.unused(choice)
                    raise
                if isinstance(outcome, Passed):
                    return outcome
                if isinstance(outcome, NoReplica):
                    self._router.unused(choice)
                    raise NoReplicaError(outcome.stage)
                patience = trio.current_time() + PATIENCE_S  # BUSY is a sign of life
                self._router.busy(choice, trio.current_time(), outcome.retry_after_s)
                self._emit(Busy(ticket=request.ticket.id, replica=peer))

    def _remember(self, way: _Way) -> None:
        self._paths[way.ticket] = way.path
        self._paths.move_to_end(way.ticket)
        while len(self._paths) > MAX_PATHS:
            self._paths.popitem(last=False)

    async def _wait_for_somebody(self, patience: float) -> None:
        now = trio.current_time()
        wait_s = self._router.wait_s(now)
        failing = self._router.failing(now)
        if wait_s is None or (failing and now >= patience):
            raise NoReplicaError(self._view.stage)
        with trio.move_on_after(min(max(wait_s, 0.005), patience - now) if failing else max(wait_s, 0.005)):
            await self._view.wait_changed()

    async def _attempt(
        self,
        choice: Choice,
        request: Request,
        payload: Sequence[Any],
        back_bytes: int,
        heard: Callable[[list[PeerId]], None],
        knew: bool,
    ) -> Passed | BusyReply | NoReplica:
        """One replica asked. ``heard`` is told the way from it on; ``knew``: it was chosen for knowing the
        microbatch."""
        began = trio.current_time()
        peer = choice.peer
        async with await self._host.call(
            peer, PROTOCOL, addrs=self._view.addrs(peer), deadline=DIAL_S
        ) as call:
            try:
                async with call.connection.watched():
                    await call.send(request.to_wire(), payload if request.inline else b"")
                    if request.inline:
                        self._count_forward(payload)
                    with trio.fail_after(ACCEPT_S):
                        reply, _ = await _receive(call)
                    if isinstance(reply, BusyReply | NoReplica):
                        return reply
                    if not isinstance(reply, Accepted):
                        raise RemoteError("microbatch: neither accepted nor busy")
                    self._router.accepted(choice, trio.current_time(), reply.load)
                    heard([peer, *request.hint])
                    if not request.inline:
                        await call.send({"t": "payload"}, payload)
                        self._count_forward(payload)
                    least = ANSWER_LEAST_S * (self._stages - self._view.stage)
                    with trio.fail_after(self._router.patience_s(peer, least, request.deadline_s)):
                        reply, dc = await self._result(call, back_bytes, heard)
            except Refused:
                raise
            except (P2PError, trio.TooSlowError):
                # Asked and then silent: it may commit on its lease until LEASE_S after its last word. The
                # reset goes first, so that a peer that comes back meanwhile hears it before our next pong.
                call.reset()
                await trio.sleep(_lease_left(call))
                raise
        if isinstance(reply, NoReplica):
            return reply
        if not isinstance(reply, Answer) or len(dc) != back_bytes:
            raise RemoteError(f"microbatch: not an answer with {back_bytes} bytes of gradient")
        if reply.path[: len(request.path) + 1] != [*request.path, peer]:
            raise RemoteError("microbatch: the answer's path does not continue that of its request")
        if not reply.stale and reply.c_hash != _hash_of_c(payload):
            raise RemoteError("microbatch: the answer belongs to another c and does not say so")
        check_chain(
            request.ticket,
            first=self._view.stage,
            stages=self._stages,
            peers=reply.path[len(request.path) - 1 :],
            signatures=reply.receipts,
        )
        now = trio.current_time()
        rtt_s = call.connection.rtt or 0.0
        # One token of text is half the work of a microbatch that trains, which these times are of.
        comparable = not knew and request.ticket.kind != "generate"
        self._router.answered(choice, now, now - began if comparable else None, reply.load, rtt_s)
        return Passed(reply, dc, peer)

    async def _result(
        self, call: Call, back_bytes: int, heard: Callable[[list[PeerId]], None]
    ) -> tuple[Reply, memoryview]:
        """The first message that is not about the microbatch's way."""
        for _ in range(MAX_PROGRESS):
            reply, dc = await _receive(call, back_bytes)
            if not isinstance(reply, Progress):
                return reply, dc
            heard([call.peer, *reply.path])
        raise RemoteError("microbatch: too many messages about its way")

    def _count_forward(self, payload: Sequence[Any]) -> None:
        if self._count is not None:
            self._count.forward(sum(len(part) for part in payload))


def _lease_left(call: Call) -> float:
    """Seconds until the peer's lease surely ran out; none if it has ended the connection, and so its work."""
    connection = call.connection
    if connection.why_closed is not None and not connection.fell_silent:
        return 0.0
    return max(0.0, LEASE_S - connection.silence)


def _hash_of_c(payload: Sequence[Any]) -> bytes:
    """SHA-256 of the packed ``c``; empty where there is none (what a trainer sends)."""
    return hashlib.sha256(payload[1]).digest() if len(payload) > 1 else b""


async def _receive(call: Call, max_payload: int = 0) -> tuple[Reply, memoryview]:
    message = await call.receive(max_payload=max_payload)
    return reply_from_wire(message.header), message.payload


def _why(error: BaseException) -> str:
    if isinstance(error, Refused):
        return error.code
    if isinstance(error, DialError):
        return "unreachable"
    if isinstance(error, trio.TooSlowError):
        return "timeout"
    return str(error)[:200] or type(error).__name__
