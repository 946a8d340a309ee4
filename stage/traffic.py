"""What crossed stage boundaries: hops and payload bytes, counted where they are sent. Torch-free.

A worker counts ``c`` with its ids when it hands a microbatch on, and ``dc`` when it answers one that came
from another stage. What trainers send to the head carries no ``c``: it crosses no boundary.
"""

from __future__ import annotations

import attrs


@attrs.define
class BoundaryCount:
    """Since the process began."""

    bytes: int = 0
    forward_hops: int = 0
    backward_hops: int = 0

    def forward(self, size: int) -> None:
        self.bytes += size
        self.forward_hops += 1

    def backward(self, size: int) -> None:
        self.bytes += size
        self.backward_hops += 1
