"""Slices of a stage's weights: which blocks, packing them, merging their average.

The weights are one fp32 tensor or many, laid end to end, each filled up to whole 256-element blocks; slice
``r`` of n is a permuted n-th of the blocks. A packed slice is 1-D: float32 or bfloat16, 256 numbers a block,
or uint8, 260 bytes a block: the difference to the last consensus as a scale (fp32) and 256 codes. What lies
behind the end of a tensor is packed as zeros and merged nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stage.kernels import reference
from stage.kernels.blocks import (
    MAX_BLOCKS,
    Tensors,
    blocks_in,
    check_disjoint,
    check_tensors,
    check_twin,
    table_of,
)
from stage.kernels.checks import MASK64, check, check_seed
from stage.kernels.launch import CODES, compiled, launch, native
from stage.kernels.reference import BLOCK, INT8_BLOCK

_MODES = {"delta": 0, "overwrite": 1, "ema": 2}
_PACKED = {"fp32": (torch.float32, BLOCK), "bf16": (torch.bfloat16, BLOCK), "int8": (torch.uint8, INT8_BLOCK)}
_PACKED_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 3}
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
    if not 0 < blocks <= MAX_BLOCKS:
        raise ValueError(f"blocks must lie in [1, {MAX_BLOCKS}], not {blocks}")
    if not 0 <= r < n_slices:
        raise ValueError(f"there is no slice {r} of {n_slices}")
    return r * blocks // n_slices, (r + 1) * blocks // n_slices


def slice_blocks(blocks: int, r: int, n_slices: int, key: int) -> Tensor:
    """The 256-float blocks of slice ``r``, int64, in packed order (on the CPU)."""
    first, stop = slice_range(blocks, r, n_slices)
    out = torch.empty(stop - first, dtype=torch.int64)
    native.slice_blocks(out.data_ptr(), blocks, first, stop - first, check_seed("key", key))
    return out


def slice_pack(
    weights: Tensors,
    r: int,
    n_slices: int,
    key: int,
    *,
    dtype: Literal["fp32", "bf16", "int8"] = "fp32",
    snapshot: Tensor | None = None,
    consensus: Tensors | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Slice ``r`` of the weights, one block after the other, in ``out`` or a new tensor.

    ``snapshot``: fp32, as long as the slice: gets the exact weights in the same pass. ``consensus``: what the
    weights were when they were last averaged, in tensors like the weights'; int8 needs it.
    """
    listed = check_tensors("weights", weights, (torch.float32,))
    blocks = blocks_in(listed)
    first, stop = slice_range(blocks, r, n_slices)
    check_seed("key", key)
    if dtype not in _PACKED:
        raise ValueError(f"dtype must be 'fp32', 'bf16' or 'int8', not {dtype!r}")
    kind, width = _PACKED[dtype]
    before = None
    if dtype == "int8":
        if consensus is None:
            raise ValueError("an int8 slice is the difference to the last consensus: give it")
        before = check_twin("consensus", consensus, listed, (torch.float32,))
    device = listed[0].device
    if out is None:
        out = torch.empty((stop - first) * width, dtype=kind, device=device)
    _check_packed("out", out, (kind,), device, (stop - first) * width)
    if snapshot is not None:
        _check_packed("snapshot", snapshot, (torch.float32,), device, (stop - first) * BLOCK)
    if first == stop:
        return out
    check_disjoint([out, *([] if snapshot is None else [snapshot])], [*listed, *(before or [])])
    with torch.no_grad():
        if not compiled(out):
            reference.slice_pack(
                listed, before, out, snapshot, reference.slice_blocks(blocks, first, stop, key)
            )
        else:
            tables = [table_of(listed), None if before is None else table_of(before)]
            launch(
                "slice_pack", device,
                _address(tables[0]), _address(tables[1]), len(listed), out.data_ptr(), _PACKED_CODES[kind],
                _address(snapshot), blocks, first, stop - first, key,
            )  # fmt: skip
        torch.autograd.graph.increment_version([out] if snapshot is None else [out, snapshot])
    return out


