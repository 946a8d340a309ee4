"""``expand`` (c to h) and ``project`` (h or dh to c): fronts, autograd, ``torch.library`` operators.

Called from here in eager mode they skip the dispatcher's Python layers, which would cost more than a small
microbatch's work. c, U and h may each have another dtype; sums are fp32. U and the token table's rows are
constants: neither gets a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stage.kernels import reference
from stage.kernels.checks import (
    FLOATS,
    MASK64,
    check,
    check_apart,
    check_dtype,
    check_scale,
    check_seed,
    dtype_of,
    new_or_given,
)
from stage.kernels.generator import MAX_D
from stage.kernels.launch import CODES, compiled, launch
from stage.kernels.prepared import addresses, prepared_basis, scratch

MAX_K = 1024


def check_basis(x: Tensor, basis: object, columns: int, name: str) -> None:
    """That x's last dimension (``columns`` 1) or its first one fits U: k columns, or d rows."""
    check("U", basis, FLOATS, x.device)
    assert isinstance(basis, Tensor)
    if basis.dim() != 2 or 0 in basis.shape:
        raise ValueError(f"U must be a matrix of d rows and k columns, not {tuple(basis.shape)}")
    d, k = basis.shape
    if d > MAX_D or k > MAX_K:
        raise ValueError(f"U of {d} x {k} is beyond the limits d <= {MAX_D}, k <= {MAX_K}")
    if x.dim() < 1 or x.shape[-1] != basis.shape[columns]:
        raise ValueError(f"{name} of shape {tuple(x.shape)} does not fit U of shape {(d, k)}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(x.shape)}")


def check_rows(
    rows: object, shape: torch.Size, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    check("rows", rows, dtypes, device)
    assert isinstance(rows, Tensor)
    if rows.shape != shape:
        raise ValueError(f"rows of shape {tuple(rows.shape)} do not fit h of shape {tuple(shape)}")


def _check_constant(rows: object) -> None:
    if isinstance(rows, Tensor) and rows.requires_grad and torch.is_grad_enabled():
        raise ValueError("rows of the token table are a constant and get no gradient: detach them")


def _expand(
    c: Tensor,
    basis: Tensor,
    ids: Tensor,
    seed: int,
    scale: float,
    dtype: torch.dtype | None,
    out: Tensor | None = None,
) -> Tensor:
    check("c", c, FLOATS)
    check_basis(c, basis, 1, "c")
    check("ids", ids, (torch.int64,), c.device)
    if ids.shape != c.shape[:-1]:
        raise ValueError(f"ids of shape {tuple(ids.shape)} do not fit c of shape {tuple(c.shape)}")
    check_scale("scale", scale)
    if dtype is not None:
        check_dtype(dtype)
    d, k = basis.shape
    h = new_or_given(out, (*ids.shape, d), dtype or c.dtype, c.device, c=c, U=basis, ids=ids)
    if not compiled(c, basis, h):
        return h.copy_(reference.expand(c, basis, ids, seed, scale, h.dtype))
    prepared = prepared_basis(basis, h.dtype)
    launch(
        "expand", c.device,
        c.data_ptr(), CODES[c.dtype], basis.data_ptr(), CODES[basis.dtype], ids.data_ptr(),
        h.data_ptr(), CODES[h.dtype], ids.numel(), d, k, seed, scale * reference.UNIT,
        *addresses(c.device, prepared),
    )  # fmt: skip
    return h


def _expand_rows(c: Tensor, basis: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
    check("c", c, FLOATS)
    check_basis(c, basis, 1, "c")
    d, k = basis.shape
    shape = torch.Size((*c.shape[:-1], d))
    check_rows(rows, shape, FLOATS, c.device)
    h = new_or_given(out, shape, rows.dtype, c.device, c=c, U=basis, rows=rows)
    if not compiled(c, basis, rows):
        return h.copy_(reference.expand_rows(c, basis, rows))
    prepared = prepared_basis(basis, h.dtype)
    launch(
        "expand_rows", c.device,
        c.data_ptr(), CODES[c.dtype], basis.data_ptr(), CODES[basis.dtype], rows.data_ptr(),
        h.data_ptr(), CODES[h.dtype], h.numel() // d, d, k, *addresses(c.device, prepared),
    )  # fmt: skip
    return h


def _project(
    h: Tensor, rows: Tensor | None, basis: Tensor, dtype: torch.dtype | None, out: Tensor | None = None
) -> Tensor:
    check("h", h, FLOATS)
    check_basis(h, basis, 0, "h")
    if rows is not None:
        check_rows(rows, h.shape, (h.dtype,), h.device)
    if dtype is not None:
        check_dtype(dtype)
    d, k = basis.shape
    c = new_or_given(out, (*h.shape[:-1], k), dtype or h.dtype, h.device, h=h, rows=rows, U=basis)
    if not compiled(h, basis, c):
        if rows is None:
            return c.copy_(reference.project(h, basis, c.dtype))
        return c.copy_(reference.project_difference(h, rows, basis, c.dtype))
    prepared, sums = prepared_basis(basis, h.dtype), scratch(h, basis)
    launch(
        "project", h.device,
        h.data_ptr(), CODES[h.dtype], 0 if rows is None else rows.data_ptr(),
        basis.data_ptr(), CODES[basis.dtype], c.data_ptr(), CODES[c.dtype], c.numel() // k, d, k,
        *addresses(h.device, prepared, sums),
    )  # fmt: skip
    return c


def _back(grad: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of ``project``: ``grad U^T``, which torch's own product does well."""
    wide = torch.promote_types(torch.promote_types(grad.dtype, basis.dtype), dtype)
    return (grad.to(wide) @ basis.to(wide).T).to(dtype)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float, dtype: torch.dtype | None
    ) -> Tensor:
        h = _expand(c, basis, ids, seed, scale, dtype)
        ctx.save_for_backward(basis)
        ctx.dtype = c.dtype
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (basis,) = ctx.saved_tensors
        return project(grads[0].contiguous(), basis, dtype=ctx.dtype), None, None, None, None, None


class _ExpandRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, basis: Tensor, rows: Tensor) -> Tensor:
        h = _expand_rows(c, basis, rows)
        ctx.save_for_backward(basis)
        ctx.dtype = c.dtype
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (basis,) = ctx.saved_tensors
        return project(grads[0].contiguous(), basis, dtype=ctx.dtype), None, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, rows: Tensor | None, basis: Tensor, dtype: torch.dtype | None) -> Tensor:
        c = _project(h, rows, basis, dtype)
        ctx.save_for_backward(basis)
        ctx.dtype = h.dtype
        return c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (basis,) = ctx.saved_tensors
        return _back(grads[0], basis, ctx.dtype), None, None, None


