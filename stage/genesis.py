"""Weights at step 0, from the run's seed alone: a run starts without a file, all replicas bit-equal.

Each tensor is drawn from its own stream, keyed by its name in the whole model, so a stage builds its
own part without its neighbours', and another cut of the same model starts from the same weights.
"""

from __future__ import annotations

from stage import kernels, subspace
from stage.config import ModelConfig
from stage.parameters import parameter_specs, stream
from stage.weights import Weights


def fill(weights: Weights, seed: int) -> None:
    """Set the weights to their values at step 0."""
    weights.writable()
    for spec in weights.layout.specs:
        target = weights.named()[spec.name]
        if spec.std == 0.0:
            target.fill_(1.0)
        else:
            values = kernels.random_normal(seed, stream(spec.name), spec.numel, spec.std)
            target.copy_(values.view(spec.shape))


def genesis(config: ModelConfig, stage: int, seed: int) -> Weights:
    """The weights with which this stage starts."""
    weights = Weights(parameter_specs(config, stage))
    fill(weights, seed)
    if weights.layout.constrained:
        U = subspace.basis(config.d, config.k, seed).to(weights.flat.dtype)
        subspace.constrain(weights.writable(), weights.layout, U)
    return weights
