"""Records follow the nodes nearest to their keys: to who comes, and from who goes.

A record belongs on the ``replicas`` nodes nearest to its key, and its owner puts it there; between two
stores of the owner nodes come and go. So when a member turns up that is now one of a key's nearest, the
``HANDERS`` nodes nearest to that key hand it what they keep; and a node that leaves says so to its
neighbours and hands each key to the one that takes its place. Only what its owner signed is handed on,
with the end it has here, and the taker judges it like any other record (``exchange``), so that a hand-over
can neither alter, stretch nor bring back anything; and it takes only what it is one of the nearest for.

Limits: ``MAX_WAITING`` newcomers remembered, ``messages.MAX_BATCH`` records a question, a hop's deadline
each; whoever does not answer gets nothing further. Source: Kademlia (2002), section 2.5, where the one
nearest node does it; a second one costs little and covers for a first that died.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, final

import trio

from p2p.errors import P2PError
from p2p.identity import PeerId
from p2p.kad import messages
from p2p.kad.ids import key_id
from p2p.kad.record import Record
from p2p.kad.table import Contact, Table

if TYPE_CHECKING:
    from p2p.kad.exchange import Exchange

HANDERS: Final = 2
NEARBY: Final = 32
"""Neighbours of ours that are looked at: who else is near a key that we are near to is among them."""
HEIRS: Final = 3
"""So many are tried for a key when we leave."""
MAX_WAITING: Final = 64
SETTLE_S: Final = 0.5
"""Newcomers come in swarms, and tell of themselves in their first seconds; a moment later more is known."""


def gained(
    newcomer: Contact,
    own: int,
    nearby: Sequence[Contact],
    keys: Iterable[str],
    replicas: int,
    newcomers: Collection[PeerId],
) -> Iterator[str]:
    """The keys that we should hand to a newcomer; ``newcomers`` of our neighbours have nothing to hand."""
    others = [contact.id for contact in nearby]
    elders = [contact.id for contact in nearby if contact.peer not in newcomers]
    for key in keys:
        target = key_id(key)
        ours, theirs = own ^ target, newcomer.id ^ target
        nearer_than_us = sum(elder ^ target < ours for elder in elders)
        nearer_than_it = sum(other ^ target < theirs for other in others) + (ours < theirs)
        if nearer_than_us < HANDERS and nearer_than_it < replicas:
            yield key


def inherited(
    own: int, nearby: Sequence[Contact], keys: Iterable[str], replicas: int
) -> dict[PeerId, list[str]]:
    """Who takes our place for which keys when we leave. Nobody where all that are there keep it already."""
    heirs: dict[PeerId, list[str]] = {}
    for key in keys:
        target = key_id(key)
        nearest = sorted(nearby, key=lambda contact: contact.id ^ target)[:replicas]
        if len(nearest) == replicas and own ^ target < nearest[-1].id ^ target:
            heirs.setdefault(nearest[-1].peer, []).append(key)
    return heirs


@final
class Handover:
    """See the file's opening. ``run`` it beside the node; ``leave`` when it goes."""

    def __init__(
        self, exchange: Exchange, table: Table, *, clock: Callable[[], float], replicas: int
    ) -> None:
        self._exchange = exchange
        self._table = table
        self._clock = clock
        self._replicas = replicas
        self._waiting: OrderedDict[PeerId, Contact] = OrderedDict()
        self._woken = trio.Event()

    def newcomer(self, contact: Contact) -> None:
        """A member entered the routing table."""
        if not len(self._exchange.records):
            return
        self._waiting[contact.peer] = contact
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
        self._woken.set()

    async def run(self) -> None:
        """Hand newcomers what is theirs to keep, for ever."""
        while True:
            await self._woken.wait()
            await trio.sleep(SETTLE_S)
            self._woken = trio.Event()
            waiting, self._waiting = self._waiting, OrderedDict()
            nearby = self._nearby()
            for contact in nearby:
                if contact.peer in waiting:
                    keys = self._exchange.records.keys
                    theirs = gained(contact, self._table.own_id, nearby, keys, self._replicas, waiting)
                    await self._hand(contact, list(theirs))
                    await trio.lowlevel.checkpoint()

    async def leave(self) -> None:
        """Say goodbye and hand over what we keep; the caller's deadline ends it."""
        self._exchange.leaving = True
        told = set[PeerId]()
        left = set(self._exchange.records.keys)

        async def hand(contact: Contact, keys: list[str]) -> None:
            if await (self._hand(contact, keys) if keys else self._send(contact, [])):
                left.difference_update(keys)

        for _ in range(HEIRS):  # where an heir is gone, it is out of the table by the next turn
            nearby = self._nearby()
            keys = [key for key in self._exchange.records.keys if key in left]
            heirs = inherited(self._table.own_id, nearby, keys, self._replicas)
            due = [contact for contact in nearby if contact.peer in heirs or contact.peer not in told]
            async with trio.open_nursery() as nursery:
                for contact in due:
                    nursery.start_soon(hand, contact, heirs.get(contact.peer, []))
            told.update(contact.peer for contact in due)

    def _nearby(self) -> list[Contact]:
        return self._table.nearest(self._table.own_id, NEARBY)

    async def _hand(self, contact: Contact, keys: Sequence[str]) -> bool:
        """Whether it answered to all of it."""
        batch: list[Record] = []
        for key in keys:
            for record in self._exchange.records.get(key, self._clock()).values():
                if record.owner == contact.peer:
                    continue
                batch.append(record)
                if len(batch) == messages.MAX_BATCH:
                    if not await self._send(contact, batch):
                        return False
                    batch = []
        return not batch or await self._send(contact, batch)

    async def _send(self, contact: Contact, batch: Sequence[Record]) -> bool:
        try:
            await self._exchange.hand_over(contact, batch)
        except (P2PError, trio.TooSlowError):
            return False
        return True
