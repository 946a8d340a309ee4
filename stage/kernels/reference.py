"""Every kernel in plain torch: what the compiled ones are tested against, and what runs where none is.

Purpose: a readable definition. ``stage.kernels`` falls back to these functions for devices and dtypes
without a compiled kernel (float64; CUDA in a build without it). Theory of operation: 32-bit arithmetic is
done in int64, whose products wrap modulo 2^64 as unsigned ones do, so generator, permutation, merge and
reduce are equal to the kernels to the bit; ``expand`` and ``project`` are equal to rounding.
Limits: no checks (``stage.kernels`` makes them); temporaries of several times the output.
Sources: csrc/functors, one header for each section here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TOKEN_TABLE_STREAM = 0x544F4B5441424C45
"""``TOKTABLE``: the generator's stream of F."""

UNIT = 1.0 / math.sqrt(21845.0)
"""Makes the sum of four centred bytes have standard deviation 1: its variance is 4 (256^2 - 1) / 12."""

BLOCK = 256
"""Floats in a block: the grain of slices."""

INT8_BLOCK = 4 + BLOCK
"""Bytes of a block as a scale and codes."""

LARGEST_USABLE = 2.0**112
"""A weighted value above this is refused: 2^15 parts of such values cannot overflow a sum."""

FEISTEL_ROUNDS = 6
_MASK32 = 0xFFFFFFFF


