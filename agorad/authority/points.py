"""Points at the authority: takes trainers' receipts, credits them and those who are present, shows who has
what.

``/agora/points/1`` is open to guests, for the leaderboard; receipts are taken from the trainers of the
manifest only. Thin: what a receipt is worth is ``ledger``'s, what is written ``books``', who is first
``leaderboard``'s. Signatures are checked in a thread of their own, ``CHUNK`` receipts are credited in one
transaction, and joins get their turn at the database in between.

Limits: one submission at a time and ``WAITING`` that wait for it, ``BATCH`` receipts each; the leaderboard
is worked out every ``FRESH_S`` at most, however many ask; a peer may ask ``BURST`` times at once and once
in ``REFILL_S``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

import attrs
import msgpack
import trio

from agorad import probing
from agorad.authority.leaderboard import (
    BATCH,
    BATCH_BYTES,
    PROTOCOL,
    ROWS,
    WHY_LIMIT,
    Credited,
    Leaderboard,
    Row,
    rank,
)
from agorad.authority.ledger import Audit, Balance, Rules, StoredReceipt, pflop
from agorad.authority.store import Store
from agorad.events import ReceiptsCredited
from agorad.node import Node
from agorad.points import row_limit
from p2p.errors import Refused, RemoteError
from p2p.identity import PeerId
from p2p.rpc import Call
from stage.receipts import Receipt

ASK_S: Final = 10.0
PAYLOAD_S: Final = 30.0
WAITING: Final = 32
CHUNK: Final = 64
FRESH_S: Final = 5.0
BURST: Final = 10
REFILL_S: Final = 2.0
ASKERS: Final = 4096
"""Peers whose questions are counted."""
PRESENCE_GAP_S: Final = 2.5 * probing.PRESENCE_S
"""Who is seen again within this time was there in between: one look may fail."""
FLUSH_S: Final = 5.0
"""Between two transactions with those who were seen."""
SEEN: Final = 16_384

T = TypeVar("T")


class Ask(Protocol):
    """Runs a question in the database's thread."""

    def __call__(self, question: Callable[..., T], *args: object) -> Awaitable[T]: ...


