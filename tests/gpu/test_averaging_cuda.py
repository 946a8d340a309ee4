"""Averaging's CUDA kernels against the CPU's, which hold the definition: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from stage import kernels
from stage.kernels.launch import native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and native.has_cuda), reason="no GPU, or a build without CUDA"
    ),
]

BLOCK = kernels.BLOCK
KEY, SLICES = 0x1234567890ABCDEF, 3
SIZES = [[1], [5 * BLOCK + 3], [BLOCK, 77, 70 * BLOCK + 255, 2, 3 * BLOCK], [1 << 22]]
# What a cast, a scale or a sum might get wrong.
ODD = [0.0, -0.0, 1e-45, 3.4e38, 65519.0, 65520.0, 6e-8, math.inf, -math.inf, math.nan]

Packed = Literal["fp32", "bf16", "int8"]
PACKED: tuple[Packed, ...] = ("fp32", "bf16", "int8")


def numbers(sizes: list[int], *, odd: bool = False) -> list[Tensor]:
    made = [torch.randn(n) for n in sizes]
    if odd:
        made[-1][: len(ODD)] = torch.tensor(ODD[: len(made[-1])])
    return made


def on_gpu(tensors: list[Tensor], offset: bool = False) -> list[Tensor]:
    """Copies there; `offset`: one element further on than vectors can be read."""
    moved = [torch.cat([t.new_zeros(1), t]).cuda()[1:] if offset else t.cuda() for t in tensors]
    assert all((t.data_ptr() % 16 != 0) is offset for t in moved)
    return moved


def same_bits(theirs: Tensor, mine: Tensor) -> bool:
    """NaN counts as itself, and zeros have their signs."""
    theirs = theirs.cpu()
    kind = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[mine.element_size()]
    nan = mine.isnan() & theirs.isnan()
    return bool(((mine.view(kind) == theirs.view(kind)) | nan).all())


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", PACKED)
def test_pack_is_the_cpus(dtype: Packed, sizes: list[int], offset: bool) -> None:
    torch.manual_seed(1)
    weights, before = numbers(sizes, odd=dtype != "int8"), numbers(sizes)
    on_device, consensus = on_gpu(weights, offset), on_gpu(before, offset)
    blocks = sum(-(-n // BLOCK) for n in sizes)
    for r in range(SLICES):
        first, stop = kernels.slice_range(blocks, r, SLICES)
        mine = torch.zeros((stop - first) * BLOCK)
        theirs = mine.cuda()
        wanted = kernels.slice_pack(weights, r, SLICES, KEY, dtype=dtype, snapshot=mine, consensus=before)
        packed = kernels.slice_pack(
            on_device, r, SLICES, KEY, dtype=dtype, snapshot=theirs, consensus=consensus
        )
        assert same_bits(packed, wanted)
        assert same_bits(theirs, mine)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["delta", "overwrite", "ema"])
@pytest.mark.parametrize("dtype", PACKED)
@pytest.mark.parametrize("offset", [False, True])
def test_merge_is_the_cpus(
    dtype: Packed, mode: Literal["delta", "overwrite", "ema"], low: torch.dtype, offset: bool
) -> None:
    torch.manual_seed(2)
    sizes = SIZES[2]
    weights, drift, before = (numbers(sizes) for _ in range(3))
    compute = [torch.zeros(n, dtype=low) for n in sizes]
    others = [numbers(sizes), numbers(sizes)]
    sides = [weights, drift, before, compute]
    on_device = [on_gpu(listed, offset) for listed in sides]
    blocks = sum(-(-n // BLOCK) for n in sizes)
    for r in range(SLICES):
        first, stop = kernels.slice_range(blocks, r, SLICES)
        average = kernels.slice_pack(others[0], r, SLICES, KEY, dtype=dtype, consensus=others[1])
        snapshot = torch.randn((stop - first) * BLOCK)
        ranges = [(3, BLOCK + 7), (2 * BLOCK, 9 * BLOCK + 30)] if r else None
        for gpu, (w, e, c, low_copy) in ((False, sides), (True, on_device)):
            kernels.slice_merge(
                w, None if mode == "overwrite" else (snapshot.cuda() if gpu else snapshot),
                average.cuda() if gpu else average, r, SLICES, KEY, mode, ranges,
                drift=e if mode == "ema" else None, mu=0.75 if mode == "ema" else 0.0,
                consensus=c, compute=low_copy,
            )  # fmt: skip
    for mine, theirs in zip(sides, on_device, strict=True):
        assert all(same_bits(y, x) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("spoiled", [None, math.nan, math.inf, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("blocks", [1, 37, 20_000])
def test_reduce_is_the_cpus(blocks: int, dtype: torch.dtype, spoiled: float | None) -> None:
    torch.manual_seed(3)
    n = blocks * BLOCK
    values = torch.randn(n)
    if spoiled is not None:
        values[n // 2] = spoiled
    if dtype is torch.uint8:
        part = kernels.slice_pack(values, 0, 1, KEY, dtype="int8", consensus=torch.zeros(n))
    else:
        part = values.to(dtype)
    mine = torch.randn(n)
    theirs = mine.cuda()
    usable, norm2 = kernels.reduce_add(mine, part, 0.3)
    found, norm2_found = kernels.reduce_add(theirs, part.cuda(), 0.3)
    assert found is usable
    assert usable is (spoiled is None) or dtype is torch.uint8
    if usable:
        assert norm2_found == pytest.approx(norm2, rel=1e-12)
    assert same_bits(theirs, mine)
    aside = torch.empty_like(theirs)
    kernels.reduce_add(theirs, part.cuda(), 0.3, out=aside)
    if usable:
        kernels.reduce_add(mine, part, 0.3)
        assert same_bits(aside, mine)
        assert same_bits(kernels.reduce_finish(aside, 1.6), kernels.reduce_finish(mine, 1.6))
