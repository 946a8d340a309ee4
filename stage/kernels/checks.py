"""What every front checks of its arguments: a TypeError or ValueError with a sentence, never a crash."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK64 = 0xFFFFFFFFFFFFFFFF
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""float64 runs the reference."""


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


def dtype_of(out: Tensor) -> torch.dtype:
    """That of the tensor to write to; TypeError if it is none."""
    check("out", out, FLOATS)
    return out.dtype


def check_seed(name: str, value: int) -> int:
    if not 0 <= value <= MASK64:
        raise ValueError(f"{name} must lie in [0, 2^64), not {value}")
    return value


def check_scale(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return value


def check_dtype(dtype: object) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, not {dtype}")


def check_apart(name: str, out: Tensor, **inputs: Tensor | None) -> None:
    """ValueError where the output's memory overlaps an input's: the kernel would read what it wrote."""
    start = out.data_ptr()
    for other, tensor in inputs.items():
        if tensor is None:
            continue
        first = tensor.data_ptr()
        if start < first + tensor.nbytes and first < start + out.nbytes:
            raise ValueError(f"{name} shares memory with {other}: give it memory of its own")


def new_or_given(
    out: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    **inputs: Tensor | None,
) -> Tensor:
    """The tensor that a kernel writes to: fresh, or the caller's if it is what the result would be."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    check("out", out, (dtype,), device)
    if out.shape != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the result has {tuple(shape)}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, *inputs.values())):
        raise ValueError("out= is for results that autograd does not follow: call it under torch.no_grad()")
    check_apart("out", out, **inputs)
    torch.autograd.graph.increment_version(out)
    return out
