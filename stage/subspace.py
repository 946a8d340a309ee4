"""The subspace that boundaries travel in: its basis U, weights that are kept in it, and how it may move.

Two forms of one model (``ModelConfig.variant``). *subspace*: a branch writes Z (k×n) and U is applied when
somebody reads, so nothing can leave span(U). *constrained*, the paper's: ``wo`` and ``w2`` are full-size
(d×n) matrices whose outputs are kept in span(U), the residual stream is h, and a boundary is the projection
c = (h - F[token])·U, which loses nothing because h - F[token] lies in span(U). To keep it there:

- AdamW with one second moment an input feature, the mean over the d outputs of the squared gradient: each
  column of an update is then scaled as a whole, and cannot be turned out of span(U) by its preconditioner.
- W <- U·U^T·W after every step and merge. Gradients of matrices that are not the last before a boundary do
  leave span(U), and so does a slice that replaces single elements.
- No norm scale behind such a matrix: diag(g)·U·z is not in span(U).

The token table's trainable part is E·U^T with E (V×k) in both forms.

The basis may move (``Window``, ``switch``): the receiver behind the last boundary sees the gradient G of h
before it is projected. C = sum of G^T·G over a window; the mass that a boundary passes is tr(U^T·C·U), whose
gradient on the Grassmann manifold is D = (I - U·U^T)·C·U, and U' = qr(U + eta·D / tr C).Q. Everybody switches
at the same step, projecting weights and first moments on the new span, and every request names the version of
U that its c is in. In a live run U stays at version 0; chains in one process use the rest.

Sources: Protocol Models, arXiv 2506.01260; the Grassmann step is our reconstruction of the paper's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from p2p.errors import LocalError
from stage import kernels
from stage.messages import BASIS
from stage.moments import FullMoments
from stage.parameters import Layout, stream

if TYPE_CHECKING:
    from stage.optimizer import Optimizer


@attrs.frozen(eq=False)
class Basis:
    """U (d×k), orthonormal, fp64 unless converted, and its version: what a boundary has to agree on."""

    U: Tensor
    version: int = BASIS

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Basis:
        """The same in another dtype, on a device."""
        return Basis(self.U.to(device, dtype), self.version)


def basis(d: int, k: int, seed: int) -> Tensor:
    """U (d×k, fp64), orthonormal, from the seed: QR with the sign of R's diagonal made positive.

    LAPACKs differ in the last bit of a float64; rounding to fp32 afterwards hides nearly all of that,
    and a last-bit difference of U between nodes is harmless (each node's h is off by 1e-7).
    """
    return _orthonormal(kernels.random_normal(seed, stream("basis"), d * k, 1.0).double().view(d, k))


def _orthonormal(columns: Tensor) -> Tensor:
    q, r = torch.linalg.qr(columns)
    signed: Tensor = (q * torch.sign(torch.diagonal(r))).contiguous()
    return signed


def outside(x: Tensor, U: Tensor) -> float:
    """The share of the columns of x [d, n] that is not in span(U): ‖x - U·U^T·x‖ / ‖x‖."""
    return float((x - U @ (U.t() @ x)).norm() / x.norm())


def constrain(flat: Tensor, layout: Layout, U: Tensor) -> None:
    """Project every constrained matrix of a flat vector (weights or first moments) on span(U), in place."""
    for matrix in layout.constrained_views(flat):
        kernels.subspace_weights(matrix, U)


@torch.no_grad()
def adamw_columns(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    U: Tensor,
    *,
    updates: int,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """AdamW on one constrained matrix [d, n], in place, then its projection on span(U).

    The second moment is the same number in a whole column: the mean of the d squared gradients.
    ``updates`` counts those before this one. No temporary is larger than a row.
    """
    d = weights.shape[0]
    square = torch.linalg.vector_norm(gradient, dim=0).square_().div_(d)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).add_(square, alpha=1 - beta2)
    second = exp_avg_sq[0] / (1 - beta2 ** (updates + 1))
    scale = (lr / (1 - beta1 ** (updates + 1))) / second.sqrt_().add_(eps)
    weights.mul_(1 - lr * weight_decay).addcmul_(exp_avg, scale, value=-1.0)
    kernels.subspace_weights(weights, U)


class Window:
    """Gradients of h behind the last boundary, gathered over some steps: C = sum of G^T·G, d×d in fp32."""

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.mass = torch.zeros(d, d, device=device)

    def add(self, gradient: Tensor) -> None:
        """G [.., d]; a hook for h."""
        rows = gradient.detach().flatten(0, -2).to(self.mass.dtype)
        self.mass.addmm_(rows.t(), rows)

    def passed(self, U: Tensor) -> float:
        """The share of the gradient's mass that a boundary in this basis passes, 0 to 1."""
        mass, low = self.mass.double(), U.double()
        return float(torch.trace(low.t() @ mass @ low) / torch.trace(mass))

    def moved(self, current: Basis, eta: float) -> Basis:
        """The basis one Grassmann step on, fp64, one version up. Raises LocalError if nothing was gathered.

        ``eta`` has no unit: C is divided by its trace.
        """
        mass, U = self.mass.double(), current.U.double()
        total = torch.trace(mass)
        if not bool(torch.isfinite(total)) or float(total) <= 0:
            raise LocalError("subspace: no finite gradient was gathered, so the basis has nowhere to move")
        toward = mass @ U
        tangent = toward - U @ (U.t() @ toward)
        return Basis(_orthonormal(U + (eta / total) * tangent), current.version + 1)


@torch.no_grad()
def switch(optimizer: Optimizer, old: Tensor, new: Tensor) -> None:
    """Take a stage's state from one span to another: weights, first moments, the trainable token part.

    Second moments stay: they are a scale a column, whatever the columns' directions. Ask
    ``weights.can_write`` first.
    """
    weights, moments = optimizer.weights, optimizer.writable_moments()
    if not isinstance(moments, FullMoments):
        raise LocalError(
            "subspace: the basis moves only where moments are fp32 (compute.optimizer = 'device')"
        )
    layout, turn = weights.layout, old.t() @ new
    for vector in (weights.writable(), moments.exp_avg):
        constrain(vector, layout, new)
        named = layout.views(vector)
        if "embed" in named:
            named["embed"].copy_(named["embed"] @ turn)
    weights.refresh()
    optimizer.basis = new
