"""c in the form in which it travels between stages, written once, straight into the send buffer.

    fp32   T k little-endian floats
    bf16   T k numbers, rounded to nearest even
    int8   T fp32 scales (largest magnitude of the token / 127), then T k signed codes, rounded half to even

Values are equal to the bit everywhere (those of ``project_into`` up to the rounding of the projection).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stage.kernels import reference
from stage.kernels.boundary import MAX_K, check_basis, check_rows
from stage.kernels.checks import FLOATS, check, check_apart
from stage.kernels.launch import CODES, compiled, launch
from stage.kernels.prepared import addresses, prepared_basis, scratch

Wire = Literal["fp32", "bf16", "int8"]
Buffer = bytearray | memoryview

_WIRES = {"fp32": 0, "bf16": 1, "int8": 3}
_SCALE_BYTES = 4


def wire_bytes(tokens: int, k: int, wire: Wire) -> int:
    """Exact size of T x k numbers in a wire form."""
    if wire not in _WIRES:
        raise ValueError(f"wire must be 'fp32', 'bf16' or 'int8', not {wire!r}")
    return tokens * (k + _SCALE_BYTES if wire == "int8" else k * (4 if wire == "fp32" else 2))


def _memory(out: object, size: int) -> Tensor:
    """The output as bytes: those of a dense, contiguous tensor, or of memory of the host."""
    if isinstance(out, Tensor):
        if out.layout is not torch.strided or not out.is_contiguous():
            raise ValueError("out must be a dense, contiguous tensor")
        if out.requires_grad and torch.is_grad_enabled():
            raise ValueError("out requires a gradient, which packed bytes do not have")
        nbytes = out.nbytes
    else:
        try:
            view = memoryview(out)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"out must be a writable buffer or a tensor, not {type(out).__name__}") from None
        if view.readonly or not view.c_contiguous:
            raise ValueError("out must be a writable, contiguous buffer")
        nbytes = view.nbytes
    if nbytes != size:
        raise ValueError(f"out has {nbytes} bytes, the packed numbers have {size}")
    if isinstance(out, Tensor):
        return out.detach().reshape(-1).view(torch.uint8)
    return torch.frombuffer(view, dtype=torch.uint8)


def _write(
    out: object, size: int, device: torch.device, pack: Callable[[Tensor], None], **inputs: Tensor | None
) -> None:
    """Let ``pack`` write the bytes: straight to the output, or by a copy where it lies on another device."""
    to = _memory(out, size)
    with torch.no_grad():
        if to.device == device:
            check_apart("out", to, **inputs)
            pack(to)
        elif isinstance(out, Tensor):
            raise ValueError(f"out is on {out.device}, the other tensors are on {device}")
        elif device.type == "meta":
            raise ValueError("tensors on meta have no numbers to pack: give tensors with memory")
        else:
            staged = torch.empty(size, dtype=torch.uint8, device=device)
            pack(staged)
            to.copy_(staged)
    if isinstance(out, Tensor):
        torch.autograd.graph.increment_version(out)


def wire_pack(c: Tensor, out: Buffer | Tensor, wire: Wire) -> None:
    """``c`` [T, k] into ``out`` in a wire form, in one pass.

    ``out``: a writable buffer of any alignment, or a tensor on c's device, of exactly ``wire_bytes``.
    """
    check("c", c, FLOATS)
    if c.dim() != 2 or c.numel() == 0:
        raise ValueError(f"c must be a matrix of T tokens and k numbers, not {tuple(c.shape)}")
    tokens, k = c.shape

    def pack(to: Tensor) -> None:
        if not compiled(c) or k > MAX_K:
            reference.wire_pack(c.detach(), to, wire)
            return
        place = c.data_ptr(), CODES[c.dtype], to.data_ptr(), _WIRES[wire]
        launch("wire_pack", c.device, *place, tokens, k)

    _write(out, wire_bytes(tokens, k, wire), c.device, pack, c=c)


def project_into(
    h: Tensor, basis: Tensor, out: Buffer | Tensor, wire: Wire, *, rows: Tensor | None = None
) -> None:
    """``h U``, or ``(h - rows) U``, into ``out`` in a wire form, in the one pass over h.

    ``h`` [..., d] counts as T tokens; ``rows`` are of its shape and dtype. ``out`` as in ``wire_pack``.
    """
    check("h", h, FLOATS)
    check_basis(h, basis, 0, "h")
    if rows is not None:
        check_rows(rows, h.shape, (h.dtype,), h.device)
    d, k = basis.shape
    tokens = h.numel() // d

    def pack(to: Tensor) -> None:
        if not compiled(h, basis):
            less = h if rows is None else h - rows
            c = reference.project(less, basis, torch.float64 if h.dtype is torch.float64 else torch.float32)
            reference.wire_pack(c.reshape(tokens, k), to, wire)
            return
        prepared, sums = prepared_basis(basis, h.dtype), scratch(h, basis)
        launch(
            "project", h.device,
            h.data_ptr(), CODES[h.dtype], 0 if rows is None else rows.data_ptr(),
            basis.data_ptr(), CODES[basis.dtype], to.data_ptr(), _WIRES[wire], tokens, d, k,
            *addresses(h.device, prepared, sums),
        )  # fmt: skip

    _write(out, wire_bytes(tokens, k, wire), h.device, pack, h=h, U=basis, rows=rows)
