"""What a finished round brought: the value that leaves this package.

Everything in it but ``drops``, the payload counts and the numbers outside ``averaged`` is equal on all
members that finish, because all of them apply the same verdict to the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import attrs

from p2p.averaging.roster import Roster
from p2p.averaging.shares import FLOAT_BYTES
from p2p.errors import P2PError

if TYPE_CHECKING:
    from p2p.identity import PeerId


EVERYBODY_LOST: Final = "every other member was lost"
PARTS_MISSED: Final = "the round counts parts that did not reach this member"
"""Reasons of a failed round that say something about this member."""


class RoundFailed(P2PError):  # noqa: N818 - like its siblings in p2p.errors
    """This member averaged nothing in this round; its numbers are as they were. Says why in one sentence."""


class NobodyCame(RoundFailed):
    """No stage-mate had this round open: there was no round to fail."""


@attrs.frozen(kw_only=True)
class Outcome:
    """The end of one member's round."""

    number: int
    slice_index: int
    members: tuple[PeerId, ...]
    """Who finished, by the verdict."""
    fraction: float
    """Of the vector that was averaged, above 0 up to 1."""
    vector: memoryview = attrs.field(repr=False)
    """fp32: the mean where averaged, this member's own numbers elsewhere."""
    averaged: list[tuple[int, int]]
    """Ranges of floats [start, stop) that were averaged; neighbours are joined."""
    contributors: list[tuple[int, int, tuple[PeerId, ...]]]
    """The same ranges by whose numbers are in the mean; neighbours alike are joined."""
    checksum: str
    """Of the averaged bytes: sha256, hex, of the digests of the parts in order, each behind its range."""
    drops: tuple[tuple[PeerId, str], ...]
    """Who was dropped and why, as this member saw it."""
    payload_out: int
    payload_in: int
    weight_total: float
    """Accepted weights of all who contributed to an averaged part."""

    @classmethod
    def of(
        cls,
        roster: Roster,
        vector: memoryview,
        counted: Mapping[int, tuple[int, bytes]],
        finished: int,
        drops: Mapping[int, str],
    ) -> Outcome:
        """The outcome of ``roster`` by the parts that count, in order: who contributed and the mean's digest.

        Members are given as bit masks and indices.
        """
        ranges: list[tuple[int, int]] = []
        sources: list[tuple[int, int, int]] = []
        checksum = hashlib.sha256()
        for part, (mask, digest) in counted.items():
            begin, end = (position // FLOAT_BYTES for position in roster.spans[part])
            checksum.update(b"%d-%d:%b" % (begin, end, digest))
            joined = bool(sources) and sources[-1][1:] == (begin, mask)
            sources.append((sources.pop()[0] if joined else begin, end, mask))
            ranges.append((ranges.pop()[0] if ranges and ranges[-1][1] == begin else begin, end))

        def named(mask: int) -> tuple[PeerId, ...]:
            return tuple(peer for i, peer in enumerate(roster.peers) if mask >> i & 1)

        everybody = 0
        for mask, _ in counted.values():
            everybody |= mask
        return cls(
            number=roster.key.number,
            slice_index=roster.slice_index,
            members=named(finished),
            fraction=sum(stop - start for start, stop in ranges) / roster.floats if roster.floats else 1.0,
            vector=vector,
            averaged=ranges,
            contributors=[(start, stop, named(mask)) for start, stop, mask in sources],
            checksum=checksum.hexdigest(),
            drops=tuple((roster.peers[i], why) for i, why in sorted(drops.items())),
            payload_out=0,
            payload_in=0,
            weight_total=sum(m.weight for i, m in enumerate(roster.members) if everybody >> i & 1),
        )
