"""Who works on which shard of the data: leases that pass to another trainer when one is gone.

Each trainer of the manifest has a shard of its own, and says in one signed record how far it is with the
ones it holds and until when it holds them. Of several claims on a shard the one with the highest term counts
(tie: the higher peer id). A claim that was not renewed for ``SKEW_S`` beyond its end is over: the shard's own
trainer takes it at once, the others in turn, ``TURN_S`` apart, counted round from the shard's own; each with
the next term, and from the highest mark that anybody told. Who was silent and hears of a higher term lets go.
A trainer that comes back to find its shard held by another asks for it; the holder ends what is in flight,
frees it, and it goes home. Two may hold a shard for a moment; then some rows are trained on twice, none is
left out. A trainer with other data (by fingerprint) takes no shard over: positions mean other rows there.

Sans-IO: ``look`` is given the time and what the records say, and says what to take, drop and give back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from p2p.identity import PeerId
from p2p.records import Claim, LeaseRecord
from stage.data import Cursor
from stage.progress import Shard

LEASE_S = 20.0
SKEW_S = 5.0
"""How far trainers' clocks may be apart without harm."""
TURN_S = 10.0
MAX_SHARDS = 16
"""Most that one trainer holds."""
TOLD = 32
"""Most positions above the mark that a claim tells."""


def claim_of(number: int, term: int, state: str, shard: Shard) -> Claim:
    """What a record says of a shard."""
    done = tuple(sorted(shard.done)[:TOLD])
    return Claim(number, term, state, shard.mark, shard.completed, done, attrs.astuple(shard.cursor))


def progress_of(claim: Claim) -> Shard:
    """How far a shard is by a claim."""
    return Shard(claim.mark, set(claim.done), Cursor(*claim.cursor))


@attrs.frozen
class Look:
    """What to do now."""

    take: tuple[tuple[int, Shard | None], ...] = ()
    """Shards to work on, and how far they are by what was told."""
    drop: tuple[int, ...] = ()
    """Shards that another holds by now."""
    give_back: tuple[int, ...] = ()
    """Shards that their own trainer asks for: ``free`` them once nothing of them is in flight."""


class Leases:
    """The view of one trainer."""

    def __init__(self, me: PeerId, trainers: Sequence[PeerId], data: str, now: float) -> None:
        self._me = me
        self._trainers = list(trainers)
        self._data = data
        self._since = now
        """A trainer that never said a word is waited for from then on."""
        self.held: dict[int, int] = {}
        """Shards and the terms of our claims."""
        self._freed: dict[int, int] = {}
        self._wanted: set[int] = set()
        self._completed: dict[int, int] = {}
        self._apart: set[int] = set()
        """Shards whose last claim is of other data and over: nobody here can go on with them."""

    def free(self, shard: int) -> None:
        """We work on it no more."""
        self._freed[shard] = self.held.pop(shard)

    def record(self, now: float, progress: Callable[[int], Shard]) -> LeaseRecord:
        """What to publish."""
        states = [(self.held, "held"), (self._freed, "free"), (dict.fromkeys(self._wanted, 0), "wanted")]
        claims = [
            claim_of(shard, term, state, progress(shard))
            for shards, state in states
            for shard, term in sorted(shards.items())
        ]
        return LeaseRecord(until=now + LEASE_S, data=self._data, claims=tuple(claims[:MAX_SHARDS]))

    def completed(self, shard: int) -> int:
        """Positions that are known to be done by somebody else's word."""
        return self._completed.get(shard, 0)

    def hopeless(self, shard: int) -> bool:
        """Whether nobody is left who could go on with it here."""
        return shard in self._apart

    def look(self, now: float, records: Mapping[PeerId, LeaseRecord]) -> Look:
        """``records``: all that there are, this trainer's own too."""
        claims: dict[int, list[tuple[int, PeerId, LeaseRecord, Claim]]] = {}
        wanted: set[int] = set()
        for owner, record in records.items():
            if owner not in self._trainers:
                continue
            for claim in record.claims:
                if claim.state != "wanted":
                    claims.setdefault(claim.shard, []).append((claim.term, owner, record, claim))
                elif self._trainers.index(owner) == claim.shard and now < record.until + SKEW_S:
                    wanted.add(claim.shard)
        take: list[tuple[int, Shard | None]] = []
        drop: list[int] = []
        self._wanted.clear()
        self._apart.clear()
        for shard in range(len(self._trainers)):
            of_shard = claims.get(shard, [])
            best = max(of_shard, key=lambda one: one[:2], default=None)
            if best is not None and best[1] != self._me:
                self._freed.pop(shard, None)
            told = max((one[3].completed for one in of_shard), default=0)
            self._completed[shard] = max(told, self._completed.get(shard, 0))
            if shard in self.held:
                if best is not None and best[:2] > (self.held[shard], self._me):
                    drop.append(shard)
            elif (term := self._free_to_take(shard, best, now)) is not None:
                known = [claim for _term, _owner, record, claim in of_shard if record.data == self._data]
                furthest = max(known, key=lambda claim: claim.mark, default=None)
                take.append((shard, progress_of(furthest) if furthest else None))
                self.held[shard] = term
                self._freed.pop(shard, None)
        for shard in drop:
            del self.held[shard]
        back = tuple(shard for shard in self.held if shard in wanted and self._trainers[shard] != self._me)
        return Look(tuple(take), tuple(drop), back)

    def _free_to_take(
        self, shard: int, best: tuple[int, PeerId, LeaseRecord, Claim] | None, now: float
    ) -> int | None:
        """The term to take it with; None if it is not ours to take."""
        at_home = self._trainers[shard] == self._me
        turn = (self._trainers.index(self._me) - shard) % len(self._trainers)
        if best is None:
            return 0 if at_home or now > self._since + LEASE_S + SKEW_S + turn * TURN_S else None
        term, owner, record, claim = best
        if owner == self._me:  # from before a restart, or freed and nobody came
            again = claim.state == "held" or at_home or now > record.until + SKEW_S + turn * TURN_S
            return term + (claim.state != "held") if again else None
        over = now > record.until + SKEW_S + (0.0 if at_home else turn * TURN_S)
        if record.data != self._data:
            if at_home:
                return term + 1
            if over:
                self._apart.add(shard)
            return None
        if over or (at_home and claim.state == "free"):
            return term + 1 if len(self.held) < MAX_SHARDS else None
        if at_home:
            self._wanted.add(shard)
        return None
