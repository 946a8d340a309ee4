"""Points as other nodes see them: a trainer hands in receipts, everybody may ask who has earned what.

``Submitter`` keeps the receipts of a trainer in an ``Outbox`` until an authority has credited or refused
them, in batches: whatever came within ``GATHER_S``, or ``BATCH``. With no authority there it tries again,
later and later up to ``MOST_WAIT_S``, jittered; training goes on meanwhile. What an authority does not
believe is given up and reported. A batch may be handed in twice (after a lost answer, or a restart): a
ticket is credited once.

``follow`` keeps a worker's own points for ``agoractl status``; ``install`` adds the control command
``points``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgpack
import trio

from agorad.authority.leaderboard import BATCH, BATCH_BYTES, PROTOCOL, ROWS, Credited, Leaderboard
from agorad.control import BadRequest
from agorad.events import ReceiptsDelayed, ReceiptsDropped, ReceiptsSubmitted
from agorad.outbox import Outbox
from p2p.errors import LocalError, P2PError, PeerGone
from p2p.identity import PeerId
from stage.receipts import Receipt

if TYPE_CHECKING:
    from agorad.node import Node

GATHER_S: Final = 2.0
FIRST_WAIT_S: Final = 1.0
MOST_WAIT_S: Final = 60.0
SUBMIT_S: Final = 45.0
"""For one batch, from the dial to the answer."""
FINISH_S: Final = 5.0
"""What is left at the end of a run has this long to be handed in; the rest waits for the next start."""
ASK_S: Final = 5.0
FOLLOW_FIRST_S: Final = 10.0
FOLLOW_S: Final = 60.0
ROOM: Final = BATCH_BYTES - 8 * BATCH
"""For the receipts of a batch: each has a head of its own around it."""


class Submitter:
    """A trainer's receipts on their way to an authority."""

    def __init__(self, node: Node, outbox: Outbox) -> None:
        self._node = node
        self._outbox = outbox
        self._news = trio.Event()
        self._running = trio.CancelScope()
        self._busy = trio.Lock()

    def keep(self, receipt: Receipt) -> None:
        """Keep it until it is credited; on return the operating system has it."""
        try:
            dropped = self._outbox.append(receipt.encode())
        except LocalError as error:
            self._node.emit(ReceiptsDropped(count=1, why=str(error)))
            return
        if dropped:
            self._node.emit(
                ReceiptsDropped(count=dropped, why="no authority took them and there is no room for more")
            )
        self._news.set()

    async def run(self) -> None:
        """Hand in until ``finish``, or until cancelled."""
        wait_s = FIRST_WAIT_S
        with self._running:
            while True:
                if not self._outbox.waiting:
                    self._news = trio.Event()
                    await self._news.wait()
                if self._outbox.waiting < BATCH:
                    await trio.sleep(GATHER_S)
                trouble = await self._some()
                if trouble is None:
                    wait_s = FIRST_WAIT_S
                    self._node.warnings.pop("receipts_waiting", None)
                    continue
                self._node.warnings["receipts_waiting"] = (
                    f"no authority takes receipts of work ({trouble}); {self._outbox.waiting} wait on disk"
                )
                retry_s = wait_s * self._node.rng.uniform(0.5, 1.5)
                self._node.emit(
                    ReceiptsDelayed(why=trouble, waiting=self._outbox.waiting, retry_s=round(retry_s, 1))
                )
                await trio.sleep(retry_s)
                wait_s = min(MOST_WAIT_S, 2 * wait_s)

    async def finish(self) -> None:
        """Hand in what is left, within ``FINISH_S``; what nobody takes waits on disk."""
        self._running.cancel()
        with trio.move_on_after(FINISH_S):
            while self._outbox.waiting and await self._some() is None:
                pass
        self._outbox.close()

    async def _some(self) -> str | None:
        """One batch to one authority after the other; why none took it."""
        async with self._busy:
            try:
                batch = self._outbox.batch(BATCH, ROOM)
            except LocalError as error:
                return str(error)
            if not batch:
                return None
            authorities = [ref.peer_id for ref in self._node.manifest.authorities]
            self._node.rng.shuffle(authorities)
            trouble = "the manifest lists no authority"
            for authority in authorities:
                try:
                    credited = await self._submit(authority, batch)
                except (P2PError, trio.TooSlowError) as error:
                    trouble = str(error) or "an authority took too long to answer"
                    continue
                self._outbox.done(len(batch))
                self._report(authority, credited)
                return None
            return trouble

    async def _submit(self, authority: PeerId, batch: list[bytes]) -> Credited:
        with trio.fail_after(SUBMIT_S):
            async with await self._node.host.call(authority, PROTOCOL, deadline=SUBMIT_S) as call:
                await call.send({"t": "submit", "count": len(batch)})
                await call.send({"t": "receipts"}, msgpack.packb(batch))
                return Credited.from_header((await call.receive()).header)

    def _report(self, authority: PeerId, credited: Credited) -> None:
        refused = credited.refused
        if refused:
            self._node.warnings["receipts"] = (
                f"an authority did not believe the receipt of {refused[0][0] or 'a ticket'}: {refused[0][1]}"
            )
        self._node.emit(
            ReceiptsSubmitted(
                authority=authority,
                new=credited.new,
                known=credited.known,
                refused=len(refused),
                why=f"{refused[0][0]}: {refused[0][1]}" if refused else "",
                waiting=self._outbox.waiting,
            )
        )


async def ask(node: Node, limit: int) -> Leaderboard:
    """The leaderboard, from the first authority that answers. Raises P2PError if none does."""
    authorities = [ref.peer_id for ref in node.manifest.authorities]
    node.rng.shuffle(authorities)
    trouble: P2PError = PeerGone("the run's manifest lists no authority to ask")
    for authority in authorities:
        try:
            with trio.fail_after(ASK_S):
                async with await node.host.call(authority, PROTOCOL, deadline=ASK_S) as call:
                    await call.send({"t": "leaderboard", "limit": limit})
                    return Leaderboard.from_header((await call.receive()).header)
        except trio.TooSlowError:
            trouble = PeerGone("no authority answered in time; try again in a moment")
        except P2PError as error:
            trouble = error
    raise trouble


def row_limit(request: Mapping[str, Any]) -> int:
    """How many rows a control client asks for."""
    limit = request.get("limit", 50)
    if type(limit) is not int or not 0 <= limit <= ROWS:
        raise BadRequest(f"limit is a number of rows, at most {ROWS}")
    return limit


def install(node: Node) -> None:
    """The control command ``points``."""

    async def points(request: Mapping[str, Any]) -> dict[str, Any]:
        return (await ask(node, row_limit(request))).document()

    node.commands["points"] = points


async def follow(node: Node) -> None:
    """Keep this node's own points in its status, until cancelled."""
    wait_s = FOLLOW_FIRST_S
    while True:
        await trio.sleep(wait_s * node.rng.uniform(0.8, 1.2))
        wait_s = FOLLOW_S
        try:
            found = await ask(node, 0)
        except P2PError:
            continue  # what was true a minute ago is near enough
        if found.node is not None:
            node.status["points"] = {"compute": found.node[0], "presence": found.node[1]}
