"""Which gradients of a stage travel as low-rank factors, and their sizes. Torch-free; see ``powersgd``."""

from __future__ import annotations

from typing import Final

import attrs

from stage.parameters import Layout

SMALLEST_SAVING: Final = 2
"""Factors pay where they are at least so many times smaller than the matrix."""


@attrs.frozen
class Matrix:
    """A matrix that travels as factors."""

    name: str
    start: int
    """Where it begins in the flat buffer."""
    rows: int
    columns: int


def pays(rows: int, columns: int, rank: int) -> bool:
    """Whether factors of a matrix are enough smaller than the matrix."""
    return SMALLEST_SAVING * rank * (rows + columns) <= rows * columns


def factored(layout: Layout, rank: int) -> tuple[list[Matrix], list[tuple[int, int]]]:
    """The matrices of a stage that travel as factors, and where all the rest lies in the flat buffer."""
    matrices, whole = [], []
    for spec, start in zip(layout.specs, layout.offsets, strict=True):
        if len(spec.shape) == 2 and pays(*spec.shape, rank):
            matrices.append(Matrix(spec.name, start, *spec.shape))
        else:
            whole.append((start, start + spec.numel))
    return matrices, whole


def sizes(layout: Layout, rank: int) -> tuple[int, int, int]:
    """Floats of all left factors, of all right ones, and of what travels whole beside these."""
    matrices, whole = factored(layout, rank)
    left = rank * sum(matrix.rows for matrix in matrices)
    right = rank * sum(matrix.columns for matrix in matrices)
    return left, right, sum(stop - start for start, stop in whole)