def slice_merge(
    weights: Tensors,
    snapshot: Tensor | None,
    average: Tensor,
    r: int,
    n_slices: int,
    key: int,
    mode: Literal["delta", "overwrite", "ema"] = "delta",
    ranges: Sequence[tuple[int, int]] | None = None,
    *,
    drift: Tensors | None = None,
    mu: float = 0.0,
    consensus: Tensors | None = None,
    compute: Tensors | None = None,
) -> None:
    """Put the average of slice ``r`` into the weights, in place.

    ``delta``: ``w += average - snapshot``, where ``snapshot`` is what was packed when the round began.
    ``overwrite``: ``w = average`` (``snapshot`` may be None).
    ``ema``: ``e = mu e + (1 - mu) (w - snapshot)``, ``w = average + e``, with e in ``drift`` (AsyncMesh,
    arXiv 2601.22442; mu = 0 on a first visit sets e).

    ``ranges``: the ascending, disjoint ranges of elements of the packed slice that were averaged; None for
    all of it. ``average``: float32, bfloat16 or uint8 as packed; uint8 is the mean difference to
    ``consensus``. In the same pass ``consensus`` becomes the average and ``compute``, a bfloat16 or float16
    copy of the weights, follows them, where given. ``drift``, ``consensus`` and ``compute`` are tensors like
    the weights'.
    """
    listed = check_tensors("weights", weights, (torch.float32,))
    blocks = blocks_in(listed)
    first, stop = slice_range(blocks, r, n_slices)
    check_seed("key", key)
    if mode not in _MODES:
        raise ValueError(f"mode must be 'delta', 'overwrite' or 'ema', not {mode!r}")
    if not 0.0 <= mu < 1.0:
        raise ValueError(f"mu must lie in [0, 1), not {mu}")
    device, size = listed[0].device, (stop - first) * BLOCK
    check("average", average, tuple(_PACKED_CODES), device)
    width = INT8_BLOCK if average.dtype is torch.uint8 else BLOCK
    _check_packed("average", average, (average.dtype,), device, (stop - first) * width)
    if mode == "overwrite":
        snapshot = None
    elif snapshot is None:
        raise ValueError(f"merging by {mode} needs the snapshot that was averaged")
    else:
        _check_packed("snapshot", snapshot, (torch.float32,), device, size)
    if mode != "ema":
        drift = None
    elif drift is None:
        raise ValueError("merging by ema needs the drift")
    if average.dtype is torch.uint8 and consensus is None:
        raise ValueError("an int8 average is a difference to the last consensus: give it")
    twins = [
        None if twin is None else check_twin(name, twin, listed, dtypes)
        for name, twin, dtypes in (
            ("drift", drift, (torch.float32,)),
            ("consensus", consensus, (torch.float32,)),
            ("compute", compute, (torch.bfloat16, torch.float16)),
        )
    ]
    wanted = _check_ranges(ranges, size)
    if not wanted:
        return
    written = [*listed, *(tensor for twin in twins for tensor in twin or [])]
    check_disjoint(written, [average, *([] if snapshot is None else [snapshot])])
    with torch.no_grad():
        if not compiled(average):
            chosen = reference.slice_blocks(blocks, first, stop, key)
            reference.slice_merge(listed, snapshot, average, chosen, mode, wanted, mu, *twins)
        else:
            tables = [table_of(listed), *(None if twin is None else table_of(twin) for twin in twins)]
            low = CODES[torch.bfloat16 if twins[2] is None else twins[2][0].dtype]
            for start, end in wanted:
                launch(
                    "slice_merge", device,
                    _address(tables[0]), _address(snapshot), average.data_ptr(), _PACKED_CODES[average.dtype],
                    *(_address(table) for table in tables[1:]), low, len(listed),
                    blocks, first, stop - first, key, start, end, _MODES[mode], mu,
                )  # fmt: skip
        torch.autograd.graph.increment_version(written)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_packed(
    name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], device: torch.device, size: int
) -> None:
    check(name, tensor, dtypes, device)
    if tensor.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the slice has {size} elements")


def _check_ranges(ranges: Sequence[tuple[int, int]] | None, size: int) -> list[tuple[int, int]]:
    done = 0
    listed = [(0, size)] if ranges is None else list(ranges)
    for start, end in listed:
        if not done <= start <= end <= size:
            raise ValueError(f"range ({start}, {end}) is not ascending, disjoint and within {size} floats")
        done = end
    return [(start, end) for start, end in listed if start < end]
