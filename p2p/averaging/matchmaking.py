"""Matchmaking: from "I want to average round n" to one signed roster.

Theory of operation (sans-IO: events and time in, actions out). Every candidate ranks all candidates it has
heard of (stage-mates it expects, records in the hash table, who announced to it) by a hash of peer id and
round; the lowest leads. A follower opens one stream to its leader, and the whole conversation runs on it:

    announce ->            who I am, what I average, how long I have
             <- hold       heard; ``started`` tells whether the leader has begun this round itself
             <- elsewhere  I follow another one: ask there
             <- propose    a draft that names you
    accept ->              (or the stream ends)
             <- commit     the final roster, only those who accepted, signed
             <- past       not this round; final
    leave ->               I turn to another leader; ``gave_up`` if because of you

A leader proposes when all whom it expects have announced, or ``gather_s`` after it began to lead with at
least one follower; a round of one is not a round, so alone it waits. At once, and then every ``gather_s``, it
asks those it still expects whether the round is open to them: that tells them that it is open here; who says
no or cannot be reached is waited for no longer, and if that is everybody, it fails at once (they went on to a
later round, and so shall it, instead of everybody waiting alone in a round of its own). Replicas start a
round seconds apart, hence: announcements to a leader that has not begun are kept by it and answered
``hold``; a follower waits ``patience_s`` for it, then gives it up, tells it so, and the next hash leads. A
leader that learns at its start that it was given up follows its successor instead of splitting the round.

In a stage of more than ``cells.GATHER`` all this happens a cell at a time (``cells``).

A member has one leader at a time and takes a commit only from it and only for the draft it accepted, so it
is in one group a round. If the leader dies before the commit, the member seeks on among the others. Members
that got the commit before the leader died run the round and drop those who did not.

Limits: 256 candidates and followers a leader, groups of at most ``group_size``; waits end at ``deadline``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from p2p.averaging import cells, fields, shares
from p2p.averaging.deadline import exchange_seconds
from p2p.averaging.lobby import (
    MAX_CANDIDATES,
    Action,
    Announce,
    Announcement,
    Answer,
    Leave,
    Probe,
    RoundConfig,
    Tell,
)
from p2p.averaging.roster import MAX_ADDRS, NAME_LIMIT, ROSTER_LIMIT, Candidate, Roster, Sign, Verify, draft
from p2p.averaging.shares import FLOAT_BYTES
from p2p.errors import RemoteError

if TYPE_CHECKING:
    from p2p.identity import PeerId

MIN_ROUND_S: Final = 0.5
"""A follower with less time left than this is not worth starting a round with."""


class Matchmaker:
    """One candidate's search. Feed it; after each input drain ``out``, look at ``roster`` and ``failed``."""

    def __init__(
        self,
        mine: Announcement,
        expected: Collection[PeerId],
        *,
        given_up_by: Iterable[Candidate],
        config: RoundConfig,
        sign: Sign,
        verify: Verify,
        now: float,
        recent: Sequence[float] = (),
        distrusted: Collection[PeerId] = (),
    ) -> None:
        self.out: list[Action] = []
        self.roster: Roster | None = None
        self.signature = b""
        self.failed: str | None = None
        self._mine = mine
        self._key = mine.key
        self._me = mine.candidate.peer
        self._halved = cells.halvings(len(expected))
        self._expected = cells.mates(self._key, self._me, self._halved, expected)
        self._config = config
        self._sign = sign
        self._verify = verify
        self._recent = recent
        self._distrusted = distrusted
        self._deadline = now + mine.seconds
        self._known: dict[PeerId, tuple[str, ...]] = {self._me: ()}
        self.alone = False
        """Failed because no mate came or will come."""
        self._given_up: set[PeerId] = set()
        self._successors = {one.peer for one in given_up_by}
        self._target: PeerId | None = None
        self._since = now
        self._started_by_leader = False
        self._draft: Roster | None = None
        """As follower: the draft that we accepted."""
        self._followers: dict[PeerId, tuple[Announcement, float]] = {}
        self._proposed: list[Roster] = []
        self._accepted: set[PeerId] = set()
        self._passed: set[PeerId] = set()
        self._probe_at = now
        """At once: asking also tells mates that the round is open here."""
        for peer in self._expected:
            self._learn(peer, ())
        for one in given_up_by:
            self._learn(one.peer, one.addrs)
        self._seek(now)

    @property
    def done(self) -> bool:
        return self.roster is not None or self.failed is not None

    @property
    def leading(self) -> bool:
        return self._target == self._me

    # -- inputs

    def found(self, peer: PeerId, addrs: tuple[str, ...], now: float) -> None:
        """Somebody is a candidate according to the hash table."""
        if not self.done and cells.mates(self._key, self._me, self._halved, [peer]):
            self._learn(peer, addrs)
            self._seek(now)

    def announced(self, theirs: Announcement, at: float, now: float) -> None:
        """A follower opened a stream to us, at ``at`` (earlier than ``now`` where it waited in the lobby)."""
        peer = theirs.candidate.peer
        if self.done or theirs.key != self._key or len(self._followers) >= MAX_CANDIDATES:
            self.out.append(Tell(peer, {"t": "past", "why": "the round is closed"}))
            return
        if (theirs.slice_index, theirs.floats) != (self._mine.slice_index, self._mine.floats):
            self.out.append(Tell(peer, {"t": "past", "why": "another slice is averaged in this round"}))
            return
        self._learn(peer, theirs.candidate.addrs)
        self._followers[peer] = (theirs, at)
        if peer == self._target and self._draft is None and self._rank(self._me) < self._rank(peer):
            self._given_up.add(peer)  # we follow each other: the lower rank leads
        self._seek(now)
        if self._target is not None and self._target not in (self._me, peer):
            addrs = list(self._known.get(self._target, ()))
            self.out.append(Tell(peer, {"t": "elsewhere", "leader": self._target, "addrs": addrs}))
        else:
            self.out.append(Tell(peer, {"t": "hold", "started": True}))
        self._maybe_propose(now)

    def follower_left(self, peer: PeerId, gave_up: bool, now: float) -> None:
        """A follower said ``leave`` or its stream ended."""
        if self.done or self._followers.pop(peer, None) is None:
            return
        if gave_up and not self._followers and not self._proposed:
            self._successors.add(peer)
            self._seek(now)
        self._maybe_commit(now)

    def follower_said(self, peer: PeerId, header: Mapping[str, Any], now: float) -> None:
        """``accept``; anything else but ``leave`` (see ``follower_left``) is nonsense."""
        if fields.text(header, "t", 16) != "accept":
            raise RemoteError("a follower accepts or leaves")
        group = fields.blob(header, "group", 32, 32)
        if self.done:
            return
        if any(roster.group == group and peer in roster.peers for roster in self._proposed):
            self._accepted.add(peer)
            self._maybe_commit(now)

    def leader_said(self, peer: PeerId, header: Mapping[str, Any], now: float) -> None:
        """The leader spoke; ``RemoteError`` means: end the stream and call ``leader_lost``."""
        if self.done or peer != self._target:
            return
        kind = fields.text(header, "t", 16)
        if kind == "hold":
            if not self._started_by_leader and header.get("started") is True:
                self._started_by_leader = True
                self._since = now
        elif kind == "elsewhere":
            self._sent_elsewhere(peer, header, now)
        elif kind == "propose":
            self._draft = self._read_roster(peer, header)
            self._since = now
            self.out.append(Answer(peer, {"t": "accept", "group": self._draft.group}))
        elif kind == "commit":
            roster = self._read_roster(peer, header)
            signature = fields.blob(header, "sig", 64, 64)
            roster.check(signature, self._verify)
            if self._draft is None or not set(roster.peers) <= set(self._draft.peers):
                raise RemoteError("a commit to something else than was proposed")
            self.roster, self.signature = roster, signature
            self._dismiss("the round is closed")
        elif kind == "past":
            self._fail(f"the leader said: {fields.text(header, 'why', 200)}")
        else:
            raise RemoteError(f"no such message: {kind}")

    def passed(self, peer: PeerId, now: float) -> None:
        """The round is over for this mate, or it cannot be reached: it will not come."""
        self._passed.add(peer)
        if self.done or not self.leading:
            return
        if not self._followers and self._expected and self._expected <= self._passed:
            self.alone = True
            self._fail("no mate has this round open")
        else:
            self._maybe_propose(now)

    def abandon(self, why: str) -> None:
        """Leave the search: a mate is at a later round, where this member is going as well."""
        if not self.done:
            self._fail(why)

    def leader_lost(self, peer: PeerId, now: float) -> None:
        """The leader could not be reached, or our stream to it ended."""
        if not self.done and peer == self._target:
            self._give_up(peer, now)

    def tick(self, now: float) -> None:
        """Time has come to ``now``."""
        if self.done:
            return
        if now >= self._deadline:
            self._fail("nobody to average with before the deadline")
        elif self.leading:
            self._maybe_propose(now)
            self._maybe_commit(now)
            if now >= self._probe_at and not self.done and not self._proposed:
                self._probe_at = now + self._config.gather_s
                self._passed.clear()
                self.out += [Probe(peer) for peer in sorted(self._expected - set(self._followers))]
        elif self._target is not None and now >= self._patience_ends():
            self._give_up(self._target, now)

    def wake_at(self) -> float:
        """When ``tick`` is due next."""
        if not self.leading:
            return min(self._deadline, self._patience_ends())
        if self._proposed:
            return min(self._deadline, self._since + self._config.accept_s)
        if self._followers:
            return min(self._deadline, self._since + self._config.gather_s, self._probe_at)
        return min(self._deadline, self._probe_at)

    # -- choice of the leader

    def _rank(self, peer: PeerId) -> bytes:
        return self._key.rank(peer)

    def _learn(self, peer: PeerId, addrs: tuple[str, ...]) -> None:
        if peer in self._known or len(self._known) < MAX_CANDIDATES:
            self._known[peer] = addrs or self._known.get(peer, ())

    def _seek(self, now: float) -> None:
        """Turn to the lowest hash that was not given up, unless a proposal is under way."""
        if self._proposed or self._draft is not None:
            return
        open_ = set(self._known) - self._given_up
        if self._successors & open_:
            open_.discard(self._me)
        best = min(open_ or {self._me}, key=self._rank)
        if best == self._target:
            return
        old, self._target = self._target, best
        self._since = now
        self._started_by_leader = False
        if old is not None and old != self._me:
            self.out.append(Leave(old, old in self._given_up))
        if best != self._me:
            self.out.append(Announce(best, self._known[best]))
            told: dict[str, Any] = {"t": "elsewhere", "leader": best, "addrs": list(self._known[best])}
            self.out += [Tell(peer, told) for peer in self._followers if peer != best]
        else:
            self.out += [Tell(peer, {"t": "hold", "started": True}) for peer in self._followers]
            self._maybe_propose(now)

    def _give_up(self, peer: PeerId, now: float) -> None:
        self._given_up.add(peer)
        self._draft = None
        self._seek(now)

    def _sent_elsewhere(self, peer: PeerId, header: Mapping[str, Any], now: float) -> None:
        leader = cast("PeerId", fields.text(header, "leader", NAME_LIMIT))
        addrs = fields.array(header, "addrs", MAX_ADDRS)
        if leader in self._given_up or leader == peer:
            return  # we know better; it will find out and hold us meanwhile
        self._learn(leader, tuple(addr for addr in addrs if isinstance(addr, str)))
        if self._rank(leader) > self._rank(peer):
            self._given_up.add(peer)
        self._seek(now)

    def _patience_ends(self) -> float:
        config = self._config
        if self._draft is not None:
            return self._since + config.accept_s + config.patience_s
        if self._started_by_leader:
            return self._since + config.gather_s + config.accept_s + config.patience_s
        return self._since + config.patience_s

    # -- as leader

    def _maybe_propose(self, now: float) -> None:
        if not self.leading or self._proposed or self.done or not self._followers:
            return
        complete = self._expected and self._expected <= set(self._followers) | self._passed
        if not complete and now < self._since + self._config.gather_s:
            return
        for peer, (theirs, at) in list(self._followers.items()):
            if theirs.seconds - (now - at) < MIN_ROUND_S:
                self._dismiss("too little time left", [peer])
        if not self._followers:
            return
        ordered = sorted([self._me, *self._followers], key=self._rank)
        start = 0
        for size in shares.groups(len(ordered), self._config.group_size):
            self._proposed.append(self._draft_of(ordered[start : start + size], now))
            start += size
        if not any(self._weight(peer) > 0 for peer in ordered):
            self._fail("no weight: nobody has samples to average")
            return
        self._accepted = {self._me}
        self._since = now
        for roster in self._proposed:
            told = {"t": "propose", "roster": roster.encoded}
            self.out += [Tell(peer, told) for peer in roster.peers if peer != self._me]

    def _maybe_commit(self, now: float) -> None:
        if not self._proposed or self.done:
            return
        waiting = {peer for roster in self._proposed for peer in roster.peers if peer in self._followers}
        if waiting - self._accepted and now < self._since + self._config.accept_s:
            return
        drafts, self._proposed = self._proposed, []
        agreed = self._accepted & {self._me, *self._followers}
        self._dismiss("it did not accept in time", [peer for peer in self._followers if peer not in agreed])
        for before in drafts:
            peers = [peer for peer in before.peers if peer in agreed]
            mine = self._me in peers
            if len(peers) < 2 or not any(self._weight(peer) > 0 for peer in peers):
                if not mine:
                    self._dismiss("the others did not accept", peers)
                continue
            roster = before if len(peers) == len(before.peers) else self._draft_of(peers, now)
            signature = roster.sign(self._sign)
            for peer in peers:
                if peer != self._me:
                    self.out.append(Tell(peer, {"t": "commit", "roster": roster.encoded, "sig": signature}))
                    del self._followers[peer]
            if mine:
                self.roster, self.signature = roster, signature
        if self.roster is not None:
            self._dismiss("the round is closed")
        else:
            self._since = now  # nobody accepted: gather again

    def _weight(self, peer: PeerId) -> float:
        return (self._mine if peer == self._me else self._followers[peer][0]).candidate.weight

    def _draft_of(self, peers: list[PeerId], now: float) -> Roster:
        candidates = [self._mine.candidate] if self._me in peers else []
        candidates += [self._followers[peer][0].candidate for peer in peers if peer != self._me]
        left = [
            theirs.seconds - (now - at) for theirs, at in (self._followers[p] for p in peers if p != self._me)
        ]
        mbps = [candidate.bandwidth for candidate in candidates]
        usual = exchange_seconds(self._recent, self._mine.floats * FLOAT_BYTES, len(candidates), mbps)
        return draft(
            self._key,
            self._me,
            candidates,
            slice_index=self._mine.slice_index,
            floats=self._mine.floats,
            part_bytes=self._config.part_bytes,
            seconds=max(0.0, min([self._deadline - now, *left, usual])),
            distrusted=self._distrusted,
        )

    def _read_roster(self, peer: PeerId, header: Mapping[str, Any]) -> Roster:
        roster = Roster.decode(fields.blob(header, "roster", 1, ROSTER_LIMIT))
        expected = (self._key, self._mine.slice_index, self._mine.floats, peer)
        if (roster.key, roster.slice_index, roster.floats, roster.leader) != expected:
            raise RemoteError("a roster of another round")
        if self._me not in roster.peers:
            raise RemoteError("a roster that does not name this member")
        return roster

    # -- ends

    def _dismiss(self, why: str, peers: Iterable[PeerId] | None = None) -> None:
        for peer in list(self._followers) if peers is None else list(peers):
            if self._followers.pop(peer, None) is not None:
                self.out.append(Tell(peer, {"t": "past", "why": why}))

    def _fail(self, why: str) -> None:
        self.failed = why
        self._dismiss(why if why.startswith("no weight") else "the round is closed")
        if self._target is not None and not self.leading:
            self.out.append(Leave(self._target, False))
