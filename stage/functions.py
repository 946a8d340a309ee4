"""The four small pieces of the transformer whose backward pass is written out by hand.

Left to autograd, each norm becomes a dozen passes over a small tensor, and on a CPU their overhead costs
more than the matrix products. Written out, a piece is a handful of in-place operations and keeps only
what its backward pass needs. All work in any float dtype on any device; tests compare each with autograd
in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ReadNorm(torch.autograd.Function):
    """x = rms(h)·g with h = c·Uᵀ + fixed: how a layer reads the residual stream. Returns [B, T, d]."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, fixed: Tensor, U: Tensor, g: Tensor, eps: float) -> Tensor:
        h = torch.addmm(fixed.flatten(0, 1), c.flatten(0, 1), U.t())
        inverse = h.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        h *= inverse
        ctx.save_for_backward(h, inverse, U, g)
        return (h * g).view_as(fixed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, None]:
        unit, inverse, U, g = ctx.saved_tensors
        dx = grads[0].flatten(0, 1)
        product = dx * unit
        dg = product.sum(0)
        dc = None
        if ctx.needs_input_grad[0]:
            along = product.mul_(g).mean(-1, keepdim=True)
            dh = torch.addcmul(dx * g, unit, along, value=-1.0).mul_(inverse)
            dc = (dh @ U).view(*grads[0].shape[:-1], U.shape[1])
        return dc, None, None, dg, None


class AddUnit(torch.autograd.Function):
    """c + z / sqrt(‖z‖²/d + ε): how a branch writes to the residual stream; d is the full width."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, z: Tensor, d: int, eps: float) -> Tensor:
        inverse = z.square().sum(-1, keepdim=True).div_(d).add_(eps).rsqrt_()
        ctx.save_for_backward(z, inverse)
        ctx.d = d
        return torch.addcmul(c, z, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, inverse = ctx.saved_tensors
        dc = grads[0]
        along = (dc * z).sum(-1, keepdim=True).mul_(inverse.square()).div_(ctx.d)
        dz = torch.addcmul(dc, z, along, value=-1.0).mul_(inverse)
        return dc, dz, None, None


class NormRotate(torch.autograd.Function):
    """Parameter-free RMS norm over the last dimension of [B, T, H, hd], then rotary positions.

    Halves are rotated against each other: (a, b) → (a·cos − b·sin, b·cos + a·sin).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, cos, sin)
        return _rotate(unit, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        unit, inverse, cos, sin = ctx.saved_tensors
        dunit = _rotate(grads[0], cos, sin, -1.0)
        along = (dunit * unit).mean(-1, keepdim=True)
        return dunit.addcmul_(unit, along, value=-1.0).mul_(inverse), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = out.chunk(2, dim=-1)
    torch.mul(low, cos, out=first).addcmul_(high, sin, value=-sign)
    torch.mul(high, cos, out=second).addcmul_(low, sin, value=sign)
    return out


class CrossEntropy(torch.autograd.Function):
    """Output matrix and cross-entropy in one, over chunks of tokens: (weighted sum, mean loss a row).

    The gradient of a chunk is made in the forward pass while its logits exist, so neither the logits
    nor their softmax are kept: 2.1 GB for one 4096-token sequence with a vocabulary of 128k. With
    ``need`` False only the loss is computed.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, out: Tensor, targets: Tensor, weights: Tensor, need: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        tokens, targets = x.reshape(-1, width), targets.reshape(-1)
        per_token = (weights / length).repeat_interleave(length)
        losses = torch.empty(batch * length, dtype=x.dtype, device=x.device)
        dx = torch.empty_like(tokens) if need else None
        dout = torch.zeros_like(out) if need else None
        rows = max(1, chunk // out.shape[0])
        for start in range(0, batch * length, rows):
            part = slice(start, start + rows)
            logits = tokens[part] @ out.t()
            wanted = targets[part, None]
            normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses[part] = (normalizer - logits.gather(1, wanted)).squeeze(1)
            if dx is not None and dout is not None:
                dlogits = logits.sub_(normalizer).exp_()
                dlogits.scatter_add_(1, wanted, dlogits.new_full(wanted.shape, -1.0))
                dlogits *= per_token[part, None]
                torch.mm(dlogits, out, out=dx[part])
                dout.addmm_(dlogits.t(), tokens[part])
        if dx is not None and dout is not None:
            ctx.save_for_backward(dx.view_as(x), dout)
        mean = losses.view(batch, length).mean(1)
        ctx.mark_non_differentiable(mean)
        return (mean * weights).sum(), mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        dx, dout = ctx.saved_tensors
        return dx * grads[0], dout * grads[0], None, None, None, None
