"""The small pieces of the transformer whose backward pass is written out by hand.

Left to autograd, each norm becomes a dozen passes over a small tensor, and on a CPU their overhead costs
more than the matrix products. Written out, a piece is a handful of in-place operations and keeps only
what its backward pass needs. All work in any float dtype on any device: sums of norms and the state
between layers (c, or h at full width) are fp32 also where matrices and activations are bf16 or fp16.
Tests compare each with autograd in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stage import kernels

THIN = 128
"""Up to this rank the kernels' single pass over h pays: where dtypes differ, and at widths from WIDE on."""
WIDE = 2048
"""Below it, in one dtype, torch's product of a few rows is over before a kernel has laid out U."""
VOCAB_BLOCK = 1 << 14
"""Rows of the output matrix whose gradient exists at a time in the compute dtype."""


def _inverse_rms(x: Tensor, width: int, eps: float, dtype: torch.dtype) -> Tensor:
    """1 / sqrt(‖x‖²/width + ε) over the last dimension, summed in ``dtype``."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(width).add_(eps).rsqrt_()


def _without_mean(dx: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """dx − unit · mean(dx · unit): what is left of a gradient behind an RMS norm, before 1/rms."""
    along = (dx * unit).mean(-1, keepdim=True, dtype=dtype)
    return torch.addcmul(dx, unit, along.to(dx.dtype), value=-1.0)


class ReadNorm(torch.autograd.Function):
    """x = rms(c·Uᵀ + fixed): how a layer reads a residual stream of k numbers a token.

    c [B, T, k] and U [d, k] in the state's dtype, fixed [B, T, d] in that of the result [B, T, d]. Sums over
    k and over d, and so the gradient of c, are in the state's dtype whatever that of the result is.
    """

    @staticmethod
    def forward(ctx: Any, c: Tensor, fixed: Tensor, U: Tensor, eps: float) -> Tensor:
        h = _expand(c, U, fixed)
        inverse = _inverse_rms(h, h.shape[-1], eps, c.dtype)
        x = h.mul_(inverse)
        ctx.save_for_backward(x, inverse, U)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, inverse, U = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        dh = _without_mean(grads[0], x, inverse.dtype)
        return _project(dh, U).mul_(inverse), None, None, None


def _one_pass(U: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels of the boundary take c to h and back, and not a matrix product."""
    d, k = U.shape
    return k <= THIN and (d >= WIDE or dtype != U.dtype)


def _expand(c: Tensor, U: Tensor, rows: Tensor) -> Tensor:
    """c·Uᵀ + rows, in the dtype of ``rows``."""
    if _one_pass(U, rows.dtype):
        return kernels.expand_rows(c.contiguous(), U, rows)
    product = torch.addmm(rows.flatten(0, 1).to(c.dtype), c.flatten(0, 1), U.t())
    return product.view_as(rows).to(rows.dtype)


def _project(dh: Tensor, U: Tensor) -> Tensor:
    """dh·U, in U's dtype."""
    if _one_pass(U, dh.dtype):
        return kernels.project(dh.contiguous(), U, dtype=U.dtype)
    return dh.to(U.dtype) @ U


