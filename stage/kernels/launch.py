"""The compiled module, the numbers of its dtypes, and how a kernel is started on a tensor's device."""

from __future__ import annotations

import functools
import warnings
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
    """Whether a compiled kernel exists for these. Says once a device if its kernels are missing."""
    device = tensors[0].device
    if device.type not in ("cpu", "cuda") or any(tensor.dtype is torch.float64 for tensor in tensors):
        return False
    return device.type == "cpu" or _has_kernels(device.index or 0)


@functools.cache
def _has_kernels(index: int) -> bool:
    """Whether the build has kernels that the CUDA device can run; if not, a warning, which comes once."""
    if not native.has_cuda:
        _warn_of_torch("has no CUDA kernels", "the architecture of your GPU, such as 90")
        return False
    major, minor = torch.cuda.get_device_capability(index)
    # A card runs code for an older one of its kind, and what was kept in PTX is compiled for a newer one.
    if any(arch <= 10 * major + minor for arch in native.cuda_archs):
        return True
    built = ", ".join(map(str, native.cuda_archs))
    _warn_of_torch(f"has CUDA kernels for {built}, not for GPU {index}", f"{major}{minor}")
    return False


def _warn_of_torch(what: str, archs: str) -> None:
    warnings.warn(
        f"this build of agora_kernels {what}: CUDA tensors go through plain torch operations, correctly but "
        f"slower. To change that, reinstall where nvcc is on PATH with AGORA_CUDA_ARCHS set to {archs}.",
        RuntimeWarning,
        stacklevel=4,
    )


def launch(name: str, device: torch.device, *arguments: Any) -> Any:
    """Starts a kernel: on the CPU with torch's number of threads, on CUDA in the current stream."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            return getattr(native, f"cuda_{name}")(*arguments, stream)
    return getattr(native, name)(*arguments, torch.get_num_threads())
