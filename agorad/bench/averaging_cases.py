"""The kernels of an averaging round against torch: packing a slice, merging its mean, adding up parts.

Torch's side gets the slice's block indices for nothing, computed beforehand; slices take turns, so that each
is read from memory. The weights are those of a whole stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from agorad.bench.cases import Case, Size
from stage import kernels
from stage.kernels import BLOCK

SLICES = 20
KEY = 0xA60BA
PARTS = 4
"""Parts that take turns in a reduction, each a quarter of a slice."""


def averaging_cases(size: Size, device: torch.device) -> Iterator[Case]:
    """The rows of one size, fp32."""
    blocks = -(-size.weights // BLOCK)
    flat = torch.zeros(blocks * BLOCK, device=device)
    flat.view(-1, BLOCK).add_(torch.arange(BLOCK, device=device))
    grid = flat.view(-1, BLOCK)
    indices = [kernels.slice_blocks(blocks, r, SLICES, KEY).to(device) for r in range(SLICES)]
    most = max(len(index) for index in indices)
    buffers = [torch.empty(most, BLOCK, device=device) for _ in range(2)]
    snapshots = [torch.empty(most, BLOCK, device=device) for _ in range(2)]
    for tensor in (*buffers, *snapshots):
        tensor.fill_(1.0)
    slice_bytes = size.weights // SLICES * 4
    common: dict[str, Any] = {"size": size.name, "dtype": "fp32"}

    def part_of(tensors: list[torch.Tensor], i: int) -> torch.Tensor:
        return tensors[i % 2][: len(indices[i % SLICES])]

    def ours_pack(i: int) -> None:
        kernels.slice_pack(
            flat, i % SLICES, SLICES, KEY,
            out=part_of(buffers, i).view(-1), snapshot=part_of(snapshots, i).view(-1),
        )  # fmt: skip

    def gather(i: int) -> None:
        torch.index_select(grid, 0, indices[i % SLICES], out=part_of(buffers, i))
        part_of(snapshots, i).copy_(part_of(buffers, i))

    def gather_twice(i: int) -> None:
        torch.index_select(grid, 0, indices[i % SLICES], out=part_of(buffers, i))
        torch.index_select(grid, 0, indices[i % SLICES], out=part_of(snapshots, i))

    yield Case(
        "pack", bytes=3 * slice_bytes, **common, ours=ours_pack, eager=[gather, gather_twice],
        whole=lambda: _compiled_pack(grid, indices),
    )  # fmt: skip

    def ours_merge(i: int) -> None:
        kernels.slice_merge(
            flat, part_of(snapshots, i).view(-1), part_of(buffers, i).view(-1), i % SLICES, SLICES, KEY
        )

    def add_in_place(i: int) -> None:
        change = part_of(buffers, i) - part_of(snapshots, i)
        grid.index_add_(0, indices[i % SLICES], change)

    def gather_add_scatter(i: int) -> None:
        index = indices[i % SLICES]
        grid.index_copy_(0, index, grid[index].add_(part_of(buffers, i)).sub_(part_of(snapshots, i)))

    yield Case(
        "merge", bytes=4 * slice_bytes, **common, ours=ours_merge, eager=[add_in_place, gather_add_scatter]
    )
    floats = max(BLOCK, size.weights // SLICES // PARTS)
    parts = [torch.full((floats,), 0.5 + p, device=device) for p in range(PARTS)]
    sums = [torch.zeros(floats, device=device) for _ in range(2)]

    def ours_reduce(i: int) -> None:
        kernels.reduce_add(sums[i % 2], parts[i % PARTS], 0.25, out=sums[1 - i % 2])

    def three_passes(i: int) -> None:
        part = parts[i % PARTS]
        low, high = torch.aminmax(part)
        norm = torch.linalg.vector_norm(part, dtype=torch.float64)
        if bool(low > -5e33) and bool(high < 5e33):  # false for NaN as well
            sums[0].add_(part, alpha=0.25)
        float(norm)

    def by_isfinite(i: int) -> None:
        part = parts[i % PARTS]
        norm = torch.linalg.vector_norm(part, dtype=torch.float64)
        if bool(torch.isfinite(part).all()):
            sums[0].add_(part, alpha=0.25)
        float(norm)

    yield Case("reduce", bytes=3 * 4 * floats, **common, ours=ours_reduce, eager=[three_passes, by_isfinite])


def _compiled_pack(grid: torch.Tensor, indices: list[torch.Tensor]) -> Any:
    def pack(weights: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = weights[index]
        return chosen, chosen.clone()

    fast = torch.compile(pack, dynamic=True)
    return lambda i: fast(grid, indices[i % SLICES])
