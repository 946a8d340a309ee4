"""Records of ours on their way to the nodes that should keep them.

One search, whose questions to nodes that are likely to be among the nearest are the store itself. Who they
are is remembered for ``ROUTE_LIFE_S`` or until somebody nearer turns up: swarm records are stored again
every few seconds.

``place`` returns as soon as enough nodes keep the record that every read finds it: ``KEPT`` of the
``replicas``, one of those among the nearest that a reader asks first. A reader that got nothing asks so many
(``WIDE``) that it meets some of any ``KEPT``. The others are still being told then, by a task of ``run``,
until the deadline of the store; a newer record for the same place ends that, and takes over.

Limits: ``MAX_ROUTES`` remembered routes, ``MAX_AT_WORK`` records at work behind the callers' backs; with more
under way, or while ``run`` does not run, a caller waits for all of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, final

import attrs
import trio

from p2p.errors import P2PError, Refused
from p2p.event import Emit
from p2p.identity import PeerId
from p2p.kad.events import RecordRefused
from p2p.kad.exchange import Exchange, remember
from p2p.kad.ids import BITS, key_id
from p2p.kad.lookup import Lookup
from p2p.kad.record import Record
from p2p.kad.search import KadLimits, drive
from p2p.kad.table import Contact, Table

KEPT: Final = 5
"""Nodes that keep a record, this one included, before a store returns."""
WIDE: Final = 6
"""Nodes that a read asks when all before were empty; at most ``replicas`` - ``KEPT`` of them have nothing."""
MAX_ROUTES: Final = 256
MAX_AT_WORK: Final = 64
ROUTE_LIFE_S: Final = 30.0
EVERYWHERE: Final = 1 << BITS
"""A distance that nobody is beyond."""


@attrs.define(eq=False)
class _Work:
    record: Record
    until: float
    enough: trio.Event = attrs.field(factory=trio.Event)
    """Set when the caller need not wait any more, whatever the reason."""
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    takers: set[PeerId] = attrs.field(factory=set)


@final
class Placing:
    """See the file's opening. ``run`` it beside the node."""

    def __init__(
        self,
        exchange: Exchange,
        table: Table,
        limits: KadLimits,
        *,
        emit: Emit,
        keeps: Callable[[int], bool],
        lookup: Callable[..., Lookup],
    ) -> None:
        """``keeps``: whether we are to keep what lies there; ``lookup`` makes one over the table."""
        self._exchange = exchange
        self._table = table
        self._limits = limits
        self._emit = emit
        self._keeps = keeps
        self._lookup = lookup
        self._routes: OrderedDict[str, tuple[float, list[Contact]]] = OrderedDict()
        self._at_work: dict[tuple[str, str], _Work] = {}
        self._nursery: trio.Nursery | None = None

    @property
    def at_work(self) -> int:
        """Records of which not all nodes that should have been told yet."""
        return len(self._at_work)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Lend ``place`` a nursery, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def place(self, record: Record, deadline: float) -> int:
        """How many other nodes took it so far: enough, or all that could be reached."""
        work = _Work(record, trio.current_time() + deadline)
        older = self._at_work.pop((record.key, record.subkey), None)
        if older is not None:
            older.scope.cancel()
        if self._nursery is None or len(self._at_work) >= MAX_AT_WORK:
            await self._place(work)
        else:
            self._at_work[record.key, record.subkey] = work
            self._nursery.start_soon(self._work, work)
            await work.enough.wait()
        return len(work.takers)

    async def _work(self, work: _Work) -> None:
        place = work.record.key, work.record.subkey
        try:
            await self._place(work)
        finally:
            work.enough.set()
            if self._at_work.get(place) is work:
                del self._at_work[place]

    async def _place(self, work: _Work) -> None:
        record, limits = work.record, self._limits
        target = key_id(record.key)
        keeps = self._keeps(target)
        now = trio.current_time()
        known, reach = self._routes.get(record.key), self._reach()
        if known is not None and now < known[0] + ROUTE_LIFE_S:
            start, reach = known[1], EVERYWHERE
        else:
            start = self._table.nearest(target, limits.k)
        here = bool(start) and start[0].id ^ target <= reach
        alpha = limits.replicas if here else limits.alpha
        lookup = self._lookup(target, need=limits.replicas - keeps, start=start or None, alpha=alpha)
        asked: set[PeerId] = set()

        async def store(contact: Contact) -> tuple[Sequence[Contact], bool]:
            asked.add(contact.peer)
            try:
                nodes, member = await self._exchange.store(contact, record)
            except Refused as error:
                self._emit(RecordRefused(peer=contact.peer, key=record.key, code=error.code))
                return (), contact.peer in self._table  # only members are in there
            if member:
                work.takers.add(contact.peer)
                first = lookup.nearest(limits.quorum)
                if len(work.takers) + keeps >= KEPT and not work.takers.isdisjoint(first):
                    work.enough.set()
            return nodes, member

        async def ask(contact: Contact) -> tuple[Sequence[Contact], bool]:
            if contact.id ^ target <= reach:
                return await store(contact)
            return await self._exchange.find_node(contact, target)

        async def catch_up(contact: Contact) -> None:
            try:
                await store(contact)
            except (P2PError, trio.TooSlowError):
                self._routes.pop(record.key, None)

        with work.scope:
            work.scope.deadline = work.until
            await drive(lookup, ask)
            # The nearest, where a reader looks first, and those that no single liar can have named alone.
            route = list(dict.fromkeys([*lookup.result(), *lookup.spread()]))
            if route:
                remember(self._routes, record.key, (now, route), MAX_ROUTES)
            async with trio.open_nursery() as nursery:
                for contact in route:
                    if contact.peer not in asked:
                        nursery.start_soon(catch_up, contact)

    def _reach(self) -> int:
        """The distance from any place within which to store without asking who is nearer.

        Twice as far as our own ``replicas`` nearest are. That is an estimate from few nodes: a store too far
        off is a copy more, one too timid a round trip more.
        """
        nearest = self._table.nearest(self._table.own_id, self._limits.replicas)
        full = len(nearest) == self._limits.replicas
        return 2 * (nearest[-1].id ^ self._table.own_id) if full else EVERYWHERE

    def newcomer(self, contact: Contact) -> None:
        """Routes that a contact new to the table would be part of are to be found again."""
        for key, (_, route) in list(self._routes.items()):
            target = key_id(key)
            if len(route) < self._limits.replicas or contact.id ^ target < max(
                keeper.id ^ target for keeper in route
            ):
                del self._routes[key]

    def forget(self, key: str) -> None:
        """Search the nodes of a key anew the next time."""
        self._routes.pop(key, None)

    def forget_all(self) -> None:
        self._routes.clear()
