"""What a benchmark of the kernels consists of: sizes, and for each kernel its competitors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import attrs

from agorad.bench.timing import Work
from stage import presets
from stage.parameters import parameter_count

ROTATED_BYTES: Final = {"cpu": 160_000_000, "cuda": 600_000_000}
"""Buffers of one kind take turns until they are this much together: more than the caches hold."""
MOST_TURNS: Final = 64


@attrs.frozen
class Size:
    """Shapes of one model: tokens of a sequence, width, rank, and the weights of its middle stage."""

    name: str
    tokens: int
    d: int
    k: int
    weights: int


def sizes() -> dict[str, Size]:
    """The presets' shapes, smallest first."""
    found = {}
    for name in presets.PRESETS:
        model, _ = presets.preset(name)
        found[name] = Size(name, model.seq, model.d, model.k, parameter_count(model, model.stages // 2))
    return found


@attrs.frozen
class Case:
    """One row: our kernel and the ways to say the same in torch."""

    kernel: str
    size: str
    dtype: str
    bytes: int
    """That must move: everything read once and everything written once."""
    ours: Work
    eager: Sequence[Work]
    """Formulations in plain torch; the fastest counts."""
    whole: Callable[[], Work] | None = None
    """Makes the torch.compile'd formulation, where there is one."""


def turns(bytes_each: int, device: str) -> int:
    """How many buffers of this size take turns."""
    return max(2, min(MOST_TURNS, -(-ROTATED_BYTES[device] // max(bytes_each, 1))))
