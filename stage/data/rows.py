"""Rows and blocks: ids of some documents, cut in rows of T+1, some of them held out for evaluation.

A *block* is the unit in which data are read: about a MiB of text. Its documents are joined to one run of
ids and cut in rows; the last id of a row is the first of the next, so that every id is a target once. What
is left at the end of a block, less than a row, is trained on by nobody. Blocks know nothing of each other,
so a row has the same content whoever reads it and in whatever order, and whether it is held out is decided
by a hash of its place. Held out is one row in ``HELD_OUT``, more of a corpus that has few rows.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from bisect import bisect_left, bisect_right

import attrs

HELD_OUT = 64
"""One row in so many is for evaluation, and never trained on."""
FEW = 8
"""Rows for evaluation that a small corpus should have; it gives up to half of its rows for that."""


@attrs.frozen
class Row:
    """One training sequence."""

    shard: int
    position: int
    ids: bytes
    """T+1 token ids as little-endian uint32: what travels and what the ticket hashes."""
    starts: tuple[int, ...]
    """Places in the row, other than 0, where a new document begins."""


class Permutation:
    """A keyed bijection of range(n): four Feistel rounds on the next even power of two, walked into range."""

    def __init__(self, n: int, *key: object) -> None:
        self._n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._keys = [_digest(*key, i, size=16) for i in range(4)]

    def __call__(self, index: int) -> int:
        mask = (1 << self._half) - 1
        while True:
            left, right = index >> self._half, index & mask
            for key in self._keys:
                mixed = hashlib.blake2b(right.to_bytes(8, "little"), digest_size=8, key=key).digest()
                left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
            index = left << self._half | right
            if index < self._n:
                return index


@attrs.frozen
class Packed:
    """Ids of consecutive documents: as a bytearray where each fits a byte, else as uint32."""

    ids: bytearray | array[int]
    begins: array[int]
    """Where documents begin, ascending."""


class Block:
    """The rows of one block, in an order of their own: held-out ones first, the rest behind them."""

    def __init__(self, packed: Packed, seq: int, *, blocks: int, key: tuple[object, ...]) -> None:
        """``blocks``: how many there are; ``key``: says which this is, and the run's seed."""
        self._packed = packed
        self._seq = seq
        self.rows = max(0, (len(packed.ids) - 1) // seq)
        one_in = min(HELD_OUT, max(2, self.rows * blocks // FEW))
        chance = int.from_bytes(_digest(*key, "held out", size=8), "little") % one_in
        self.held_out = self.rows // one_in + (blocks > 1 and chance < self.rows % one_in)
        self._order = Permutation(self.rows, *key, "rows")

    @property
    def trained(self) -> int:
        """Rows that are trained on."""
        return self.rows - self.held_out

    def row(self, place: int, shard: int, position: int) -> Row:
        """The row at a place of this block's order, by the name that the run has for it."""
        offset = self._order(place) * self._seq
        ids, begins = self._packed.ids[offset : offset + self._seq + 1], self._packed.begins
        first = bisect_right(begins, offset)
        last = bisect_left(begins, offset + self._seq, lo=first)
        starts = tuple(at - offset for at in begins[first:last])
        return Row(shard, position, struct.pack(f"<{len(ids)}I", *ids), starts)


def _digest(*parts: object, size: int) -> bytes:
    return hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=size).digest()
