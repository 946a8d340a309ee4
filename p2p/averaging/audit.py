"""The audit of a reducer: its deputy asks for the numbers behind one part again and reduces them itself.

Reducers sign their means, but a signature says who reduced, not that it is the mean. In one round of as many
as it has members, on average, a deputy draws one part of its principal: a secret until the signed mean is in
its hands, so that there is no behaving well for the occasion. Whoever contributed, by the mean's own mask,
sends its numbers once more, to the deputy. If their mean is another, the part does not count for anybody
(the deputy reports not to hold it), the outcome names the reducer, and it reduces nothing in rounds that this
member leads for a while.

What it costs: one part from each contributor, once in a round on average; with n members of k parts each,
1 / (2 n k) of what a round moves. What it cannot tell: a reducer that lies from a contributor that sends the
deputy other numbers than it sent the reducer; so an accusation is this member's own knowledge, is told to
nobody, and expires.

Limits: ``SAMPLE`` numbers of the part are compared; who does not answer, or is lost, ends the audit without a
finding. Sums may differ by rounding: of fp32, and of the form in which numbers travel.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import TYPE_CHECKING, Final, final

from p2p.averaging.reducer import Buffer, Codec, MakeReducer, Reducer
from p2p.averaging.roster import Roster
from p2p.errors import RemoteError

if TYPE_CHECKING:
    from p2p.identity import PeerId

SAMPLE: Final = 2048
ROUNDING: Final = 1e-5
"""Of the largest contribution: what adding up in another order may change."""
REMEMBERED_ROUNDS: Final = 40
"""An accused reducer is given nothing to reduce for so long: two cycles of twenty slices."""
REMEMBERED_PEERS: Final = 256


class Audit:
    """One part: what its reducer signed, and what the contributors say that they sent."""

    def __init__(
        self, part: int, mean: Buffer, awaited: int, reducer: Reducer, error: float, rng: random.Random
    ) -> None:
        """``mean``: fp32; ``awaited``: members still to be heard, a bit mask; ``error``: the codec's."""
        self.part = part
        self.awaited = awaited
        self._reducer = reducer
        self._tolerance = 2 * error + ROUNDING
        count = len(mean) // 4
        self._places = rng.sample(range(count), min(SAMPLE, count))
        self._mean = self._look(mean)
        self._largest = 0.0

    def add(self, part: Buffer, weight: float) -> None:
        """The fp32 numbers of one contributor; ``RemoteError`` where they cannot be what was reduced."""
        self._reducer.add(part, weight)
        self._largest = max(self._largest, *(abs(value) for value in self._look(part)))

    def passed(self) -> bool:
        """Whether the signed mean is that of what was added, once nobody is awaited any more."""
        limit = self._tolerance * self._largest
        mine = self._look(self._reducer.finish())
        return all(abs(a - b) <= limit for a, b in zip(mine, self._mean, strict=True))

    def _look(self, values: Buffer) -> list[float]:
        floats = memoryview(values).cast("B").cast("f")
        return [floats[place] for place in self._places]


@final
class Auditor:
    """One member's audits in a round: its own, as a deputy, and its answers to others'.

    Members are indices into the roster, sets of them bit masks.
    """

    def __init__(
        self, roster: Roster, me: int, make_reducer: MakeReducer, codec: Codec, rng: random.Random | None
    ) -> None:
        """``rng`` draws what is audited; None: nothing."""
        self.accused: PeerId | None = None
        """A reducer whose mean was not that of what its contributors sent."""
        self._roster = roster
        self._me = me
        self._make_reducer = make_reducer
        self._codec = codec
        self._rng = rng
        self.part = self._draw(rng) if rng is not None else -1
        """To audit once its reducer has signed it; -1: none."""
        self.running: Audit | None = None
        """While somebody is still to be heard."""
        self._showed: set[int] = set()
        """Deputies that have audited with this member's help: one part each."""

    def _draw(self, rng: random.Random) -> int:
        """A part of this deputy's principal, in one round of as many as there are members."""
        roster, n = self._roster, len(self._roster.members)
        parts = [p for p, owner in enumerate(roster.owners) if roster.deputy(owner) == self._me]
        return rng.choice(parts) if parts and n > 2 and rng.random() < 1 / n else -1

    def begin(self, mean: Buffer, contributors: int, own: Buffer, lost: Collection[int]) -> list[int]:
        """The mean of ``part`` is signed: whom to ask for what is behind it. ``own``: this member's part."""
        assert self._rng is not None
        part, self.part = self.part, -1
        members = self._roster.members
        others = [i for i in range(len(members)) if contributors >> i & 1 and i != self._me]
        if not others or any(other in lost for other in others):
            return []
        awaited = sum(1 << i for i in others)
        reducer = self._make_reducer(len(mean))
        self.running = Audit(part, bytes(mean), awaited, reducer, self._codec.error, self._rng)
        if contributors >> self._me & 1:
            self.running.add(own, members[self._me].weight)
        return others

    def lost(self, member: int) -> None:
        """It answers nothing any more."""
        if self.running is not None and self.running.awaited >> member & 1:
            self.running = None

    def show(self, deputy: int, part: int) -> None:
        """``deputy`` asks for this member's numbers. RemoteError where it may not."""
        if self._roster.deputy(self._roster.owners[part]) != deputy or deputy in self._showed:
            raise RemoteError("an audit by one who is not the deputy, or a second one")
        self._showed.add(deputy)

    def answered(self, sender: int, part: int, payload: Buffer) -> bool:
        """A contributor's numbers as they travel; True: with them the mean is found to be another."""
        audit = self.running
        if audit is None:
            return False  # given up
        begin, end = self._roster.spans[part]
        fits = len(payload) == self._codec.size(end - begin)
        if audit.part != part or not audit.awaited >> sender & 1 or not fits:
            raise RemoteError("an answer to another audit")
        audit.awaited &= ~(1 << sender)
        try:
            audit.add(self._codec.decode(payload), self._roster.members[sender].weight)
        except RemoteError:
            self.running = None  # these numbers were never in a mean
            raise
        if audit.awaited:
            return False
        self.running = None
        if audit.passed():
            return False
        self.accused = self._roster.peers[self._roster.owners[part]]
        return True