@torch.library.custom_op("agora::expand", mutates_args=())
def _expand_op(
    c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float, dtype: torch.dtype | None = None
) -> Tensor:
    return _expand(c, basis, ids, seed & MASK64, scale, dtype)


@torch.library.custom_op("agora::expand_rows", mutates_args=())
def _expand_rows_op(c: Tensor, basis: Tensor, rows: Tensor) -> Tensor:
    return _expand_rows(c, basis, rows)


@torch.library.custom_op("agora::project", mutates_args=())
def _project_op(dh: Tensor, basis: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return _project(dh, None, basis, dtype)


@torch.library.custom_op("agora::project_difference", mutates_args=())
def _project_difference_op(
    h: Tensor, rows: Tensor, basis: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    return _project(h, rows, basis, dtype)


@_expand_op.register_fake
def _(
    c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float, dtype: torch.dtype | None = None
) -> Tensor:
    return c.new_empty((*c.shape[:-1], basis.shape[0]), dtype=dtype or c.dtype)


@_expand_rows_op.register_fake
def _(c: Tensor, basis: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(rows)


@_project_op.register_fake
def _(dh: Tensor, basis: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return dh.new_empty((*dh.shape[:-1], basis.shape[1]), dtype=dtype or dh.dtype)


@_project_difference_op.register_fake
def _(h: Tensor, rows: Tensor, basis: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return h.new_empty((*h.shape[:-1], basis.shape[1]), dtype=dtype or h.dtype)


def _keep_basis(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype


def _keep_basis_of_difference(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.dtype = inputs[0].dtype


def _expand_backward(ctx: Any, grad: Tensor) -> Any:
    return _project_op(grad.contiguous(), ctx.saved_tensors[0], ctx.dtype), None, None, None, None, None


def _expand_rows_backward(ctx: Any, grad: Tensor) -> Any:
    return _project_op(grad.contiguous(), ctx.saved_tensors[0], ctx.dtype), None, None


def _project_backward(ctx: Any, grad: Tensor) -> Any:
    return _back(grad, ctx.saved_tensors[0], ctx.dtype), None, None


def _project_difference_backward(ctx: Any, grad: Tensor) -> Any:
    return _back(grad, ctx.saved_tensors[0], ctx.dtype), None, None, None


_expand_op.register_autograd(_expand_backward, setup_context=_keep_basis)
_expand_rows_op.register_autograd(_expand_rows_backward, setup_context=_keep_basis)
_project_op.register_autograd(_project_backward, setup_context=_keep_basis)
_project_difference_op.register_autograd(
    _project_difference_backward, setup_context=_keep_basis_of_difference
)


def expand(
    c: Tensor,
    basis: Tensor,
    ids: Tensor,
    seed: int,
    scale: float,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``h = c U^T + scale F[ids]``: ``[..., k]`` to ``[..., d]``; F is made on the way and never stored.

    ``dtype`` of h: c's by default. ``out``: contiguous memory for h, where autograd does not follow.
    Differentiable in ``c``.
    """
    check_seed("seed", seed)
    if out is not None:
        return _expand(c, basis, ids, seed, scale, dtype or dtype_of(out), out)
    if torch.compiler.is_compiling():
        # An operator's integers are signed.
        signed = seed - (1 << 64) if seed >> 63 else seed
        compiled: Tensor = _expand_op(c, basis, ids, signed, scale, dtype)
        return compiled
    result: Tensor = _Expand.apply(c, basis, ids, seed, scale, dtype)  # type: ignore[no-untyped-call]
    return result


def expand_rows(c: Tensor, basis: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``h = c U^T + rows``: ``[..., k]`` to ``[..., d]`` in the dtype of ``rows``.

    ``rows``: the token table's rows for these tokens (``token_table``), made once a microbatch. ``out``:
    contiguous memory for h, where autograd does not follow. Differentiable in ``c``.
    """
    _check_constant(rows)
    if out is not None:
        return _expand_rows(c, basis, rows, out)
    if torch.compiler.is_compiling():
        compiled: Tensor = _expand_rows_op(c, basis, rows)
        return compiled
    result: Tensor = _ExpandRows.apply(c, basis, rows)  # type: ignore[no-untyped-call]
    return result


def project(
    dh: Tensor, basis: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """``dh U``: ``[..., d]`` to ``[..., k]``; ``dtype``: dh's by default. Differentiable in ``dh``.

    ``out``: contiguous memory for the result, where autograd does not follow.
    """
    if out is not None:
        return _project(dh, None, basis, dtype or dtype_of(out), out)
    if torch.compiler.is_compiling():
        compiled: Tensor = _project_op(dh, basis, dtype)
        return compiled
    result: Tensor = _Project.apply(dh, None, basis, dtype)  # type: ignore[no-untyped-call]
    return result


def project_difference(
    h: Tensor, rows: Tensor, basis: Tensor, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """``(h - rows) U``: what of h lies in the subspace once the token table is taken off.

    ``rows``: of h's shape and dtype. The difference is taken in fp32. ``dtype``: h's by default. ``out``:
    contiguous memory for the result, where autograd does not follow. Differentiable in ``h``.
    """
    _check_constant(rows)
    if out is not None:
        return _project(h, rows, basis, dtype or dtype_of(out), out)
    if torch.compiler.is_compiling():
        compiled: Tensor = _project_difference_op(h, rows, basis, dtype)
        return compiled
    result: Tensor = _Project.apply(h, rows, basis, dtype)  # type: ignore[no-untyped-call]
    return result


def subspace_weights(weights: Tensor, basis: Tensor) -> None:
    """``W <- U (U^T W)`` in place: W ``[d, n]`` keeps what of its columns lies in the span of U.

    Sums in fp32. Not differentiable; the tensor's version is bumped, so that a graph that still needs the
    old weights fails loudly.
    """
    check("W", weights, FLOATS)
    if weights.dim() != 2 or 0 in weights.shape:
        raise ValueError(f"W must be a matrix of d rows, not {tuple(weights.shape)}")
    check_basis(weights.T, basis, 0, "W")
    check_apart("W", weights, U=basis)
    d, n = weights.shape
    with torch.no_grad():
        # On a GPU two of torch's products are at the limit already.
        if weights.device.type == "cuda" or not compiled(weights, basis):
            reference.subspace_weights(weights, basis)
            return
        launch(
            "subspace_weights", weights.device,
            weights.data_ptr(), CODES[weights.dtype], basis.data_ptr(), CODES[basis.dtype],
            d, n, basis.shape[1],
        )  # fmt: skip
        torch.autograd.graph.increment_version(weights)
