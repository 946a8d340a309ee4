"""PowerSGD: replicas average their gradients as low-rank factors (Vogels et al., arXiv 1905.13727).

Theory of operation. A replica's accumulator holds the sum of the gradients of ``samples`` microbatches and
what earlier steps could not express: the error, fed back. Of each matrix M [m, n] of its mean

    project      P = M Q [m, rank]; a round averages all P
    contribute   P' = the mean P made orthonormal, equal everywhere; Q = Mᵀ P' [n, rank]; a second round
                 averages all Q, and with them whole the tensors for which factors do not pay
    finish       the gradient of everybody is P' Qᵀ with the mean Q, and the replica takes what it sent
                 itself (samples · P' Qᵀ with its own Q) out of its accumulator: what is left is the error

The mean Q, its columns at length one, is where the next P starts (one step of subspace iteration). It need
not be equal everywhere: any Q gives a valid P, only a poorer one. So a newcomer starts at random numbers.

Nothing changes before ``finish``: a round that fails loses no gradient and no sample, and microbatches may
arrive meanwhile. Of a round that averaged only some ranges, or whose mean lacks this replica in some, the
rest stays in the accumulator. A column of P that the ones before it explain is zero, lest machines that
round differently disagree about its direction; random numbers take its place at the next step.

Limits: P' is computed by each member, so gradients are equal to the bit on machines whose arithmetic is, and
to about 1e-7 on others. Memory beside the accumulator: 4 rank (m + n) bytes a matrix and the mean gradient.
For the device thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import torch
from torch import Tensor

from stage.factors import Matrix, factored
from stage.parameters import Layout, stream

EXPLAINED: Final = 1e-5
"""A column of which less than this is new is taken for rounding."""

Ranges = Sequence[tuple[int, int]]


@attrs.frozen(eq=False)
class Projected:
    """What the first round averages."""

    values: Tensor
    """All P, one after the other: fp32, 1-D, on the CPU."""
    samples: int
    """Behind it; 0: nothing to contribute."""


@attrs.frozen(eq=False)
class Contribution:
    """What the second round averages, and what it takes to make a gradient of the mean."""

    values: Tensor
    """All Q, then all that travels whole: fp32, 1-D, on the CPU."""
    samples: int
    bases: list[Tensor]
    """P' of each matrix."""
    generation: int = 0
    """Of the state that it belongs to."""


def orthonormal(p: Tensor) -> Tensor:
    """An orthonormal basis of the columns of ``p`` [m, r] (Gram-Schmidt); explained columns are zero."""
    basis = p.double().T.contiguous()
    for at in range(len(basis)):
        column, before = basis[at], basis[:at]
        length = float(column.norm())
        for _ in range(2):  # once leaves what cancellation cost
            column -= before.T @ (before @ column)
        left = float(column.norm())
        if left > EXPLAINED * length:
            column /= left
        else:
            column.zero_()
    return basis.T.to(p.dtype).contiguous()


class PowerSGD:
    """See the head of this file. ``gradient``: the accumulator, flat, by ``layout``."""

    def __init__(self, layout: Layout, rank: int, seed: int, gradient: Tensor) -> None:
        self.rank = rank
        self.matrices, self.whole = factored(layout, rank)
        self._gradient = gradient
        self._seed = seed
        self._right = [self._random(matrix) for matrix in self.matrices]
        """Q of each matrix, from which its next P is made."""

    @property
    def nbytes(self) -> int:
        """Of what is kept between two steps."""
        return sum(right.nbytes for right in self._right)

    def project(self, samples: int) -> Projected:
        """P of the accumulator, which holds ``samples`` gradients."""
        parts = [
            self._matrix(matrix) @ right / max(1, samples)
            for matrix, right in zip(self.matrices, self._right, strict=True)
        ]
        return Projected(_joined(parts), samples)

    def contribute(self, mean: Tensor, averaged: Ranges, samples: int) -> Contribution:
        """Q of the accumulator as it is now, on the mean P where it was averaged."""
        p = _only(mean, averaged).to(self._gradient.device)
        bases, parts, at = [], [], 0
        for matrix in self.matrices:
            size = matrix.rows * self.rank
            bases.append(orthonormal(p[at : at + size].view(matrix.rows, self.rank)))
            parts.append(self._matrix(matrix).T @ bases[-1] / max(1, samples))
            at += size
        parts += [self._gradient[start:stop] / max(1, samples) for start, stop in self.whole]
        return Contribution(_joined(parts), samples, bases)

    def finish(self, sent: Contribution, mean: Tensor, averaged: Ranges, ours: Ranges) -> Tensor:
        """The mean gradient, flat; what of it is this replica's own leaves the accumulator.

        ``averaged``: ranges of ``mean`` that are one; ``ours``: those that ``sent`` is part of.
        """
        values = _only(mean, averaged)
        gradient = torch.zeros_like(self._gradient)
        self._spread(gradient, values, sent.bases, 1.0)
        if sent.samples:
            self._spread(self._gradient, _only(sent.values, ours), sent.bases, -float(sent.samples))
        if sum(stop - start for start, stop in averaged) == values.numel():
            self._keep(values)
        return gradient

    def _spread(self, flat: Tensor, values: Tensor, bases: list[Tensor], factor: float) -> None:
        """Add ``factor`` times what ``values`` stand for."""
        values, at = values.to(flat.device), 0
        for matrix, basis in zip(self.matrices, bases, strict=True):
            size = matrix.columns * self.rank
            right = values[at : at + size].view(matrix.columns, self.rank)
            self._matrix(matrix, flat).addmm_(basis, right.T, alpha=factor)
            at += size
        for start, stop in self.whole:
            flat[start:stop].add_(values[at : at + stop - start], alpha=factor)
            at += stop - start

    def _keep(self, values: Tensor) -> None:
        at = 0
        for place, matrix in enumerate(self.matrices):
            size = matrix.columns * self.rank
            right = values[at : at + size].view(matrix.columns, self.rank).to(self._gradient.device)
            lengths = torch.linalg.vector_norm(right, dim=0)
            kept = right / torch.where(lengths > 0, lengths, 1.0)
            if not bool((lengths > 0).all()):
                kept = torch.where(lengths > 0, kept, self._random(matrix))
            self._right[place] = kept
            at += size

    def _matrix(self, matrix: Matrix, flat: Tensor | None = None) -> Tensor:
        flat = self._gradient if flat is None else flat
        stop = matrix.start + matrix.rows * matrix.columns
        view: Tensor = flat[matrix.start : stop].view(matrix.rows, matrix.columns)
        return view

    def _random(self, matrix: Matrix) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed ^ stream(matrix.name)) % (1 << 63))
        right = torch.randn(matrix.columns, self.rank, generator=generator)
        unit: Tensor = right / torch.linalg.vector_norm(right, dim=0)
        return unit.to(self._gradient.device)


def _joined(parts: list[Tensor]) -> Tensor:
    flat = [part.reshape(-1) for part in parts]
    return torch.cat(flat).float().cpu() if flat else torch.zeros(0)


def _only(values: Tensor, ranges: Ranges) -> Tensor:
    """``values`` inside the ranges, zero outside."""
    if list(ranges) == [(0, values.numel())]:
        return values
    kept = torch.zeros_like(values)
    for start, stop in ranges:
        kept[start:stop] = values[start:stop]
    return kept
