"""The waiting room: ``Queue`` with streams attached. Nobody polls; changes are pushed.

Theory of operation. A joiner's task holds a ``Waiter`` while it waits. ``run`` is the only task that looks
at the queue: woken by who comes and goes, by a grant, by the pace's next slot, and each second while somebody
waits (settings and grants of other authorities lie in the database), it reads the capacity, calls up whose
turn it is and hands everybody else a new view. How often a waiter hears of it is its own affair: the first
ten at once, the others every ``NEWS_S``, so that a grant among a thousand costs no thousand messages.

A place is written to the store once its owner has to wait (``save``), and taken out (``forget``) when it is
in or out for good.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import attrs
import trio

from agorad.authority.issue import Capacity
from agorad.authority.queue import Place, Queue, View
from p2p.errors import Refused

NEWS_S: Final = 2.0
NEAR: Final = 10
"""Positions that hear at once."""
LOOK_S: Final = 1.0
GAP_S: Final = 0.01
"""Between two looks, and more for each who waits."""
GAP_EACH_S: Final = 0.0005
ETA_S: Final = 10.0
"""An estimate that is off by less is not corrected."""


@attrs.define(eq=False)
class Waiter:
    """One joiner's stream."""

    place: Place
    view: View | None = None
    told: View | None = None
    called: bool = False
    """It is its turn."""
    out: Refused | None = None
    """It waited for too long."""
    _news: trio.Event = attrs.field(factory=trio.Event)

    def show(self, view: View | None, *, called: bool, out: Refused | None) -> None:
        """What the room found; wakes the stream if that is something to act on."""
        self.view, self.called, self.out = view, called, out
        if called or out is not None or (view is not None and differs(view, self.told)):
            self._news.set()

    async def news(self) -> None:
        """Until there is something to say, to do or to refuse; at most every ``NEWS_S`` far back."""
        if self.told is not None and self.told.position > NEAR:
            with trio.move_on_after(NEWS_S):
                while not (self.called or self.out):
                    await self._next()
            if self.view is not None and differs(self.view, self.told):
                return
        while not (self.called or self.out or (self.view is not None and differs(self.view, self.told))):
            await self._next()

    async def _next(self) -> None:
        self._news = trio.Event()
        await self._news.wait()


class WaitingRoom:
    """See the module's head. ``capacity`` reads the store, ``save`` and ``forget`` write to it."""

    def __init__(
        self,
        queue: Queue,
        *,
        clock: Callable[[], float],
        capacity: Callable[[], Awaitable[Capacity]],
        save: Callable[[Place], Awaitable[None]],
        forget: Callable[[str], Awaitable[None]],
    ) -> None:
        self.queue = queue
        self._clock = clock
        self._capacity = capacity
        self._save = save
        self._forget = forget
        self._waiters: dict[str, Waiter] = {}
        self._changed = trio.Event()

    def __len__(self) -> int:
        return len(self._waiters)

    def changed(self) -> None:
        """Something that turns depend on is another."""
        self._changed.set()

    def of_account(self, account: str) -> set[str]:
        """The account's nodes that wait."""
        return {place.peer for place in self.queue.places if place.account == account}

    def stages(self, besides: str) -> dict[int, int]:
        """Where those who wait will probably go."""
        return Counter(
            place.stage for place in self.queue.places if place.stage is not None and place.peer != besides
        )

    def enter(self, peer: str, account: str) -> Waiter:
        """A place in the queue; ``waiting`` comes next. ``Refused`` if the queue is full."""
        waiter = Waiter(self.queue.enter(peer, account, self._clock()))
        self._waiters[peer] = waiter
        self.changed()
        return waiter

    @contextmanager
    def waiting(self, waiter: Waiter) -> Iterator[None]:
        """Its place is kept for a while if the block is left without ``close``."""
        peer = waiter.place.peer
        try:
            yield
        finally:
            if self._waiters.get(peer) is waiter:
                del self._waiters[peer]
            self.queue.drop(peer, self._clock())
            self.changed()

    async def save(self, place: Place) -> None:
        """The place outlives this process from now on."""
        if not place.saved:
            await self._save(place)
            place.saved = True

    async def close(self, place: Place, *, granted: bool) -> None:
        """Its owner is in, or out for good."""
        if granted:
            self.queue.granted(place.peer, self._clock())
        else:
            self.queue.remove(place.peer)
        self.changed()
        if place.saved:
            await self._forget(place.peer)

    async def run(self) -> None:
        """Look whenever something changed, for ever."""
        while True:
            self._changed = trio.Event()
            await self._look()
            # A crowd is looked at together, and the larger it is the less often.
            await trio.sleep(GAP_S + len(self._waiters) * GAP_EACH_S)
            again_s = math.inf
            if len(self.queue):
                again_s = min(LOOK_S, self.queue.wait_s(self._clock()) or LOOK_S)
            with trio.move_on_after(again_s):
                await self._changed.wait()

    async def _look(self) -> None:
        capacity = await self._capacity()
        now = self._clock()
        self.queue.heard(capacity.last_entered)
        for place in self.queue.expire(now):
            if place.saved:
                await self._forget(place.peer)
        turns = set(self.queue.turns(now, free=capacity.free, paused=capacity.paused))
        views = self.queue.views(now, free=capacity.free, paused=capacity.paused)
        for peer, waiter in self._waiters.items():
            if peer in self.queue:
                waiter.show(views.get(peer), called=peer in turns, out=self.queue.overdue(peer, now))


def differs(view: View, told: View | None) -> bool:
    """Whether this is worth a message: an estimate that runs down by itself is not."""
    if told is None or (view.position, view.paused, view.waitlisted) != (
        told.position,
        told.paused,
        told.waitlisted,
    ):
        return True
    if view.eta_s is None or told.eta_s is None:
        return view.eta_s is not told.eta_s
    return abs(view.eta_s - told.eta_s) > max(ETA_S, told.eta_s / 4)
