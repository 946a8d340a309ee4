"""Which parts count: one agreement a round, so that all who finish have averaged the same bytes.

Why it exists. The butterfly gives every member the same bytes for each part it receives, but faults may
leave members with different *sets* of parts. Members that merged different sets would drift apart and
disagree about the round's checksum. So each member reports what it holds (a digest a part), one member
computes the verdict (the parts that all reporters hold alike), and the verdict is *decided* by a majority
of the roster. Only a decided verdict is ever applied; who cannot learn it changes nothing.

Theory of operation: single-decree Paxos (Lamport, "Paxos Made Simple", 2001) with one ballot a member.
Ballot k belongs to member k of the roster, so numbers never collide. Ballot 0 needs no prepare phase. The
owner of ballot k > 0 steps in when all earlier owners are lost to it, or when its time comes:

    owner k      prepare(k) -> promise(k, what was accepted before)      only k > 0
                 accept(k, value) -> accepted(k)                         a majority: decided
                 decided(value) to all, and whoever learns it first tells all the others

What that gives, whatever crashes, stops, or loses links (not against members that lie about what they
accepted): at most one value is ever decided. What it costs: with half of the roster or more dead the round
fails for all, and a member may fail where others finish. Never two members that finish differently.

A report that holds little (its sender has lost links that others have) must not void the round: reporters
with less than ``ENOUGH`` of what the best one holds are left out; they sit the round out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import attrs

from p2p.averaging import fields
from p2p.errors import RemoteError

DIGEST: Final = 16
"""Bytes of a part's digest (blake3, cut)."""
NOTHING: Final = bytes(DIGEST)
"""The digest of a part that is not held."""
ENOUGH: Final = 0.75

MESSAGES: Final = frozenset({"report", "prepare", "promise", "accept", "accepted", "decided"})


@attrs.frozen
class Value:
    """What is decided: who finishes (a bit mask of members) and the digest of every part that counts."""

    mask: int
    digests: bytes = attrs.field(repr=False)

    def digest(self, part: int) -> bytes:
        return self.digests[part * DIGEST : (part + 1) * DIGEST]


@attrs.frozen
class Note:
    """A message of this module to one member."""

    to: int
    header: dict[str, Any]
    payload: bytes = attrs.field(default=b"", repr=False)


