"""AdamW over the flat weights of a stage, driven by the run's step clock.

When the clock advances a replica takes one step of its own with the mean of its own accumulated
gradient; replicas are kept together by averaging weights, not gradients. The global norm would need all
stages, so each stage clips to its share of it, ``max_norm / sqrt(stages)``: if all shares are met, so is
the whole. With fewer than ``min_step_samples`` the gradient is carried over to the next step; with none
nothing is touched and only the number advances. A gradient that is not finite is thrown away.

Moments lie in two flat buffers like the weights, so a snapshot is three vectors. ``hold()`` lets a
writer read them while training goes on: a step that meets a hold works on a copy. Bias correction counts
the updates that were made, not the steps of the run.

Not thread-safe, like ``Weights``. Sources: AdamW, arXiv 1711.05101; 1/sqrt(stages) as in production at
Pluralis (reference: papers.md, summary 8).
"""

from __future__ import annotations

import math
from typing import Literal

import attrs
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from p2p.errors import LocalError
from p2p.event import Emit, ignore
from stage import subspace
from stage.config import TrainingConfig
from stage.events import BadGradient
from stage.schedule import learning_rate
from stage.weights import Version, Weights

EPS = 1e-8


@attrs.frozen
class StepTaken:
    """What became of the accumulated gradient."""

    step: int
    outcome: Literal["updated", "carried", "empty", "not finite"]
    samples: int
    """Samples that left the accumulator, by an update or as garbage; 0 if carried over."""
    lr: float = 0.0
    norm: float = 0.0
    """Of the mean gradient, before clipping."""


@attrs.frozen
class Held:
    """Weights and moments as they were, until ``release()``; for a snapshot writer."""

    flat: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    updates: int
    fingerprint: str
    _version: Version
    _optimizer: Optimizer

    def release(self) -> None:
        """Call once, from the thread that owns the optimizer."""
        self._version.release()
        self._optimizer._release(self.exp_avg)


class Optimizer:
    """See the head of this file."""

    def __init__(
        self,
        weights: Weights,
        config: TrainingConfig,
        *,
        stage: int = 0,
        stages: int = 1,
        basis: Tensor | None = None,
        emit: Emit = ignore,
    ) -> None:
        self.weights = weights
        self.config = config
        self.stage = stage
        self.max_norm = config.max_norm / math.sqrt(stages)
        self.basis = basis
        """U (d×k), where the stage has matrices that are kept in its span."""
        if weights.layout.constrained and basis is None:
            raise LocalError("optimizer: constrained matrices need the basis that they are kept in")
        self.emit = emit
        self.exp_avg = torch.zeros_like(weights.flat)
        self.exp_avg_sq = torch.zeros_like(weights.flat)
        self.updates = 0
        """Updates made so far: Adam's own count, part of the state."""
        self._holds = 0

    def step(self, step: int, samples: int) -> StepTaken:
        """The clock reached ``step`` with ``samples`` gradients in the accumulator.

        Ask ``weights.can_write`` first; this raises LocalError when no version may be made.
        """
        if samples == 0:
            return StepTaken(step, "empty", 0)
        if samples < self.config.min_step_samples:
            return StepTaken(step, "carried", 0)
        gradient = self.weights.gradient
        norm = float(torch.linalg.vector_norm(gradient)) / samples
        if not math.isfinite(norm):
            self.weights.zero_gradient()
            self.emit(BadGradient(stage=self.stage, step=step, samples=samples))
            return StepTaken(step, "not finite", samples)
        lr = learning_rate(step, self.config)
        flat = self.weights.writable()
        clip = min(1.0, self.max_norm / norm) if self.max_norm and norm else 1.0
        gradient.mul_(clip / samples)
        self._update(flat, lr)
        self.weights.zero_gradient()
        return StepTaken(step, "updated", samples, lr, norm)

    def _update(self, flat: Tensor, lr: float) -> None:
        if self._holds:
            self.exp_avg, self.exp_avg_sq = self.exp_avg.clone(), self.exp_avg_sq.clone()
            self._holds = 0
        layout, config = self.weights.layout, self.config
        constrained = layout.constrained[0][0] if layout.constrained else layout.decayed
        with torch.no_grad():
            for part, decay in (
                (slice(0, constrained), config.weight_decay),
                (slice(layout.decayed, None), 0.0),
            ):
                adamw(
                    [flat[part]],
                    [self.weights.gradient[part]],
                    [self.exp_avg[part]],
                    [self.exp_avg_sq[part]],
                    [],
                    [torch.tensor(float(self.updates), device=flat.device)],
                    fused=True,
                    amsgrad=False,
                    beta1=config.beta1,
                    beta2=config.beta2,
                    lr=lr,
                    weight_decay=decay,
                    eps=EPS,
                    maximize=False,
                )
        self._update_constrained(flat, lr)
        self.updates += 1

    def _update_constrained(self, flat: Tensor, lr: float) -> None:
        config = self.config
        vectors = (flat, self.weights.gradient, self.exp_avg, self.exp_avg_sq)
        for matrices in zip(*map(self.weights.layout.constrained_views, vectors), strict=True):
            assert self.basis is not None
            subspace.adamw_columns(
                *matrices, self.basis, updates=self.updates, lr=lr, beta1=config.beta1, beta2=config.beta2,
                weight_decay=config.weight_decay, eps=EPS,
            )  # fmt: skip

    def constrain(self) -> None:
        """Bring the weights back into span(U) after somebody else changed single elements of them."""
        if self.basis is not None and self.weights.layout.constrained:
            subspace.constrain(self.weights.writable(), self.weights.layout, self.basis)

    def hold(self, step: int) -> Held:
        """Keep the whole state, which is that of ``step``, for a reader; a copy is made if a step comes."""
        self._holds += 1
        version = self.weights.begin()
        return Held(
            version.flat,
            self.exp_avg,
            self.exp_avg_sq,
            step,
            self.updates,
            self.weights.layout.fingerprint,
            version,
            self,
        )

    def _release(self, exp_avg: Tensor) -> None:
        if exp_avg is self.exp_avg and self._holds:
            self._holds -= 1

    def load(
        self,
        flat: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        updates: int,
        fingerprint: str | None = None,
    ) -> None:
        """Take over a whole state: a snapshot's or a donor's. Raises LocalError if it does not fit."""
        if fingerprint is not None and fingerprint != self.weights.layout.fingerprint:
            raise LocalError("state: it is of another stage or another model")
        for name, tensor in (("weights", flat), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            if tensor.shape != self.exp_avg.shape or not bool(torch.isfinite(tensor).all()):
                raise LocalError(f"state: {name} has the wrong size for this stage or is not finite")
        self.weights.writable().copy_(flat)
        self.exp_avg, self.exp_avg_sq, self._holds = exp_avg.clone(), exp_avg_sq.clone(), 0
        self.updates = updates
