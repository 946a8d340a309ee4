"""What the boundary's CUDA kernels are given beyond the CPU's arguments: U for tensor cores, and scratch.

Tensor cores read U from whole tiles of 64 x 64 in h's 16-bit dtype, as terms whose sum is U (csrc/cuda/
basis.cu). That form is made once for a basis and kept as long as the basis lives, one for each dtype of h,
until the basis changes (torch counts in-place changes; changes through ``.data`` are not seen).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from stage.kernels.launch import CODES, launch, native


class _Prepared(NamedTuple):
    version: int
    address: int
    stream: int
    numbers: Tensor


_KEPT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""basis -> {dtype of h: its prepared form}"""


def prepared_basis(basis: Tensor, dtype: torch.dtype) -> Tensor | None:
    """U prepared for h of ``dtype``; None where the kernels do without (CPU, fp32 h, k above 64)."""
    if basis.device.type != "cuda":
        return None
    d, k = basis.shape
    size = native.cuda_prepared_numbers(CODES[dtype], CODES[basis.dtype], d, k)
    if size == 0:
        return None
    kept: dict[torch.dtype, _Prepared] = {}
    version = -1  # tensors of inference mode count no changes: prepared anew each time
    if not basis.is_inference():
        kept = _KEPT.setdefault(basis, kept)  # type: ignore[no-untyped-call]
        version = basis._version
    now = version, basis.data_ptr(), torch.cuda.current_stream(basis.device).cuda_stream
    if dtype in kept and kept[dtype][:3] == now:
        return kept[dtype].numbers
    numbers = torch.empty(size, dtype=dtype, device=basis.device)
    launch(
        "prepare_basis", basis.device,
        basis.data_ptr(), CODES[basis.dtype], numbers.data_ptr(), CODES[dtype], d, k,
    )  # fmt: skip
    kept[dtype] = _Prepared(*now, numbers)
    return numbers


def scratch(h: Tensor, basis: Tensor) -> Tensor | None:
    """Memory for project's sums of h: fp32, for each span of d; None on the CPU."""
    if h.device.type != "cuda":
        return None
    d, k = basis.shape
    size = native.cuda_scratch_numbers(h.numel() // d, d, k)
    return torch.empty(size, dtype=torch.float32, device=h.device)


def addresses(device: torch.device, *tensors: Tensor | None) -> tuple[int, ...]:
    """The arguments that only the CUDA binding has. The tensors must outlive the launch."""
    if device.type != "cuda":
        return ()
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
