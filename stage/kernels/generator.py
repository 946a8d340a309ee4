"""The counter-based generator on tensors: rows of the token table F, and genesis values."""

from __future__ import annotations

import torch
from torch import Tensor

from stage.kernels import reference
from stage.kernels.checks import check, check_dtype, check_scale, check_seed, new_or_given
from stage.kernels.launch import CODES, compiled, launch

MAX_D = 1 << 20
MAX_N = 1 << 40


def random_normal(
    seed: int,
    stream: int,
    n: int,
    std: float,
    *,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """``n`` nearly normal fp32 values, mean 0: element i of a stream is the same on every machine.

    Sum of four uniform bytes, so at most 3.451 ``std`` in size. ``stream``: 64 bits that name the tensor.
    ``out``: contiguous fp32 memory for n values, on any device, to write to.
    """
    check_seed("seed", seed)
    check_seed("stream", stream)
    check_scale("std", std)
    if not 0 < n < MAX_N:
        raise ValueError(f"n must be positive and below {MAX_N}, not {n}")
    where = torch.device(device) if out is None else out.device
    out = new_or_given(out, (n,), torch.float32, where)
    if not compiled(out):
        return out.copy_(reference.random_normal(seed, stream, n, std, where))
    launch("normal", out.device, out.data_ptr(), n, seed, stream, std * reference.UNIT)
    return out


def token_table(
    ids: Tensor,
    d: int,
    seed: int,
    scale: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of ``scale * F`` for the ids, ``[..., d]``: made once a microbatch by a stage.

    The fp32 values, rounded once more to bfloat16 or float16 where ``dtype`` says so. ``out``: contiguous
    memory of that shape and dtype to write to.
    """
    check("ids", ids, (torch.int64,))
    check_seed("seed", seed)
    check_scale("scale", scale)
    check_dtype(dtype)
    if not 0 < d <= MAX_D:
        raise ValueError(f"d must lie in [1, {MAX_D}], not {d}")
    if ids.numel() == 0:
        raise ValueError("ids are empty")
    table = new_or_given(out, (*ids.shape, d), dtype, ids.device, ids=ids)
    if not compiled(ids, table):
        return table.copy_(reference.token_table(ids, d, seed, scale))
    factor = scale * reference.UNIT
    rows = ids.data_ptr(), ids.numel(), d
    launch("token_rows", ids.device, table.data_ptr(), CODES[dtype], *rows, seed, factor)
    return table
