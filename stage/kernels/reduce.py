"""The weighted mean of the parts of a round, on tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stage.kernels import reference
from stage.kernels.checks import check
from stage.kernels.launch import CODES, compiled, launch

_VERDICT_CHUNK = 4096  # elements that a CUDA block looks at


def _reduce_add(total: Tensor, part: Tensor, weight: float) -> tuple[bool, float]:
    place = total.data_ptr(), part.data_ptr(), part.numel(), CODES[part.dtype], weight
    if total.device.type == "cpu":
        usable, norm2 = launch("reduce_add", total.device, *place)
        return usable, norm2
    chunks = (part.numel() + _VERDICT_CHUNK - 1) // _VERDICT_CHUNK
    verdicts = torch.empty((chunks, 2), dtype=torch.float64, device=part.device)
    look = part.data_ptr(), CODES[part.dtype], part.numel(), weight, verdicts.data_ptr()
    launch("reduce_inspect", part.device, *look)
    norm2, bad = verdicts.sum(0).tolist()
    if bad == 0:
        launch("reduce_add", total.device, *place)
    return bad == 0, norm2


def reduce_add(total: Tensor, part: Tensor, weight: float) -> tuple[bool, float]:
    """``total += weight * part`` in place unless a value is unusable; (usable, squared norm of ``part``).

    Usable: finite, and ``weight * value`` at most 2^112 in size. An unusable part leaves no trace.
    """
    check("total", total, (torch.float32,))
    check("part", part, (torch.float32, torch.bfloat16), total.device)
    if total.dim() != 1 or total.numel() == 0 or part.shape != total.shape:
        raise ValueError(f"part of shape {tuple(part.shape)} does not fit a total of {tuple(total.shape)}")
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"weight must be finite and not negative, not {weight}")
    with torch.no_grad():
        if not compiled(total):
            return reference.reduce_add(total, part, weight)
        usable, norm2 = _reduce_add(total, part, weight)
        if usable:
            torch.autograd.graph.increment_version(total)
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