def philox(words: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's own integers."""
    a, b, c, d = words
    k0, k1 = key & _MASK32, key >> 32 & _MASK32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (p1 >> 32) ^ b ^ k0, p1 & _MASK32, (p0 >> 32) ^ d ^ k1, p0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return a, b, c, d


def _philox(a: Tensor, b: Tensor, c: int, d: int, key: int) -> Tensor:
    """The same for int64 tensors of counters; the four words are the last dimension."""
    words = [a, b, torch.full_like(a, c), torch.full_like(a, d)]
    k0, k1 = key & _MASK32, key >> 32 & _MASK32
    for _ in range(10):
        p0, p1 = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (p1 >> 32 & _MASK32) ^ words[1] ^ k0,
            p1 & _MASK32,
            (p0 >> 32 & _MASK32) ^ words[3] ^ k1,
            p0 & _MASK32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack(words, dim=-1)


def _values(seed: int, stream: int, row: Tensor, group: Tensor, scale: float) -> Tensor:
    words = _philox(group, row, stream & _MASK32, stream >> 32 & _MASK32, seed)
    total = (words & 255) + (words >> 8 & 255) + (words >> 16 & 255) + (words >> 24) - 510
    return total.to(torch.float32) * torch.tensor(scale * UNIT, dtype=torch.float32, device=total.device)


def random_normal(seed: int, stream: int, n: int, std: float, device: torch.device) -> Tensor:
    """``n`` fp32 values of a stream."""
    group = torch.arange((n + 3) // 4, device=device)
    return _values(seed, stream, group >> 32, group & _MASK32, std).reshape(-1)[:n].clone()


def token_table(ids: Tensor, d: int, seed: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of ``scale * F``: fp32 values, rounded once more where another dtype is wanted."""
    flat = ids.reshape(-1, 1).to(torch.int64)
    group = torch.arange((d + 3) // 4, device=ids.device).reshape(1, -1)
    shape = flat.shape[0], group.shape[1]
    values = _values(seed, TOKEN_TABLE_STREAM, flat.expand(shape), group.expand(shape), scale).reshape(
        flat.shape[0], -1
    )[:, :d]
    return values.reshape(*ids.shape, d).to(dtype)


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def expand(
    c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``c U^T + scale F[ids]``."""
    wide = _wide(c, basis)
    table = token_table(ids, basis.shape[0], seed, scale).to(wide)
    return (c.to(wide) @ basis.to(wide).T + table).to(c.dtype if dtype is None else dtype)


def expand_rows(c: Tensor, basis: Tensor, rows: Tensor) -> Tensor:
    """``c U^T + rows`` in the dtype of ``rows``."""
    wide = _wide(c, basis, rows)
    return (c.to(wide) @ basis.to(wide).T + rows.to(wide)).to(rows.dtype)


def project(dh: Tensor, basis: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``dh U``."""
    wide = _wide(dh, basis)
    return (dh.to(wide) @ basis.to(wide)).to(dh.dtype if dtype is None else dtype)


def project_difference(h: Tensor, rows: Tensor, basis: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``(h - rows) U``."""
    wide = _wide(h, rows, basis)
    return ((h.to(wide) - rows.to(wide)) @ basis.to(wide)).to(h.dtype if dtype is None else dtype)


def subspace_weights(weights: Tensor, basis: Tensor) -> None:
    """``W <- U (U^T W)`` in place."""
    wide = _wide(weights, basis)
    u = basis.to(wide)
    weights.copy_(u @ (u.T @ weights.to(wide)))


def wire_pack(c: Tensor, out: Tensor, wire: str) -> None:
    """``c`` [T, k] into the bytes ``out`` (uint8): numbers, or T scales and then T k codes."""
    tokens = c.shape[0]
    if wire != "int8":
        numbers = c.to(torch.float32 if wire == "fp32" else torch.bfloat16)
        out.copy_(numbers.reshape(-1).view(torch.uint8))
        return
    c = c.float()
    scales = c.abs().amax(dim=1) / torch.tensor(127.0, device=c.device)
    # A scale that underflows to 0 would divide by 0; its codes are 0 as well.
    codes = (c / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().to(torch.int8)
    out[: 4 * tokens].copy_(scales.view(torch.uint8))
    out[4 * tokens :].copy_(codes.reshape(-1).view(torch.uint8))


def permutation(blocks: int, positions: Tensor, key: int) -> Tensor:
    """Where the keyed permutation of [0, blocks) sends each position."""
    half = 1
    while half < 16 and 1 << (2 * half) < blocks:
        half += 1
    mask = (1 << half) - 1
    keys = philox((0, 0, 0, 0), key) + philox((1, 0, 0, 0), key)
    x = positions.clone()
    walking = torch.ones_like(x, dtype=torch.bool)
    while bool(walking.any()):
        left, right = x[walking] >> half, x[walking] & mask
        for round_key in keys[:FEISTEL_ROUNDS]:
            mixed = (right ^ round_key) * 0x85EBCA6B & _MASK32
            mixed = mixed ^ mixed >> 13
            mixed = mixed * 0xC2B2AE35 & _MASK32
            mixed = mixed ^ mixed >> 16
            left, right = right, left ^ mixed & mask
        x[walking] = left << half | right
        walking = x >= blocks
    return x


def slice_blocks(blocks: int, first: int, stop: int, key: int) -> Tensor:
    """The blocks of positions [first, stop)."""
    return permutation(blocks, torch.arange(first, stop), key)


def _elements(tensors: list[Tensor], chosen: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each tensor: which elements of the packed slice it has, and where those are in it."""
    offsets = torch.arange(BLOCK, device=tensors[0].device)
    blocks, first, found = chosen.to(tensors[0].device), 0, []
    for tensor in tensors:
        inside = (blocks >= first) & (blocks < first - (-tensor.numel() // BLOCK))
        packed = (inside.nonzero() * BLOCK + offsets).reshape(-1)
        place = ((blocks[inside] - first).view(-1, 1) * BLOCK + offsets).reshape(-1)
        exists = place < tensor.numel()
        found.append((packed[exists], place[exists]))
        first -= -tensor.numel() // BLOCK
    return found


def _gather(tensors: list[Tensor], chosen: Tensor) -> Tensor:
    packed = torch.zeros(chosen.numel() * BLOCK, dtype=torch.float32, device=tensors[0].device)
    for tensor, (at, place) in zip(tensors, _elements(tensors, chosen), strict=True):
        packed[at] = tensor.reshape(-1)[place]
    return packed


def slice_pack(
    weights: list[Tensor],
    consensus: list[Tensor] | None,
    out: Tensor,
    snapshot: Tensor | None,
    chosen: Tensor,
) -> None:
    """The chosen blocks, one after the other, in out's dtype; uint8 is the difference to the consensus."""
    values = _gather(weights, chosen)
    if snapshot is not None:
        snapshot.copy_(values)
    if out.dtype is not torch.uint8:
        out.copy_(values)
        return
    assert consensus is not None
    to_int8((values - _gather(consensus, chosen)).view(-1, BLOCK), out.view(-1, INT8_BLOCK))


def to_int8(difference: Tensor, blocks: Tensor) -> None:
    """Rows of [n, BLOCK] as a scale and codes each, into uint8 [n, INT8_BLOCK]; see csrc/functors/wire.h."""
    scale = difference.abs().amax(dim=1, keepdim=True) / 127.0
    codes = (difference / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().nan_to_num(0.0, 0.0, 0.0)
    blocks[:, :4] = scale.view(torch.uint8)
    blocks[:, 4:] = codes.to(torch.int8).view(torch.uint8)


def from_int8(blocks: Tensor) -> Tensor:
    """What uint8 [n * INT8_BLOCK] means: fp32 [n * BLOCK]."""
    rows = blocks.view(-1, INT8_BLOCK)
    scale = rows[:, :4].contiguous().view(torch.float32)
    return (rows[:, 4:].view(torch.int8).to(torch.float32) * scale).reshape(-1)


def slice_merge(
    weights: list[Tensor],
    snapshot: Tensor | None,
    average: Tensor,
    chosen: Tensor,
    mode: str,
    ranges: Sequence[tuple[int, int]],
    mu: float,
    drift: list[Tensor] | None,
    consensus: list[Tensor] | None,
    compute: list[Tensor] | None,
) -> None:
    """Merge the ranges of the packed slice; see ``stage.kernels.slice_merge``."""
    if average.dtype is torch.uint8:
        assert consensus is not None
        mean = _gather(consensus, chosen) + from_int8(average)
    else:
        mean = average.to(torch.float32)
    keep, rest = (torch.tensor(x, dtype=torch.float32, device=mean.device) for x in (mu, 0.0))
    rest = 1 - keep
    wanted = torch.zeros(mean.numel(), dtype=torch.bool, device=mean.device)
    for start, stop in ranges:
        wanted[start:stop] = True
    for i, (at, place) in enumerate(_elements(weights, chosen)):
        at, place = at[wanted[at]], place[wanted[at]]
        flat, new = weights[i].view(-1), mean[at]
        if mode == "delta":
            assert snapshot is not None
            merged = flat[place] + (new - snapshot[at])
        elif mode == "overwrite":
            merged = new
        else:
            assert snapshot is not None
            assert drift is not None
            moved = keep * drift[i].view(-1)[place] + rest * (flat[place] - snapshot[at])
            drift[i].view(-1)[place] = moved
            merged = new + moved
        flat[place] = merged
        if consensus is not None:
            consensus[i].view(-1)[place] = new
        if compute is not None:
            compute[i].view(-1)[place] = merged.to(compute[i].dtype)


def reduce_add(total: Tensor, part: Tensor, weight: float, out: Tensor) -> tuple[bool, float]:
    """out = total + weight part unless it is unusable; (was it usable, squared norm of the part)."""
    values = from_int8(part) if part.dtype is torch.uint8 else part.to(torch.float32)
    factor = torch.tensor(weight, dtype=torch.float32, device=part.device)
    weighted = values * factor
    usable = bool((values.isfinite() & (weighted.abs() <= LARGEST_USABLE)).all())
    if usable:
        torch.add(total, weighted, out=out)
    return usable, float(values.double().square().sum())


def reduce_finish(total: Tensor, weight_sum: float) -> Tensor:
    """The mean."""
    return total / torch.tensor(weight_sum, dtype=torch.float32, device=total.device)
