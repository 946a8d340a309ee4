"""What every front checks of its arguments: a TypeError or ValueError with a sentence, never a crash."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK64 = 0xFFFFFFFFFFFFFFFF


def check(
    name: str, tensor: object, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {allowed}, not {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not {tensor.layout}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors are on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def check_seed(name: str, value: int) -> int:
    if not 0 <= value <= MASK64:
        raise ValueError(f"{name} must lie in [0, 2^64), not {value}")
    return value


def check_scale(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return value
