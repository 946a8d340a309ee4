"""Memory for vectors: in large pages where the system has them, and the last one's again once it is free.

A round writes a new vector once. In pages of 4 KiB the kernel's work for each of them costs more than writing
does: 40 MB took 29 ms, in large pages 9 ms; another time 15 ms, and 6 ms in those that were there already
(2.5 GHz Xeon, virtual).
Limit: one vector is kept for the next round.
"""

from __future__ import annotations

import mmap
import sys
from typing import Final, final

LARGE: Final = 4 << 20
"""Bytes from which it is worth a mapping of its own; mappings are multiples of it."""
UNUSED: Final = 2
"""References to a mapping of which nobody has a view: its keeper's, and that of the question."""


@final
class Memory:
    """For the vectors of one averager."""

    def __init__(self) -> None:
        self._pages: mmap.mmap | None = None

    def fresh(self, size: int) -> memoryview:
        """``size`` writable bytes, whatever is in them; given back with the last view of them."""
        if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return memoryview(bytearray(size))
        whole = -(-size // LARGE) * LARGE
        if self._pages is None or len(self._pages) != whole or sys.getrefcount(self._pages) > UNUSED:
            self._pages = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            try:
                self._pages.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without them
        return memoryview(self._pages)[:size]
