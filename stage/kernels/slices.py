"""Slices of a stage's weights: which blocks, packing them, merging their average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stage.kernels import reference
from stage.kernels.checks import MASK64, check, check_seed
from stage.kernels.launch import compiled, launch, native
from stage.kernels.reference import BLOCK

_MODES = {"delta": 0, "overwrite": 1}
_MAX_BLOCKS = 1 << 31
_SLICE_DOMAIN = 0x534C4943  # "SLIC"


def slice_key(seed: int, stage: int, cycle: int) -> int:
    """The permutation's key: another for every run, stage and cycle of slices."""
    check_seed("seed", seed)
    if not 0 <= stage < 1 << 32 or not 0 <= cycle <= MASK64:
        raise ValueError(f"stage {stage} or cycle {cycle} is out of range")
    low, high, _, _ = reference.philox((stage, cycle & 0xFFFFFFFF, cycle >> 32, _SLICE_DOMAIN), seed)
    return high << 32 | low


def slice_range(blocks: int, r: int, n_slices: int) -> tuple[int, int]:
    """Positions [first, stop) of slice ``r`` in the permutation; slices differ by one block at most."""
    if not 0 < blocks <= _MAX_BLOCKS:
        raise ValueError(f"blocks must lie in [1, {_MAX_BLOCKS}], not {blocks}")
    if not 0 <= r < n_slices:
        raise ValueError(f"there is no slice {r} of {n_slices}")
    return r * blocks // n_slices, (r + 1) * blocks // n_slices


def slice_blocks(blocks: int, r: int, n_slices: int, key: int) -> Tensor:
    """The 256-float blocks of slice ``r``, int64, in packed order (on the CPU)."""
    first, stop = slice_range(blocks, r, n_slices)
    out = torch.empty(stop - first, dtype=torch.int64)
    native.slice_blocks(out.data_ptr(), blocks, first, stop - first, check_seed("key", key))
    return out


def _check_flat(flat: Tensor) -> int:
    check("flat", flat, (torch.float32,))
    if flat.dim() != 1 or flat.numel() == 0 or flat.numel() % BLOCK:
        raise ValueError(f"flat must be 1-D and a multiple of {BLOCK} floats long, not {tuple(flat.shape)}")
    return flat.numel() // BLOCK


def slice_pack(flat: Tensor, r: int, n_slices: int, key: int) -> Tensor:
    """A copy of slice ``r`` of the weights, fp32, one block after the other."""
    blocks = _check_flat(flat)
    first, stop = slice_range(blocks, r, n_slices)
    check_seed("key", key)
    flat = flat.detach()
    if not compiled(flat):
        return reference.slice_pack(flat, reference.slice_blocks(blocks, first, stop, key))
    packed = torch.empty((stop - first) * BLOCK, dtype=torch.float32, device=flat.device)
    if packed.numel():
        addresses = flat.data_ptr(), packed.data_ptr()
        launch("slice_pack", flat.device, *addresses, blocks, first, stop - first, key)
    return packed


def slice_merge(
    flat: Tensor,
    snapshot: Tensor | None,
    average: Tensor,
    r: int,
    n_slices: int,
    key: int,
    mode: Literal["delta", "overwrite"] = "delta",
    ranges: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Put the average of slice ``r`` into the weights, in place.

    ``delta``: ``w += average - snapshot``, where ``snapshot`` is what was packed when the round began;
    ``overwrite``: ``w = average`` (``snapshot`` may be None). ``ranges``: the ascending, disjoint ranges of
    floats of the packed slice that were averaged; None for all of it.
    """
    blocks = _check_flat(flat)
    first, stop = slice_range(blocks, r, n_slices)
    check_seed("key", key)
    if mode not in _MODES:
        raise ValueError(f"mode must be 'delta' or 'overwrite', not {mode!r}")
    size = (stop - first) * BLOCK
    if mode == "overwrite":
        snapshot = None
    elif snapshot is None:
        raise ValueError("a delta merge needs the snapshot that was averaged")
    for name, packed in (("snapshot", snapshot), ("average", average)):
        if packed is not None:
            check(name, packed, (torch.float32,), flat.device)
            if packed.shape != (size,):
                raise ValueError(f"{name} has shape {tuple(packed.shape)}, the slice has {size} floats")
    done = 0
    for start, end in [(0, size)] if ranges is None else ranges:
        if not done <= start <= end <= size:
            raise ValueError(f"range ({start}, {end}) is not ascending, disjoint and within {size} floats")
        done = end
    wanted = [(a, b) for a, b in ([(0, size)] if ranges is None else ranges) if a < b]
    if not wanted:
        return
    with torch.no_grad():
        if not compiled(flat):
            chosen = reference.slice_blocks(blocks, first, stop, key)
            reference.slice_merge(flat, snapshot, average, chosen, wanted)
            return
        before = average if snapshot is None else snapshot
        addresses = flat.data_ptr(), before.data_ptr(), average.data_ptr()
        for start, end in wanted:
            place = blocks, first, stop - first, key, start, end, _MODES[mode]
            launch("slice_merge", flat.device, *addresses, *place)
        torch.autograd.graph.increment_version(flat)