class Verdict:
    """One member's share in the agreement. Inputs append to ``out``; ``decided`` appears at most once."""

    def __init__(self, me: int, members: int, parts: int) -> None:
        self._me = me
        self._n = members
        self._parts = parts
        self.reports: dict[int, bytes] = {}
        self.out: list[Note] = []
        self.decided: Value | None = None
        self.started = False
        self._promised = 0
        self._accepted: tuple[int, Value] | None = None
        self._promises: dict[int, tuple[int, Value] | None] = {}
        self._proposal: Value | None = None
        self._votes: set[int] = set()

    @property
    def quorum(self) -> int:
        """Members that must accept: more than half of the roster, dead ones counted."""
        return self._n // 2 + 1

    def report(self, digests: bytes) -> None:
        """State once what this member holds."""
        self.reports[self._me] = digests
        self._tell({"t": "report"}, digests)

    def start(self) -> None:
        """Open this member's own ballot; the caller knows when its turn has come."""
        if self.started or self.decided is not None:
            return
        self.started = True
        if self._me == 0:
            self._propose(self._best())
            return
        self._promised = max(self._promised, self._me)
        if self._promised > self._me:
            return  # a later owner is at work already
        self._promises[self._me] = self._accepted
        self._tell({"t": "prepare", "ballot": self._me})
        self._weigh_promises()

    def heard(self, sender: int, kind: str, header: Mapping[str, Any], payload: memoryview) -> None:
        """Take one of ``MESSAGES``; raises ``RemoteError`` where it makes no sense."""
        if kind == "report":
            self.reports.setdefault(sender, self._digests(payload))
        elif kind == "decided":
            self._decide(self._value(header, payload))
        elif kind == "prepare":
            self._prepare(sender, self._ballot(header, sender))
        elif kind == "accept":
            self._accept(sender, self._ballot(header, sender), self._value(header, payload))
        elif kind == "promise":
            self._ballot(header, self._me)
            before = fields.integer(header, "before", -1, self._n - 1)
            self._promises[sender] = (before, self._value(header, payload)) if before >= 0 else None
            self._weigh_promises()
        elif kind == "accepted":
            self._ballot(header, self._me)
            self._votes.add(sender)
            self._count_votes()
        else:
            raise RemoteError(f"no such message: {kind}")

    # -- acceptor

    def _prepare(self, sender: int, ballot: int) -> None:
        if ballot < self._promised:
            return
        self._promised = ballot
        header: dict[str, Any] = {"t": "promise", "ballot": ballot, "before": -1}
        if self._accepted is None:
            self.out.append(Note(sender, header))
        else:
            before, value = self._accepted
            header |= {"before": before, "mask": value.mask}
            self.out.append(Note(sender, header, value.digests))

    def _accept(self, sender: int, ballot: int, value: Value) -> None:
        if ballot < self._promised:
            return
        self._promised = ballot
        self._accepted = (ballot, value)
        self.out.append(Note(sender, {"t": "accepted", "ballot": ballot}))

    # -- owner

    def _weigh_promises(self) -> None:
        if self._proposal is not None or len(self._promises) < self.quorum or self._me not in self._promises:
            return
        # A value that may have been decided already must be proposed again: the one of the highest ballot.
        earlier = [one for one in self._promises.values() if one is not None]
        self._propose(max(earlier, key=lambda one: one[0])[1] if earlier else self._best())

    def _propose(self, value: Value) -> None:
        self._proposal = value
        self._tell({"t": "accept", "ballot": self._me, "mask": value.mask}, value.digests)
        if self._promised <= self._me:
            self._promised = self._me
            self._accepted = (self._me, value)
            self._votes.add(self._me)
        self._count_votes()

    def _count_votes(self) -> None:
        if self._proposal is not None and len(self._votes) >= self.quorum:
            self._decide(self._proposal)

    def _decide(self, value: Value) -> None:
        if self.decided is None:
            self.decided = value
            self._tell({"t": "decided", "mask": value.mask}, value.digests)

    def _best(self) -> Value:
        """The verdict by the reports at hand: parts that all reporters but the poor ones hold alike."""
        common: list[bytes] = []
        for part in range(self._parts):
            held = Counter(_digest(report, part) for report in self.reports.values())
            held.pop(NOTHING, None)
            common.append(held.most_common(1)[0][0] if held else NOTHING)
        holds = {
            member: [d != NOTHING and _digest(report, part) == d for part, d in enumerate(common)]
            for member, report in self.reports.items()
        }
        most = max((sum(held) for held in holds.values()), default=0)
        something = most > 0 or not self._parts  # of a vector without numbers, all hold all
        kept = {member: held for member, held in holds.items() if something and sum(held) >= ENOUGH * most}
        if len(kept) < 2:
            return Value(0, bytes(self._parts * DIGEST))
        digests = b"".join(
            d if all(held[part] for held in kept.values()) else NOTHING for part, d in enumerate(common)
        )
        return Value(sum(1 << member for member in kept), digests)

    # -- helpers

    def _tell(self, header: dict[str, Any], payload: bytes = b"") -> None:
        self.out += [Note(to, header, payload) for to in range(self._n) if to != self._me]

    def _digests(self, payload: memoryview) -> bytes:
        if len(payload) != self._parts * DIGEST:
            raise RemoteError("a digest for every part was expected")
        return bytes(payload)

    def _value(self, header: Mapping[str, Any], payload: memoryview) -> Value:
        return Value(fields.integer(header, "mask", 0, (1 << self._n) - 1), self._digests(payload))

    def _ballot(self, header: Mapping[str, Any], owner: int) -> int:
        ballot = fields.integer(header, "ballot", 0, self._n - 1)
        if ballot != owner:
            raise RemoteError("a ballot is spoken for by its owner")
        return ballot


def _digest(report: bytes, part: int) -> bytes:
    return report[part * DIGEST : (part + 1) * DIGEST]
