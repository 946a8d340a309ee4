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
from typing import Final

from p2p.averaging.reducer import Buffer, Reducer

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
