"""The reducer that a stage hands to averaging rounds: parts as bytes, the arithmetic in a kernel.

Implements ``p2p.averaging.reducer.Reducer``. A part is inspected as a whole before any of it is added, so
a part that is refused leaves the sum as it was: a new sum is made beside the last one, in the same pass as
the look at the part. Limits: fp32 little endian on a little-endian machine; memory is two parts. The mean is
equal to the bit for the same parts in the same order.
"""

from __future__ import annotations

import math

import agora_kernels

from p2p.errors import LocalError, RemoteError

Buffer = bytes | bytearray | memoryview


class KernelReducer:
    """Accumulates one part of ``nbytes`` bytes, on the calling thread."""

    def __init__(self, nbytes: int) -> None:
        if nbytes <= 0 or nbytes % 4:
            raise LocalError(f"a part is a positive number of fp32 values, not {nbytes} bytes")
        self._sum = bytearray(nbytes)
        self._next = bytearray(nbytes)
        self._weight = 0.0

    def add(self, part: Buffer, weight: float) -> None:
        """Add ``weight * part``; ``RemoteError`` for a wrong length or a value that is not usable."""
        if not math.isfinite(weight) or weight < 0:
            raise LocalError(f"a weight must be finite and not negative, not {weight}")
        view = memoryview(part)
        if view.nbytes != len(self._sum):
            raise RemoteError(f"a part of {view.nbytes} bytes where {len(self._sum)} were agreed")
        n = len(self._sum) // 4
        usable, _ = agora_kernels.reduce_add(self._sum, view, self._next, n, 0, weight, 1)
        if not usable:
            raise RemoteError("a part with a value that is not finite, or too large to be added up")
        self._sum, self._next = self._next, self._sum
        self._weight += weight

    def finish(self) -> bytearray:
        """The weighted mean of what was added."""
        if self._weight <= 0:
            raise LocalError("no weight was added to the part")
        agora_kernels.reduce_finish(self._sum, self._next, len(self._sum) // 4, self._weight, 1)
        return self._next
