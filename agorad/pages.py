"""Tensors of 2 MB and more on the processor's large pages, where the system lends them to who asks.

A slice of the weights is blocks from all over them: with 4 KB pages each costs a walk through the page
tables, a quarter of the time to pack or merge it, and a fresh buffer costs a fault every 4 KB. Torch asks for
large pages when its own variable says so; it looks once, at its first large allocation.
"""

from __future__ import annotations

import os


def use_large_pages() -> None:
    """To be called before torch makes a tensor; what the operator set stays."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
