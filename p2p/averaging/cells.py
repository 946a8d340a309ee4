"""Large stages gather in cells, so that no leader has to hear of everybody.

A round's hashes (``RoundKey.rank``) spread its candidates over a line; the line is halved until a cell has
``GATHER`` of them at most, on average. Everybody expects, and looks for a leader among, the mates of its own
cell; the lowest hash of the cell leads it, and splits who came into groups of ``group_size``. A new round has
new hashes, so that cells and groups are mixed anew every time, whoever computes them: nothing is kept, and
nothing but the round's number and the members goes in.

Members that know of different numbers of mates may halve once more or once less than their neighbours. Then
one's cell lies inside the other's: a leader whose own cell is larger may know a lower hash and send its
followers there (``elsewhere``), one whose cell is smaller takes whoever comes. Nobody is refused for a cell.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

from p2p.averaging.roster import RoundKey

if TYPE_CHECKING:
    from p2p.identity import PeerId

GATHER: Final = 64
"""Candidates a cell, on average, at most: a quarter of what a leader can take."""


def halvings(candidates: int) -> int:
    """How often the line is halved for so many candidates."""
    return max(0, candidates - 1).bit_length() - (GATHER - 1).bit_length() if candidates > GATHER else 0


def cell(key: RoundKey, peer: PeerId, halved: int) -> int:
    """The cell of ``peer`` in a line that was halved so often, from 0."""
    return int.from_bytes(key.rank(peer)[:8]) >> (64 - halved)


def mates(key: RoundKey, me: PeerId, halved: int, peers: Collection[PeerId]) -> frozenset[PeerId]:
    """Who of ``peers`` is in the cell of ``me``, itself left out."""
    mine = cell(key, me, halved)
    return frozenset(peer for peer in peers if peer != me and cell(key, peer, halved) == mine)
