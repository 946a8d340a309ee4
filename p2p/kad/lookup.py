"""One iterative lookup as a state machine: answers in, whom to ask next out.

Theory of operation. The shortlist holds every candidate heard of, ordered by distance to the target.
At most ``alpha`` questions are on their way at a time; ``due`` names the next to ask, always the
nearest not asked yet among those that could still matter. The lookup is over when the ``need``
nearest candidates that have not failed have all answered: nobody nearer is left to ask. Looking for
nodes, ``need`` is k; looking for records it is the quorum, because the writer put its record on the
k nearest and a few of them agree with the rest.

Disjoint paths. An answer can be a lie: ids that the liar ground to lie near the target would be all
that is asked from then on. So the lookup runs as ``PATHS`` searches (no more than ``need``). Each starts
from all that we know ourselves, goes on only to those that its own answers named, asks nobody that another
one asked, and has a share of ``need`` to hear itself before the lookup is over; one liar captures one
path, and the others still end at honest nodes. A path that knows nobody further may go on to anybody. What
all paths know together is searched with the room they leave, so that nothing is lost where nobody lies.
``spread`` takes no more than half of a result from one path.

Two clocks keep a dead peer cheap. After ``patience`` seconds a silent peer no longer counts against
``alpha`` nor holds up the end, so the lookup goes on around it; its answer still counts if it comes.
The caller gives every question a deadline of its own (a second) and reports ``failed`` then.

Limits: ``max_candidates`` in the shortlist (the farthest unasked go first) and ``max_queries``
questions in all, whatever the answers claim. An answer can therefore waste our time, never our
memory. Sources: Kademlia (2002), section 2.3; Baumgart and Mies, *S/Kademlia* (2007), section 4.4.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from typing import Final, final

import attrs

from p2p.errors import LocalError
from p2p.identity import PeerId
from p2p.kad.table import MAX_ADDRS, Contact

PATHS: Final = 3
"""As many as questions at a time and as answers that make a quorum: independence costs no question more."""


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
    path: _Path | None = None
    """The path that asked it or, before that, named it; None: known at the start, or to several."""


@attrs.define(eq=False)
class _Path:
    share: int
    """How many answers this path is to hear by itself."""
    order: list[tuple[int, PeerId]] = attrs.field(factory=list)
    """Whom it knows, nearest first."""


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
        self._paths = [_Path(0) for _ in range(min(PATHS, need))]
        self._share()
        self._hear(start, 1, None)

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
        room = min(room, self._max_queries - self.queries)
        for path in self._turns():
            if len(asked) >= room:
                break
            frontier = self._frontier(now, path)
            found = next((known for known in frontier if known.state is _State.HEARD), None)
            if found is None:
                continue
            found.state = _State.ASKED
            found.asked_at = now
            found.path = path or found.path or self._paths[0]
            self._asked[found.contact.peer] = found
            self.queries += 1
            asked.append(found.contact)
        return asked

    def _turns(self) -> Iterator[_Path | None]:
        """Who may ask next: each path in turn while one has a question, those with fewest open first.

        Then everybody together (None).
        """
        while True:
            before = self.queries
            yield from sorted(self._paths, key=self._open_questions)
            if self.queries == before:
                break
        while True:
            before = self.queries
            yield None
            if self.queries == before:
                return

    def _open_questions(self, path: _Path) -> int:
        return sum(1 for waiting in self._asked.values() if waiting.path is path)

    def answered(self, peer: PeerId, closer: Iterable[Contact], *, counts: bool = True) -> None:
        """The peer replied and named others. A reply that nobody waits for is ignored.

        ``counts`` says whether it may be one of those that end the search: ids cost nothing, memberships do.
        """
        candidate = self._asked.pop(peer, None)
        if candidate is None:
            return
        candidate.state = _State.ANSWERED if counts else _State.FAILED
        self._hear(closer, candidate.depth + 1, candidate.path)

    def failed(self, peer: PeerId) -> None:
        """The peer refused, broke, or let its deadline pass."""
        candidate = self._asked.pop(peer, None)
        if candidate is not None:
            candidate.state = _State.FAILED

    def widen(self, need: int) -> None:
        """Ask for more answers than first wanted, for instance because all so far were empty."""
        self.need = max(self.need, need)
        self._share()

    def done(self, now: float) -> bool:
        """Whether asking further could change nothing.

        A slow peer is passed over while somebody else may still be asked; once nobody is left, the
        slow ones are waited for too, unless ``need`` others have answered by then.
        """
        if all(self._finished(now, path) for path in (*self._paths, None)):
            return True
        return self.queries >= self._max_queries and not self._asked

    def _finished(self, now: float, path: _Path | None) -> bool:
        frontier = self._frontier(now, path)
        if any(candidate.state is not _State.ANSWERED for candidate in frontier):
            return False
        if len(frontier) >= (self.need if path is None else path.share):
            return True
        return not (self._asked if path is None else self._open_questions(path))

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

    def unasked(self) -> list[Contact]:
        """Who was heard of and not asked, nearest first."""
        known = (self._candidates[peer] for _, peer in self._order)
        return [candidate.contact for candidate in known if candidate.state is _State.HEARD]

    def nearest(self, count: int) -> list[PeerId]:
        """The nearest candidates that have not failed, whether they were asked or not."""
        return [candidate.contact.peer for candidate in self._nearest(self._order, count, -math.inf, None)]

    def spread(self) -> list[Contact]:
        """As ``result``, but no more than half from one path where the others found enough."""
        most = self.need if len(self._paths) == 1 else -(-self.need // 2)
        taken: list[_Candidate] = []
        passed: list[_Candidate] = []
        for _, peer in self._order:
            candidate = self._candidates[peer]
            if candidate.state is _State.ANSWERED:
                full = sum(1 for one in taken if one.path is candidate.path) >= most
                (passed if full else taken).append(candidate)
        found = [*taken[: self.need], *passed[: max(0, self.need - len(taken))]]
        return sorted((one.contact for one in found), key=lambda contact: contact.id ^ self.target)

    def _slow(self, candidate: _Candidate, now: float) -> bool:
        return now >= candidate.asked_at + self._patience

    def _share(self) -> None:
        for number, path in enumerate(self._paths):
            path.share = (self.need + len(self._paths) - 1 - number) // len(self._paths)

    def _frontier(self, now: float, path: _Path | None) -> list[_Candidate]:
        """The nearest candidates that are neither failed nor slow: a path's share of its own, or ``need``."""
        if path is None:
            return self._nearest(self._order, self.need, now, None)
        frontier = self._nearest(path.order, path.share, now, path)
        if len(frontier) < path.share:  # it knows nobody further: then whoever is known at all
            frontier = self._nearest(self._order, path.share, now, path)
        return frontier

    def _nearest(
        self, order: list[tuple[int, PeerId]], count: int, now: float, path: _Path | None
    ) -> list[_Candidate]:
        found: list[_Candidate] = []
        for _, peer in order:
            candidate = self._candidates[peer]
            state = candidate.state
            if state is not _State.HEARD:
                if state is _State.FAILED or (path is not None and candidate.path is not path):
                    continue
                if state is _State.ASKED and self._slow(candidate, now):
                    continue
            found.append(candidate)
            if len(found) == count:
                break
        return found

    def _hear(self, contacts: Iterable[Contact], depth: int, path: _Path | None) -> None:
        for contact in contacts:
            if contact.peer == self._own:
                continue
            entry = contact.id ^ self.target, contact.peer
            known = self._candidates.get(contact.peer)
            if known is None:
                self._candidates[contact.peer] = _Candidate(contact, depth=depth, path=path)
                insort(self._order, entry)
            elif known.state is _State.HEARD and known.path is not path:
                known.path = None
                if contact.addrs != known.contact.addrs:  # one of the two may not be true
                    addrs = (*known.contact.addrs[: MAX_ADDRS // 2], *contact.addrs[: MAX_ADDRS // 2])
                    known.contact = Contact(contact.peer, tuple(dict.fromkeys(addrs)))
            for knows in self._paths if path is None else (path,):
                at = bisect_left(knows.order, entry)
                if at == len(knows.order) or knows.order[at] != entry:
                    knows.order.insert(at, entry)
        if len(self._order) > self._max_candidates:
            self._forget_farthest()

    def _forget_farthest(self) -> None:
        """Drop the farthest of those not asked, of each path so many that none crowds out another."""
        common = [peer for _, peer in self._order if self._candidates[peer].path is None]
        kept = set(common[: self._max_candidates])
        room = self._max_candidates // len(self._paths)
        for path in self._paths:
            own = [peer for _, peer in path.order if self._candidates[peer].path is path]
            unasked = [peer for peer in own if self._candidates[peer].state is _State.HEARD]
            kept.update(own)
            kept.difference_update(unasked[max(0, room - (len(own) - len(unasked))) :])
        self._candidates = {peer: known for peer, known in self._candidates.items() if peer in kept}
        for order in (self._order, *(path.order for path in self._paths)):
            order[:] = [entry for entry in order if entry[1] in self._candidates]
