"""``expand`` (c to h) and ``project`` (dh to dc): fronts, autograd and the operators of ``torch.library``.

Called from here in eager mode they skip the dispatcher's Python layers, which would cost more than a small
microbatch's work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stage.kernels import reference
from stage.kernels.checks import MASK64, check, check_scale, check_seed
from stage.kernels.generator import MAX_D
from stage.kernels.launch import CODES, compiled, launch

_MAX_K = 1024
_FLOATS = (torch.float32, torch.bfloat16, torch.float64)


def _check_basis(x: Tensor, basis: object, columns: int, name: str) -> None:
    check("U", basis, _FLOATS, x.device)
    assert isinstance(basis, Tensor)
    if basis.dim() != 2 or 0 in basis.shape:
        raise ValueError(f"U must be a matrix of d rows and k columns, not {tuple(basis.shape)}")
    d, k = basis.shape
    if d > MAX_D or k > _MAX_K:
        raise ValueError(f"U of {d} x {k} is beyond the limits d <= {MAX_D}, k <= {_MAX_K}")
    if x.dim() < 1 or x.shape[-1] != basis.shape[columns]:
        raise ValueError(f"{name} of shape {tuple(x.shape)} does not fit U of shape {(d, k)}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty: shape {tuple(x.shape)}")


def _check_expand(c: Tensor, basis: Tensor, ids: Tensor, scale: float) -> None:
    check("c", c, _FLOATS)
    _check_basis(c, basis, 1, "c")
    check("ids", ids, (torch.int64,), c.device)
    if ids.shape != c.shape[:-1]:
        raise ValueError(f"ids of shape {tuple(ids.shape)} do not fit c of shape {tuple(c.shape)}")
    check_scale("scale", scale)


def _check_project(dh: Tensor, basis: Tensor) -> None:
    check("dh", dh, _FLOATS)
    _check_basis(dh, basis, 0, "dh")


def _expand(c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
    _check_expand(c, basis, ids, scale)
    if not compiled(c, basis):
        return reference.expand(c, basis, ids, seed, scale)
    d, k = basis.shape
    h = torch.empty((*c.shape[:-1], d), dtype=c.dtype, device=c.device)
    launch(
        "expand", c.device,
        c.data_ptr(), CODES[c.dtype], basis.data_ptr(), CODES[basis.dtype], ids.data_ptr(),
        h.data_ptr(), CODES[h.dtype], ids.numel(), d, k, seed, scale * reference.UNIT,
    )  # fmt: skip
    return h


def _project(dh: Tensor, basis: Tensor) -> Tensor:
    _check_project(dh, basis)
    if not compiled(dh, basis):
        return reference.project(dh, basis)
    d, k = basis.shape
    out = torch.empty((*dh.shape[:-1], k), dtype=dh.dtype, device=dh.device)
    launch(
        "project", dh.device,
        dh.data_ptr(), CODES[dh.dtype], basis.data_ptr(), CODES[basis.dtype],
        out.data_ptr(), CODES[out.dtype], out.numel() // k, d, k,
    )  # fmt: skip
    return out


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
        ctx.save_for_backward(basis)
        return _expand(c, basis, ids, seed, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (basis,) = ctx.saved_tensors
        return project(grads[0].contiguous(), basis), None, None, None, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dh: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return _project(dh, basis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (basis,) = ctx.saved_tensors
        return grads[0] @ basis.to(grads[0].dtype).T, None


@torch.library.custom_op("agora::expand", mutates_args=())
def _expand_op(c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
    return _expand(c, basis, ids, seed & MASK64, scale)


@torch.library.custom_op("agora::project", mutates_args=())
def _project_op(dh: Tensor, basis: Tensor) -> Tensor:
    return _project(dh, basis)


@_expand_op.register_fake
def _(c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
    return c.new_empty((*c.shape[:-1], basis.shape[0]))


@_project_op.register_fake
def _(dh: Tensor, basis: Tensor) -> Tensor:
    return dh.new_empty((*dh.shape[:-1], basis.shape[1]))


def _keep_basis(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _expand_backward(ctx: Any, grad: Tensor) -> Any:
    return _project_op(grad.contiguous(), ctx.saved_tensors[0]), None, None, None, None


def _project_backward(ctx: Any, grad: Tensor) -> Any:
    return grad @ ctx.saved_tensors[0].to(grad.dtype).T, None


_expand_op.register_autograd(_expand_backward, setup_context=_keep_basis)
_project_op.register_autograd(_project_backward, setup_context=_keep_basis)


def expand(c: Tensor, basis: Tensor, ids: Tensor, seed: int, scale: float) -> Tensor:
    """``h = c U^T + scale F[ids]``: ``[..., k]`` to ``[..., d]`` in c's dtype, summed in fp32.

    Differentiable in ``c``; U is a constant of the run and gets no gradient.
    """
    check_seed("seed", seed)
    if torch.compiler.is_compiling():
        # An operator's integers are signed.
        signed = seed - (1 << 64) if seed >> 63 else seed
        compiled: Tensor = _expand_op(c, basis, ids, signed, scale)
        return compiled
    result: Tensor = _Expand.apply(c, basis, ids, seed, scale)  # type: ignore[no-untyped-call]
    return result


def project(dh: Tensor, basis: Tensor) -> Tensor:
    """``dh U``: ``[..., d]`` to ``[..., k]`` in dh's dtype, summed in fp32. Differentiable in ``dh``."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _project_op(dh, basis)
        return compiled
    result: Tensor = _Project.apply(dh, basis)  # type: ignore[no-untyped-call]
    return result
