"""One iterative lookup as a state machine: answers in, whom to ask next out.

Theory of operation. The shortlist holds every candidate heard of, ordered by distance to the target.
At most ``alpha`` questions are on their way at a time; ``due`` names the next to ask, always the
nearest not asked yet among those that could still matter. The lookup is over when the ``need``
nearest candidates that have not failed have all answered: nobody nearer is left to ask. Looking for
nodes, ``need`` is k; looking for records it is the quorum, because the writer put its record on the
k nearest and a few of them agree with the rest.

Two clocks keep a dead peer cheap. After ``patience`` seconds a silent peer no longer counts against
``alpha`` nor holds up the end, so the lookup goes on around it; its answer still counts if it comes.
The caller gives every question a deadline of its own (a second) and reports ``failed`` then.

Limits: ``max_candidates`` in the shortlist (the farthest unasked go first) and ``max_queries``
questions in all, whatever the answers claim. An answer can therefore waste our time, never our
memory. Source: Kademlia (2002), section 2.3; need = quorum as in S/Kademlia and hivemind's traversal.
"""

from __future__ import annotations

import enum
from bisect import insort
from collections.abc import Iterable
from typing import final

import attrs

from p2p.errors import LocalError
from p2p.identity import PeerId
from p2p.kad.table import Contact


class _State(enum.Enum):
    HEARD = enum.auto()
    ASKED = enum.auto()
    ANSWERED = enum.auto()
    FAILED = enum.auto()


@attrs.define
class _Candidate:
    contact: Contact
    state: _State = _State.HEARD
    asked_at: float = 0.0
    depth: int = 1
    """Questions between us and it: 1 for who was known from the start."""


@final
class Lookup:
    """See the file's opening. ``due`` / ``answered`` / ``failed`` until ``done``; then ``result``."""

    def __init__(
        self,
        target: int,
        start: Iterable[Contact],
        *,
        own: PeerId,
        need: int,
        alpha: int = 3,
        patience: float = 0.4,
        max_candidates: int = 128,
        max_queries: int = 64,
    ) -> None:
        if need < 1 or alpha < 1:
            raise LocalError(f"a lookup needs at least one answer and one question, not {need} and {alpha}")
        self.target = target
        self.need = need
        self.queries = 0
        self._own = own
        self._alpha = alpha
        self._patience = patience
        self._max_candidates = max_candidates
        self._max_queries = max_queries
        self._candidates: dict[PeerId, _Candidate] = {}
        self._order: list[tuple[int, PeerId]] = []
        self._asked: dict[PeerId, _Candidate] = {}
        self._hear(start, 1)

    @property
    def hops(self) -> int:
        """Questions one after the other that led to the nearest node that answered; 0: nobody did."""
        for _, peer in self._order:
            if self._candidates[peer].state is _State.ANSWERED:
                return self._candidates[peer].depth
        return 0

    def due(self, now: float) -> list[Contact]:
        """Whom to ask now; they count as asked from here on."""
        asked: list[Contact] = []
        room = self._alpha - sum(1 for waiting in self._asked.values() if not self._slow(waiting, now))
        if room <= 0:
            return asked
        for candidate in self._frontier(now):
            if room <= 0 or self.queries >= self._max_queries:
                break
            if candidate.state is _State.HEARD:
                candidate.state = _State.ASKED
                candidate.asked_at = now
                self._asked[candidate.contact.peer] = candidate
                self.queries += 1
                room -= 1
                asked.append(candidate.contact)
        return asked

    def answered(self, peer: PeerId, closer: Iterable[Contact]) -> None:
        """The peer replied and named others. A reply that nobody waits for is ignored."""
        candidate = self._asked.pop(peer, None)
        if candidate is None:
            return
        candidate.state = _State.ANSWERED
        self._hear(closer, candidate.depth + 1)

    def failed(self, peer: PeerId) -> None:
        """The peer refused, broke, or let its deadline pass."""
        candidate = self._asked.pop(peer, None)
        if candidate is not None:
            candidate.state = _State.FAILED

    def widen(self, need: int) -> None:
        """Ask for more answers than first wanted, for instance because all so far were empty."""
        self.need = max(self.need, need)

    def done(self, now: float) -> bool:
        """Whether asking further could change nothing.

        A slow peer is passed over while somebody else may still be asked; once nobody is left, the
        slow ones are waited for too, unless ``need`` others have answered by then.
        """
        frontier = self._frontier(now)
        if any(candidate.state is _State.HEARD for candidate in frontier):
            return self.queries >= self._max_queries and not self._asked
        if any(candidate.state is _State.ASKED for candidate in frontier):
            return False
        return len(frontier) >= self.need or not self._asked

    def timer(self, now: float) -> float | None:
        """When ``due`` or ``done`` may change without an answer: the next peer turning slow."""
        times = [
            waiting.asked_at + self._patience
            for waiting in self._asked.values()
            if not self._slow(waiting, now)
        ]
        return min(times, default=None)

    def result(self) -> list[Contact]:
        """The nearest candidates that answered, nearest first, at most ``need``."""
        found: list[Contact] = []
        for _, peer in self._order:
            candidate = self._candidates[peer]
            if candidate.state is _State.ANSWERED:
                found.append(candidate.contact)
                if len(found) == self.need:
                    break
        return found

    def _slow(self, candidate: _Candidate, now: float) -> bool:
        return now >= candidate.asked_at + self._patience

    def _frontier(self, now: float) -> list[_Candidate]:
        """The ``need`` nearest candidates that are neither failed nor slow."""
        frontier: list[_Candidate] = []
        for _, peer in self._order:
            candidate = self._candidates[peer]
            if candidate.state is _State.FAILED:
                continue
            if candidate.state is _State.ASKED and self._slow(candidate, now):
                continue
            frontier.append(candidate)
            if len(frontier) == self.need:
                break
        return frontier

    def _hear(self, contacts: Iterable[Contact], depth: int) -> None:
        for contact in contacts:
            if contact.peer == self._own or contact.peer in self._candidates:
                continue
            self._candidates[contact.peer] = _Candidate(contact, depth=depth)
            insort(self._order, (contact.id ^ self.target, contact.peer))
        if len(self._order) > self._max_candidates:
            self._forget_farthest()

    def _forget_farthest(self) -> None:
        kept: list[tuple[int, PeerId]] = []
        for entry in self._order:
            unasked = self._candidates[entry[1]].state is _State.HEARD
            if unasked and len(kept) >= self._max_candidates:
                del self._candidates[entry[1]]
            else:
                kept.append(entry)
        self._order = kept
