"""The weighted mean of the parts of a round, on tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stage.kernels import reference
from stage.kernels.blocks import check_disjoint
from stage.kernels.checks import check
from stage.kernels.launch import compiled, launch
from stage.kernels.reference import BLOCK, INT8_BLOCK

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_VERDICT_CHUNK = 4096  # elements that a CUDA block looks at


def _reduce_add(total: Tensor, part: Tensor, weight: float, out: Tensor) -> tuple[bool, float]:
    place = total.data_ptr(), part.data_ptr(), out.data_ptr(), total.numel(), _CODES[part.dtype], weight
    if total.device.type == "cpu":
        usable, norm2 = launch("reduce_add", total.device, *place)
        return usable, norm2
    # Both kernels are queued at once: the second looks at the first one's verdicts on the device.
    chunks = -(-total.numel() // _VERDICT_CHUNK)
    verdicts = torch.empty((chunks, 2), dtype=torch.float64, device=part.device)
    look = part.data_ptr(), _CODES[part.dtype], total.numel(), weight, verdicts.data_ptr()
    launch("reduce_inspect", part.device, *look)
    summed = verdicts.sum(0)
    launch("reduce_add", total.device, *place, summed.data_ptr())
    norm2, bad = summed.tolist()
    return bad == 0, norm2


def reduce_add(
    total: Tensor, part: Tensor, weight: float, *, out: Tensor | None = None
) -> tuple[bool, float]:
    """``total + weight * part`` in place, or into ``out``; (usable, squared norm of ``part``).

    ``part``: float32, bfloat16 or float16 as long as ``total`` (1-D), or uint8 as ``slice_pack`` makes int8.
    Usable: finite, and ``weight * value`` at most 2^112 in size. A part that is not usable leaves no trace in
    ``total``; what is in ``out`` then means nothing. Into another buffer the part is read once: check, norm
    and sum are one pass; in place it is read twice.
    """
    check("total", total, (torch.float32,))
    check("part", part, tuple(_CODES), total.device)
    if total.dim() != 1 or total.numel() == 0:
        raise ValueError(f"total must be 1-D and not empty, not of shape {tuple(total.shape)}")
    size = total.numel()
    if part.dtype is torch.uint8:
        if size % BLOCK:
            raise ValueError(f"an int8 part needs a total of whole blocks of {BLOCK}, not {size} floats")
        size = size // BLOCK * INT8_BLOCK
    if part.shape != (size,):
        raise ValueError(f"part of shape {tuple(part.shape)} does not fit a total of {tuple(total.shape)}")
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"weight must be finite and not negative, not {weight}")
    into = total if out is None else out
    if out is not None:
        check("out", out, (torch.float32,), total.device)
        if out.shape != total.shape:
            raise ValueError(f"out of shape {tuple(out.shape)} does not fit a total of {tuple(total.shape)}")
    check_disjoint([into], [part] if into is total else [part, total])
    with torch.no_grad():
        if not compiled(total):
            usable, norm2 = reference.reduce_add(total, part, weight, into)
        else:
            usable, norm2 = _reduce_add(total, part, weight, into)
        if usable or out is not None:
            torch.autograd.graph.increment_version(into)
    return usable, norm2


def reduce_finish(total: Tensor, weight_sum: float) -> Tensor:
    """``total / weight_sum``: the weighted mean of what was added."""
    check("total", total, (torch.float32,))
    if total.numel() == 0:
        raise ValueError("total is empty")
    if not math.isfinite(weight_sum) or weight_sum <= 0:
        raise ValueError(f"weight_sum must be finite and positive, not {weight_sum}")
    if not compiled(total):
        return reference.reduce_finish(total, weight_sum)
    out = torch.empty_like(total)
    launch("reduce_finish", total.device, total.data_ptr(), out.data_ptr(), total.numel(), weight_sum)
    return out
