"""What turns the members' copies of one part into their weighted mean, and how p2p sees it.

``p2p`` moves parts as bytes; the arithmetic belongs to the stage, which injects a ``Reducer`` backed by
a kernel. ``PlainReducer`` is the same contract in the standard library, for tests and as reference: sums
in double precision, rounds once at the end. Only the part's one reducer computes, so members cannot
disagree by rounding or order.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Callable
from typing import Protocol

from p2p.errors import RemoteError

Buffer = bytes | bytearray | memoryview


class Reducer(Protocol):
    """Accumulates one part. ``add`` either takes the whole part or raises and leaves the sum untouched."""

    def add(self, part: Buffer, weight: float) -> None:
        """Add little-endian fp32 ``part`` times ``weight`` (> 0); ``RemoteError`` where one is not finite."""

    def finish(self) -> Buffer:
        """The mean of what was added, little-endian fp32, as long as every part; the last call of all."""


MakeReducer = Callable[[int], Reducer]
"""Builds the reducer of a part from its length in bytes."""


class Codec(Protocol):
    """How parts travel, the same for all members of a round; ``n`` counts bytes of fp32."""

    error: float
    """By how much a number may change on the way, at most, as a fraction of the part's largest."""

    def size(self, n: int) -> int:
        """Bytes on the wire of a part of ``n``; no more for a shorter part."""

    def encode(self, part: Buffer) -> Buffer:
        """The wire form of fp32; what is not finite must not look finite in it."""

    def decode(self, coded: Buffer) -> Buffer:
        """fp32 of a wire form whose length is right; equal to the bit on every machine."""

    def decode_into(self, coded: Buffer, part: memoryview) -> None:
        """The same, into ``part``."""


class PlainCodec:
    """fp32 as it is."""

    error = 0.0

    def size(self, n: int) -> int:
        return n

    def encode(self, part: Buffer) -> Buffer:
        return part

    def decode(self, coded: Buffer) -> Buffer:
        return coded

    def decode_into(self, coded: Buffer, part: memoryview) -> None:
        part[:] = coded


class PlainReducer:
    """The reference: slow, exact to one rounding."""

    def __init__(self, nbytes: int) -> None:
        if nbytes % 4:
            raise ValueError("a part is a whole number of fp32 values")
        self._sum = [0.0] * (nbytes // 4)
        self._weight = 0.0

    def add(self, part: Buffer, weight: float) -> None:
        values = array("f")
        values.frombytes(part)
        if sys.byteorder == "big":
            values.byteswap()
        if len(values) != len(self._sum):
            raise RemoteError("a part of the wrong length")
        # Finite floats cannot overflow a double sum, and one NaN or infinity shows in it.
        if not math.isfinite(sum(values)):
            raise RemoteError("a part with a number that is not finite")
        self._sum = [total + weight * value for total, value in zip(self._sum, values, strict=True)]
        self._weight += weight

    def finish(self) -> bytes:
        mean = array("f", [total / self._weight for total in self._sum])
        if sys.byteorder == "big":
            mean.byteswap()
        return mean.tobytes()
