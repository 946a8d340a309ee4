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


def slice_pack(flat: Tensor, chosen: Tensor) -> Tensor:
    """The chosen blocks, one after the other."""
    return flat.view(-1, BLOCK)[chosen.to(flat.device)].reshape(-1)


def slice_merge(
    flat: Tensor,
    snapshot: Tensor | None,
    average: Tensor,
    chosen: Tensor,
    ranges: Sequence[tuple[int, int]],
) -> None:
    """Delta merge, or overwriting without a snapshot, of the ranges of the packed slice."""
    offsets = torch.arange(BLOCK, device=flat.device)
    where = (chosen.to(flat.device).view(-1, 1) * BLOCK + offsets).reshape(-1)
    for start, stop in ranges:
        part = where[start:stop]
        if snapshot is None:
            flat[part] = average[start:stop]
        else:
            flat[part] += average[start:stop] - snapshot[start:stop]


def reduce_add(total: Tensor, part: Tensor, weight: float) -> tuple[bool, float]:
    """Add ``weight * part`` unless it is unusable; (was it usable, squared norm of the part)."""
    values = part.to(torch.float32)
    factor = torch.tensor(weight, dtype=torch.float32, device=part.device)
    weighted = values * factor
    usable = bool((values.isfinite() & (weighted.abs() <= LARGEST_USABLE)).all())
    if usable:
        total += weighted
    return usable, float(values.double().square().sum())


def reduce_finish(total: Tensor, weight_sum: float) -> Tensor:
    """The mean."""
    return total / torch.tensor(weight_sum, dtype=torch.float32, device=total.device)