class ReadWide(torch.autograd.Function):
    """x = rms(h): how a layer reads a residual stream of full width. h [B, T, d] to x in ``dtype``."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        inverse = _inverse_rms(h, h.shape[-1], eps, h.dtype)
        x = (h * inverse).to(dtype)
        ctx.save_for_backward(x, inverse)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, inverse = ctx.saved_tensors
        dh = _without_mean(grads[0], x, inverse.dtype).to(inverse.dtype)
        return dh.mul_(inverse), None, None


class AddUnit(torch.autograd.Function):
    """c + z / sqrt(‖z‖²/d + ε): how a branch writes to the residual stream; d is the full width.

    z comes in the compute dtype, c [.., k] (or h [.., d], at full width) in the state's.
    """

    @staticmethod
    def forward(ctx: Any, c: Tensor, z: Tensor, d: int, eps: float) -> Tensor:
        inverse = _inverse_rms(z, d, eps, c.dtype)
        ctx.save_for_backward(z, inverse)
        ctx.d = d
        return torch.addcmul(c, z.to(c.dtype), inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, inverse = ctx.saved_tensors
        dc = grads[0]
        wide = z.to(dc.dtype)
        along = (dc * wide).sum(-1, keepdim=True).mul_(inverse.square()).div_(ctx.d)
        dz = torch.addcmul(dc, wide, along, value=-1.0).mul_(inverse)
        return dc, dz.to(z.dtype), None, None


class NormRotate(torch.autograd.Function):
    """Parameter-free RMS norm over the last dimension of [B, T, H, hd], then rotary positions.

    Halves are rotated against each other: (a, b) → (a·cos − b·sin, b·cos + a·sin), in the dtype of the
    tables; the result has x's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, x.shape[-1], eps, cos.dtype)
        unit = x * inverse
        ctx.save_for_backward(unit.to(x.dtype), inverse, cos, sin)
        return _rotate(unit, cos, sin, 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        unit, inverse, cos, sin = ctx.saved_tensors
        dunit = _rotate(grads[0].to(cos.dtype), cos, sin, -1.0)
        wide = unit.to(cos.dtype)
        along = (dunit * wide).mean(-1, keepdim=True)
        return dunit.addcmul_(wide, along, value=-1.0).mul_(inverse).to(unit.dtype), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    halves: Tensor = x.unflatten(-1, (2, -1))  # type: ignore[no-untyped-call]
    out = halves * cos.unsqueeze(-2)
    out.select(-2, 0).addcmul_(halves.select(-2, 1), sin, value=-sign)
    out.select(-2, 1).addcmul_(halves.select(-2, 0), sin, value=sign)
    return out.flatten(-2)


class Gate(torch.autograd.Function):
    """silu(a)·b of SwiGLU, keeping a and b alone."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        db = F.silu(a).mul_(grads[0])
        da = torch.ops.aten.silu_backward(grads[0] * b, a)
        return da, db


def output_loss(
    x: Tensor, out: Tensor, targets: Tensor, weights: Tensor, accumulate: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Output matrix and cross-entropy in one, over chunks of tokens: mean loss a row [B], gradient of x.

    x [B, T, d], out [V, d], targets [B, T], weights [B]. With ``accumulate`` [V, d] the gradient of the
    weighted sum of the losses is added to it and that of x is returned; without it only the loss is
    computed. Most ``chunk`` logits exist at a time, in the weights' dtype; neither they nor a gradient of
    out's size is kept: for one 4096-token sequence and 128k words they would take 2.1 and 2.6 GB.
    """
    batch, length, width = x.shape
    tokens, targets = x.reshape(-1, width), targets.reshape(-1)
    per_token = (weights / length).repeat_interleave(length)
    losses = torch.empty(batch * length, dtype=weights.dtype, device=x.device)
    dx = None if accumulate is None else torch.empty_like(tokens)
    rows = max(1, chunk // out.shape[0])
    for start in range(0, batch * length, rows):
        part = slice(start, start + rows)
        logits = (tokens[part] @ out.t()).to(weights.dtype)
        wanted = targets[part, None]
        normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
        losses[part] = (normalizer - logits.gather(1, wanted)).squeeze(1)
        if dx is None or accumulate is None:
            continue
        dlogits = logits.sub_(normalizer).exp_()
        dlogits.scatter_add_(1, wanted, dlogits.new_full(wanted.shape, -1.0))
        low = dlogits.mul_(per_token[part, None]).to(x.dtype)
        torch.mm(low, out, out=dx[part])
        _add_product(accumulate, low, tokens[part])
    return losses.view(batch, length).mean(1), None if dx is None else dx.view_as(x)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += leftᵀ · right, in blocks where the dtypes differ."""
    if into.dtype == left.dtype:
        into.addmm_(left.t(), right)
        return
    for start in range(0, into.shape[0], VOCAB_BLOCK):
        block = slice(start, start + VOCAB_BLOCK)
        into[block] += left[:, block].t() @ right
