"""The compiled module, the numbers of its dtypes, and how a kernel is started on a tensor's device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["CODES", "compiled", "launch", "native"]

try:
    import agora_kernels as native
except ImportError as problem:  # pragma: no cover - a broken installation
    raise ImportError(
        f"the compiled kernels cannot be loaded ({problem}): reinstall with 'pip install -e .'"
    ) from problem

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compiled(*tensors: Tensor) -> bool:
    """Whether a compiled kernel exists for these."""
    device = tensors[0].device.type
    return (device == "cpu" or (device == "cuda" and native.has_cuda)) and not any(
        tensor.dtype is torch.float64 for tensor in tensors
    )


def launch(name: str, device: torch.device, *arguments: Any) -> Any:
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            return getattr(native, f"cuda_{name}")(*arguments, stream)
    return getattr(native, name)(*arguments, torch.get_num_threads())