class PointsDesk:
    """Serves the protocol and the control command ``points``; credits who is seen."""

    def __init__(self, node: Node, store: Store, ask: Ask, open_store: Callable[[], Store]) -> None:
        """``open_store``: the same database once more, for what takes long."""
        self._node = node
        self._open_store = open_store
        self._store = store
        self._ask = ask
        self._thread = trio.CapacityLimiter(1)
        self._submitting = trio.Lock()
        self._asked: OrderedDict[PeerId, tuple[float, float]] = OrderedDict()
        """Questions that a peer has left, and when that was."""
        self._rows: tuple[float, list[Row]] | None = None
        self._ranking = trio.Lock()
        self._seen: dict[PeerId, float] = {}
        node.host.handle(PROTOCOL, self.serve, open_to_all=True)
        node.commands["points"] = self.command
        node.commands["recompute"] = self.recompute

    async def run(self) -> None:
        """Watch who is present, until cancelled."""
        node = self._node
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._credit_seen)
            await probing.watch_presence(node, probing.stage_rosters(node), self.on_seen)

    async def on_seen(self, peer: PeerId, now: float) -> None:
        """A peer answered for itself; its time is credited with the next transaction."""
        if len(self._seen) < SEEN:
            self._seen[peer] = now

    async def serve(self, call: Call) -> None:
        """The handler of the protocol."""
        try:
            with trio.fail_after(ASK_S):
                header = (await call.receive()).header
        except trio.TooSlowError as error:
            raise RemoteError("points: a peer opened a call and said nothing") from error
        match header:
            case {"t": "leaderboard", "limit": int(limit)} if 0 <= limit <= ROWS:
                self._spend(call.peer)
                await call.send((await self.leaderboard(call.peer, limit)).to_header())
            case {"t": "submit", "count": int(count)} if 0 < count <= BATCH:
                await self._submission(call, count)
            case _:
                raise RemoteError("points: neither a submission nor a question for the leaderboard")

    async def leaderboard(self, peer: PeerId, limit: int) -> Leaderboard:
        """The first rows, and what this peer and its account have."""
        rows = await self._ranked()
        balance: Balance | None = await self._ask(self._store.books.balance, peer)
        own = None if balance is None else next((row for row in rows if row.user == balance.account), None)
        return Leaderboard(
            rows=tuple(rows[:limit]),
            accounts=len(rows),
            own=own,
            node=None if balance is None else (pflop(balance.compute), pflop(balance.presence)),
            at=self._node.clock(),
        )

    async def command(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """``points`` on the control socket."""
        return (await self.leaderboard(self._node.identity.peer_id, row_limit(request))).document()

    async def recompute(self, _request: Mapping[str, Any]) -> dict[str, Any]:
        """``recompute`` on the control socket: what the stored receipts say, against what was credited."""
        rules = Rules.of(self._node.manifest)
        found = await trio.to_thread.run_sync(_recompute, self._open_store, rules, abandon_on_cancel=True)
        return attrs.asdict(found)

    # receipts

    async def _submission(self, call: Call, count: int) -> None:
        rules = Rules.of(self._node.manifest)
        if call.peer not in rules.trainers or call.member is None:
            raise Refused("not_trainer", "receipts are taken from the run's trainers only")
        if self._submitting.statistics().tasks_waiting >= WAITING:
            raise Refused("busy", "other trainers' receipts are being credited", 2.0)
        async with self._submitting:
            with trio.move_on_after(PAYLOAD_S) as patience:
                message = await call.receive(max_payload=BATCH_BYTES)
            if patience.cancelled_caught:
                raise RemoteError("points: receipts were announced and did not come")
            credited = await self._credit(rules, call.peer, _unpacked(message.payload, count))
        self._node.emit(
            ReceiptsCredited(
                trainer=call.peer, new=credited.new, known=credited.known, refused=len(credited.refused)
            )
        )
        await call.send(credited.to_header())

    async def _credit(self, rules: Rules, trainer: PeerId, packed: Sequence[bytes]) -> Credited:
        new, known, refused = 0, 0, list[tuple[str, str]]()
        grace_s = self._node.config.authority.grace_s
        now = self._node.clock()
        for start in range(0, len(packed), CHUNK):
            chunk = packed[start : start + CHUNK]
            believed = await trio.to_thread.run_sync(
                _believed, rules, trainer, now, chunk, limiter=self._thread
            )
            done = await self._ask(_enter, self._store, rules, believed, grace_s, now)
            new += done.new
            known += done.known
            refused += done.refused
        return Credited(new=new, known=known, refused=tuple(refused))

    # who is there

    async def _credit_seen(self) -> None:
        while True:
            await trio.sleep(FLUSH_S)
            seen, self._seen = self._seen, {}
            try:
                if seen:
                    await self._ask(_add_presence, self._store, list(seen.items()))
            except Refused:
                self._seen = seen | self._seen  # the database fails at present; what was seen stays true

    # who has what

    async def _ranked(self) -> list[Row]:
        async with self._ranking:
            now = trio.current_time()
            if self._rows is None or now - self._rows[0] > FRESH_S:
                rows = await self._ask(_rank, self._store, self._node.clock())
                self._rows = now, rows
            return self._rows[1]

    def _spend(self, peer: PeerId) -> None:
        """``Refused`` if the peer asked too often."""
        now = trio.current_time()
        left, since = self._asked.pop(peer, (float(BURST), now))
        left = min(float(BURST), left + (now - since) / REFILL_S)
        if left < 1.0:
            self._asked[peer] = left, now
            raise Refused("busy", "you ask for points very often", REFILL_S)
        self._asked[peer] = left - 1.0, now
        while len(self._asked) > ASKERS:
            self._asked.popitem(last=False)


@attrs.frozen(kw_only=True)
class _Believed:
    """A chunk whose signatures were checked."""

    receipts: list[tuple[Receipt, bytes]]
    refused: list[tuple[str, str]]


def _believed(rules: Rules, trainer: PeerId, now: float, chunk: Sequence[bytes]) -> _Believed:
    receipts, refused = [], []
    for packed in chunk:
        try:
            receipts.append((rules.read(packed, trainer, now), packed))
        except RemoteError as error:
            refused.append((_name(packed), str(error)[:WHY_LIMIT]))
    return _Believed(receipts=receipts, refused=refused)


def _enter(store: Store, rules: Rules, believed: _Believed, grace_s: float, now: float) -> Credited:
    books = store.books
    refused, stored = list[tuple[str, str]](), dict[str, StoredReceipt]()
    holder = books.holder({peer for receipt, _ in believed.receipts for peer in receipt.peers}, grace_s)
    for receipt, packed in believed.receipts:
        try:
            credited = rules.credit(receipt, packed, holder)
        except RemoteError as error:
            refused.append((receipt.ticket.id, str(error)[:WHY_LIMIT]))
        else:
            stored.setdefault(credited.ticket, credited)
    new = books.add_receipts(list(stored.values()), now)
    known = len(believed.receipts) - len(refused) - len(new)
    return Credited(new=len(new), known=known, refused=(*believed.refused, *refused))


def _add_presence(store: Store, seen: list[tuple[PeerId, float]]) -> None:
    store.books.add_presence(seen, gap_s=PRESENCE_GAP_S)


def _recompute(open_store: Callable[[], Store], rules: Rules) -> Audit:
    store = open_store()
    try:
        return store.books.recompute(rules)
    finally:
        store.close()


def _rank(store: Store, now: float) -> list[Row]:
    banned = {ban.name for ban in store.bans(now) if ban.kind == "account"}
    return rank(store.books.balances(), banned, now)


def _name(packed: bytes) -> str:
    """The ticket of a receipt that was not believed, as far as it can be read."""
    try:
        return Receipt.decode(packed).ticket.id
    except RemoteError:
        return ""


def _unpacked(payload: memoryview, count: int) -> list[bytes]:
    try:
        rows = msgpack.unpackb(payload, max_array_len=BATCH, max_map_len=0)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise RemoteError("points: the receipts are not msgpack") from error
    if not isinstance(rows, list) or len(rows) != count or not all(isinstance(row, bytes) for row in rows):
        raise RemoteError(f"points: not a list of {count} receipts")
    return rows
