"""Means that one bad contributor of five cannot move far: the run setting ``robust``.

Reducers of a part like ``stage.reduce``'s, but they keep every contribution until the end, since what is
usual shows only then. Contributions are compared with their coordinate-wise median, which a minority cannot
move past the others' numbers, whatever it sends and whatever it weighs.

    clip            each one's difference to the median, not longer than ``CLIP`` x the median length. Among
                    honest contributors nobody is that far out: then it is the weighted mean.
    trimmed         in each coordinate the lowest and highest ``TRIM`` of the contributors do not count, one
                    each at least from three on.
    centered-clip   the centre moves from the median by the mean of the differences to it, none longer than
                    their median length, ``TURNS`` times. (Karimireddy, He, Jaggi, "Learning from history for
                    Byzantine robust optimization", 2021, whose centre starts at the last consensus and whose
                    bound is a constant. Here every part is another piece of the weights, whose last
                    consensus is a cycle of slices old and would take 4 bytes a parameter to keep: the
                    median is nearer, and where most are honest a bad one moves it no further than they are
                    apart.)

With two contributors nobody can tell which is the bad one: all three are the weighted mean. Limits: memory is
the contributions to a part; numbers in double precision while they are reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy

from p2p.averaging.reducer import Buffer, MakeReducer
from p2p.errors import LocalError, RemoteError
from stage.reduce import KernelReducer

CLIP: Final = 1.25
TRIM: Final = 0.2
TURNS: Final = 3
LARGEST: Final = 2.0**112
"""Of a number times its weight, as in the plain mean: a rule changes nothing about who is refused."""

Rows = numpy.ndarray[Any, numpy.dtype[numpy.float64]]
Rule = Callable[[Rows, Rows], Rows]
"""From contributions (one a row) and their weights (adding up to 1) to the mean."""


def clipped(rows: Rows, weights: Rows) -> Rows:
    """The rule ``clip``."""
    centre = numpy.median(rows, axis=0)
    return _moved(centre, rows, weights, CLIP)


def trimmed(rows: Rows, weights: Rows) -> Rows:
    """The rule ``trimmed``."""
    count = len(rows)
    cut = max(1, math.floor(count * TRIM)) if count > 2 else 0
    order = numpy.argsort(rows, axis=0)[cut : count - cut]
    kept = weights[order]
    mean: Rows = (numpy.take_along_axis(rows, order, axis=0) * kept).sum(axis=0) / kept.sum(axis=0)
    return mean


def centered(rows: Rows, weights: Rows) -> Rows:
    """The rule ``centered-clip``."""
    if len(rows) < 3:
        return weights @ rows
    centre = numpy.median(rows, axis=0)
    for _ in range(TURNS):
        centre = _moved(centre, rows, weights, 1.0)
    return centre


def _moved(centre: Rows, rows: Rows, weights: Rows, times: float) -> Rows:
    """``centre`` plus the mean difference to it, none longer than ``times`` x the median length."""
    differences = rows - centre
    lengths = numpy.sqrt(numpy.einsum("ij,ij->i", differences, differences))
    bound = times * numpy.median(lengths)
    scales = numpy.ones_like(lengths)
    numpy.divide(bound, lengths, out=scales, where=lengths > bound)
    moved: Rows = centre + (weights * scales) @ differences
    return moved


RULES: Final[dict[str, Rule]] = {"clip": clipped, "trimmed": trimmed, "centered-clip": centered}


class RobustReducer:
    """Collects the contributions to one part of ``nbytes`` bytes; the contract is ``p2p``'s ``Reducer``."""

    def __init__(self, nbytes: int, rule: Rule) -> None:
        if nbytes <= 0 or nbytes % 4:
            raise LocalError(f"a part is a positive number of fp32 values, not {nbytes} bytes")
        self._nbytes = nbytes
        self._rule = rule
        self._rows: list[numpy.ndarray[Any, numpy.dtype[numpy.float32]]] = []
        self._weights: list[float] = []

    def add(self, part: Buffer, weight: float) -> None:
        """Keep a contribution; ``RemoteError`` for a wrong length or a value that is not usable."""
        if not math.isfinite(weight) or weight <= 0:
            raise LocalError(f"a weight must be finite and positive, not {weight}")
        if len(part) != self._nbytes:
            raise RemoteError(f"a part of {len(part)} bytes where {self._nbytes} were agreed")
        row = numpy.frombuffer(bytes(part), numpy.dtype("<f4"))
        largest = max(abs(float(row.max())), abs(float(row.min())))
        if not largest * weight <= LARGEST:  # false for NaN as well, which max() hands on
            raise RemoteError("a part with a value that is not finite, or too large to be added up")
        self._rows.append(row)
        self._weights.append(weight)

    def finish(self) -> bytes:
        """The mean by the rule."""
        if not self._rows:
            raise LocalError("nothing was added to the part")
        weights = numpy.array(self._weights)
        mean = self._rule(numpy.stack(self._rows).astype(numpy.float64), weights / weights.sum())
        return mean.astype(numpy.dtype("<f4")).tobytes()


def reducer(robust: str) -> MakeReducer:
    """What makes the reducers of a run with this setting."""
    if robust == "none":
        return KernelReducer
    rule = RULES[robust]
    return lambda nbytes: RobustReducer(nbytes, rule)
