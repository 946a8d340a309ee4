"""Weights as 256-element blocks: the table that tells a kernel where they are, and who may overlap whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stage.kernels.checks import check
from stage.kernels.reference import BLOCK

Tensors = Tensor | Sequence[Tensor]

MAX_BLOCKS = 1 << 31
MAX_TENSORS = 1 << 20


def check_tensors(name: str, tensors: Tensors, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors of a stage, one or many: contiguous, of one device, none empty."""
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not 0 < len(listed) <= MAX_TENSORS:
        raise ValueError(f"{name} must be 1 to {MAX_TENSORS} tensors, not {len(listed)}")
    for tensor in listed:
        check(name, tensor, dtypes, listed[0].device if isinstance(listed[0], Tensor) else None)
        if tensor.numel() == 0:
            raise ValueError(f"{name} has an empty tensor")
        if tensor.dtype != listed[0].dtype:
            raise TypeError(f"{name} must all be of one dtype")
    return listed


def check_twin(
    name: str, twin: Tensors, weights: list[Tensor], dtypes: Sequence[torch.dtype]
) -> list[Tensor]:
    """Tensors that belong to the weights one by one."""
    listed = check_tensors(name, twin, dtypes)
    if [tensor.numel() for tensor in listed] != [tensor.numel() for tensor in weights]:
        raise ValueError(f"{name} must have the same number of tensors, of the same sizes, as the weights")
    if listed[0].device != weights[0].device:
        raise ValueError(f"{name} is on {listed[0].device}, the weights are on {weights[0].device}")
    return listed


def blocks_in(tensors: Iterable[Tensor]) -> int:
    """Blocks that the tensors take, each filled up to whole ones."""
    blocks = sum(-(-tensor.numel() // BLOCK) for tensor in tensors)
    if blocks > MAX_BLOCKS:
        raise ValueError(f"{blocks} blocks are beyond the limit of {MAX_BLOCKS}")
    return blocks


def table_of(tensors: list[Tensor]) -> Tensor:
    """int64 [n, 3] on the tensors' device: address, elements, number of the first block."""
    rows, first = [], 0
    for tensor in tensors:
        rows.append((tensor.data_ptr(), tensor.numel(), first))
        first += -(-tensor.numel() // BLOCK)
    return torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)


def check_disjoint(written: Iterable[Tensor], read: Iterable[Tensor] = ()) -> None:
    """ValueError if memory that a kernel writes is also that of another argument."""
    spans = [(*_span(tensor), True) for tensor in written] + [(*_span(tensor), False) for tensor in read]
    end, end_written = 0, 0
    for start, stop, writes in sorted(spans):
        if start < (end if writes else end_written):
            raise ValueError("a tensor that is written must not share memory with another argument")
        end = max(end, stop)
        end_written = max(end_written, stop if writes else 0)


def _span(tensor: Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()
