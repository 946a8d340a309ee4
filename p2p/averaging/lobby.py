"""What matchmaking speaks of, and the lobby where announcements wait for a round that has not begun here.

Replicas reach a round seconds apart. A follower that announces to a leader still busy with the last round
is kept in the ``Lobby`` and handed over when the leader begins. One that loses patience leaves a note there,
so that the leader, when it begins at last, knows whom to follow instead.

Limits: 256 announcements and as many notes in all; they go when a later round begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import attrs

from p2p.averaging import fields, shares
from p2p.averaging.roster import MAX_FLOATS, MAX_SECONDS, NAME_LIMIT, Candidate, RoundKey
from p2p.errors import RemoteError

if TYPE_CHECKING:
    from p2p.identity import PeerId

MAX_CANDIDATES: Final = 256


@attrs.frozen(kw_only=True)
class RoundConfig:
    """Settings of rounds; times in seconds."""

    gather_s: float = 1.5
    """How long a leader with followers waits for the ones still expected."""
    accept_s: float = 1.0
    """How long it waits for a proposal's answers."""
    patience_s: float = 3.0
    """How long a follower waits for a leader that does not answer or has not begun."""
    group_size: int = attrs.field(default=32, validator=[attrs.validators.ge(3), attrs.validators.le(64)])
    part_bytes: int = attrs.field(
        default=shares.PART_BYTES,
        validator=[attrs.validators.ge(shares.ALIGNMENT), attrs.validators.le(shares.MAX_PART_BYTES)],
    )


@attrs.frozen(kw_only=True)
class Announcement:
    """What a follower opens with."""

    key: RoundKey
    slice_index: int
    floats: int
    seconds: float
    """That the follower has left for this round, from when it sent this."""
    candidate: Candidate

    def header(self) -> dict[str, Any]:
        return {
            "t": "announce",
            "run": self.key.run,
            "stage": self.key.stage,
            "number": self.key.number,
            "slice": self.slice_index,
            "floats": self.floats,
            "seconds": self.seconds,
            "me": self.candidate.encode(),
        }

    @classmethod
    def read(cls, header: Mapping[str, Any], peer: PeerId) -> Announcement:
        """``peer`` is who is at the other end: nobody announces another."""
        candidate = Candidate.decode(header.get("me"))
        if candidate.peer != peer:
            raise RemoteError("a candidate that is another peer")
        return cls(
            key=RoundKey(
                run=fields.text(header, "run", NAME_LIMIT),
                stage=fields.integer(header, "stage", 0, 1 << 16),
                number=fields.integer(header, "number", 0, 1 << 53),
            ),
            slice_index=fields.integer(header, "slice", 0, 1 << 31),
            floats=fields.integer(header, "floats", 0, MAX_FLOATS),
            seconds=fields.number(header, "seconds", 0.0, MAX_SECONDS),
            candidate=candidate,
        )


@attrs.frozen
class Announce:
    """Open a stream to ``peer`` and announce; ``addrs`` may be empty where the host knows better."""

    peer: PeerId
    addrs: tuple[str, ...]


@attrs.frozen
class Leave:
    """Say so to ``peer``, whom we had announced to, and end the stream."""

    peer: PeerId
    gave_up: bool


@attrs.frozen
class Answer:
    """To the leader, on our stream to it."""

    peer: PeerId
    header: dict[str, Any]


@attrs.frozen
class Tell:
    """To a follower, on its stream to us."""

    peer: PeerId
    header: dict[str, Any]


@attrs.frozen
class Probe:
    """Ask ``peer`` whether this round is still open to it; unreachable counts as no."""

    peer: PeerId


Action = Announce | Leave | Answer | Tell | Probe


class Lobby:
    """Announcements and notes by round, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[RoundKey, PeerId], tuple[Announcement, float]] = {}
        self._notes: dict[tuple[RoundKey, PeerId], Candidate] = {}

    def add(self, theirs: Announcement, now: float) -> bool:
        """Keep an announcement; False where the lobby is full."""
        if len(self._waiting) >= MAX_CANDIDATES:
            return False
        self._waiting[theirs.key, theirs.candidate.peer] = (theirs, now)
        return True

    def left(self, key: RoundKey, peer: PeerId, gave_up: bool) -> None:
        """A waiting follower went away, for another leader if ``gave_up``."""
        waiting = self._waiting.pop((key, peer), None)
        if waiting is not None and gave_up and len(self._notes) < MAX_CANDIDATES:
            self._notes[key, peer] = waiting[0].candidate

    def take(self, key: RoundKey) -> tuple[list[tuple[Announcement, float]], list[Candidate]]:
        """What came for the round that begins now: who waits, and who gave this member up."""
        waiting = [(theirs, at) for (k, _), (theirs, at) in self._waiting.items() if k == key]
        notes = [candidate for (k, _), candidate in self._notes.items() if k == key]
        for theirs, _ in waiting:
            del self._waiting[key, theirs.candidate.peer]
        return waiting, notes

    def past(self, number: int) -> list[Announcement]:
        """Rounds up to ``number`` will not begin here any more: whom to tell."""
        gone = [theirs for (key, _), (theirs, _) in self._waiting.items() if key.number <= number]
        for theirs in gone:
            del self._waiting[theirs.key, theirs.candidate.peer]
        self._notes = {at: note for at, note in self._notes.items() if at[0].number > number}
        return gone
