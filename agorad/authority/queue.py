"""The queue of joiners: who waits where, for how long, and whose turn it is. Pure; time is an argument.

Theory of operation. A place belongs to a peer and is ordered by arrival. It stays while the peer's stream
is open and ``place_kept_s`` beyond, so that a dropped line or a restart, of either side, costs nothing:
the role writes places to the store and gives them back by ``restore``. Turns are first come, first served
among those whose stream is open; who is away is passed over and keeps its place. A turn comes when joins are
not paused, a slot of the run is free, and the pace (``joins_per_minute``; 0: none) allows one more.

``Queue`` decides nothing about the run: free slots, the pause and others' grants are arguments. Limits:
``queue_limit`` places; the pace of the last 32 grants is what estimates are made of where no pace is set.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Final

import attrs

from agorad.authority.admission import check_download, refusal
from agorad.run import Admission
from p2p.errors import Refused

RECENT: Final = 32
RECENT_S: Final = 3600.0
"""Grants longer ago say nothing about the pace."""
FULL_RETRY_S: Final = 60.0


@attrs.define
class Place:
    """One peer's. Times are of the queue's clock."""

    peer: str
    account: str
    arrived: float
    seen: float
    """When its stream was last open."""
    open: bool = True
    finished: bool = False
    """Whether it holds the state already."""
    stage: int | None = None
    """Where it will probably go."""
    saved: bool = False
    """Whether the store has it."""


@attrs.frozen
class View:
    """What a queued peer is told."""

    position: int
    eta_s: float | None
    paused: bool
    waitlisted: bool


class Queue:
    """See the module's head."""

    def __init__(self, rules: Admission) -> None:
        self.rules = rules
        """May be replaced by those of a newer manifest."""
        self._places: dict[str, Place] = {}  # in order of arrival
        self._grants: deque[float] = deque(maxlen=RECENT)
        self._heard = -math.inf

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, peer: str) -> bool:
        return peer in self._places

    @property
    def places(self) -> list[Place]:
        """In order."""
        return list(self._places.values())

    def restore(self, places: Iterable[Place], now: float) -> None:
        """Places of an earlier life of this authority; their peers have ``place_kept_s`` to come back."""
        for place in sorted(places, key=lambda place: place.arrived)[: self.rules.queue_limit]:
            if place.peer not in self._places:
                self._places[place.peer] = attrs.evolve(place, open=False, seen=now, saved=True)
        self._sort()

    def enter(self, peer: str, account: str, now: float, *, arrived: float | None = None) -> Place:
        """A place at the end, or the one kept here or (``arrived``) elsewhere. ``Refused`` if full."""
        place = self._places.get(peer)
        if place is not None and place.account == account:
            place.open, place.seen = True, now
            return place
        if place is None and len(self._places) >= self.rules.queue_limit:
            raise refusal(
                "queue_full",
                f"{len(self._places)} nodes are waiting already, as many as may (admission.queue_limit)",
                FULL_RETRY_S,
            )
        self._places.pop(peer, None)
        place = Place(peer, account, now if arrived is None else min(arrived, now), now)
        self._places[peer] = place
        if arrived is not None:
            self._sort()
        return place

    def drop(self, peer: str, now: float) -> None:
        """Its stream ended; the place is kept for a while."""
        place = self._places.get(peer)
        if place is not None:
            place.open, place.seen = False, now

    def remove(self, peer: str) -> None:
        """It is in, or out for good."""
        self._places.pop(peer, None)

    def progress(self, peer: str, now: float, *, finished: bool, eta_s: float | None) -> None:
        """How far its download is; ``Refused`` if that is too slow."""
        place = self._places[peer]
        if finished:
            place.finished = True
        elif not place.finished:
            check_download(self.rules, now - place.arrived, eta_s)

    def expire(self, now: float) -> list[Place]:
        """Kept places that ran out just now; they are no longer in the queue."""
        gone = [
            place
            for place in self._places.values()
            if not place.open and now - place.seen > self.rules.place_kept_s
        ]
        for place in gone:
            del self._places[place.peer]
        return gone

    def overdue(self, peer: str, now: float) -> Refused | None:
        """The refusal of a peer that waited for too long."""
        place, limit = self._places[peer], self.rules.queue_timeout_s
        if limit and now - place.arrived > limit:
            return refusal(
                "queue_timeout",
                f"no place came free in {now - place.arrived:.0f} s; at most {limit:g} s are waited "
                "(admission.queue_timeout_s)",
            )
        return None

    def turns(self, now: float, *, free: int, paused: bool) -> list[str]:
        """Whose turn it is, first come first. With a pace that is one at a time."""
        if paused or free <= 0:
            return []
        if self.rules.pace_s:
            if self.wait_s(now) > 0:
                return []
            free = 1
        present = (place.peer for place in self._places.values() if place.open)
        return [peer for peer, _slot in zip(present, range(free), strict=False)]

    def granted(self, peer: str, now: float) -> None:
        """It got its certificate."""
        self.remove(peer)
        self._grants.append(now)

    def heard(self, at: float) -> None:
        """When the last node was let in: by another authority of the run, or in an earlier life."""
        self._heard = at

    def wait_s(self, now: float) -> float:
        """Until the pace allows the next grant."""
        if not self.rules.pace_s:
            return 0.0
        last = max(self._heard, self._grants[-1] if self._grants else -math.inf)
        return max(0.0, last + self.rules.pace_s - now)

    def views(self, now: float, *, free: int, paused: bool) -> dict[str, View]:
        """What to tell everybody whose stream is open."""
        return {
            place.peer: View(
                position, self._eta_s(position, now, free=free, paused=paused), paused, free <= 0
            )
            for position, place in enumerate(self._places.values(), 1)
            if place.open
        }

    def newcomer(self, now: float, *, free: int, paused: bool) -> View:
        """What a node would be told that came now."""
        position = len(self._places) + 1
        eta_s = self._eta_s(position, now, free=free, paused=paused)
        return View(position, eta_s, paused, free <= 0)

    def _eta_s(self, position: int, now: float, *, free: int, paused: bool) -> float | None:
        if paused:
            return None
        if free >= position:
            return self.wait_s(now) + (position - 1) * self.rules.pace_s
        recent = [at for at in self._grants if now - at < RECENT_S]
        if len(recent) < 2:
            return None
        return position * (now - recent[0]) / len(recent)

    def _sort(self) -> None:
        self._places = {
            place.peer: place for place in sorted(self._places.values(), key=lambda place: place.arrived)
        }
