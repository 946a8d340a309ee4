"""Weights at step 0, from the run's seed alone: a run starts without a file, all replicas bit-equal.

Each tensor is drawn from its own stream, keyed by its name in the whole model, so a stage builds its
own part without its neighbours', and another cut of the same model starts from the same weights.
"""

from __future__ import annotations

import torch

from stage import kernels, subspace
from stage.config import ModelConfig
from stage.parameters import parameter_specs, stream
from stage.weights import Weights


def fill(weights: Weights, seed: int) -> None:
    """Set the weights to their values at step 0, in place."""
    weights.writable()
    for spec in weights.layout.specs:
        target = weights.named()[spec.name].view(-1)
        place = stream(spec.name), spec.numel, spec.std
        if spec.std == 0.0:
            target.fill_(1.0)
        elif target.dtype is torch.float32:
            kernels.random_normal(seed, *place, out=target)
        else:
            target.copy_(kernels.random_normal(seed, *place))
    weights.refresh()


def genesis(
    config: ModelConfig,
    stage: int,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
    host: bool = False,
) -> Weights:
    """The weights with which this stage starts; for the arguments by name see ``Weights``."""
    specs = parameter_specs(config, stage)
    weights = Weights(specs, device=device, compute_dtype=compute_dtype, host=host)
    fill(weights, seed)
    if weights.layout.constrained:
        U = subspace.basis(config.d, config.k, seed).to(weights.flat.device, weights.flat.dtype)
        subspace.constrain(weights.writable(), weights.layout, U)
        weights.refresh()
    return weights
