"""The learning rate as a function of the run's step: linear warm-up, decay, floor. Torch-free.

It depends on the step clock alone, so every replica of every stage uses the same rate at the same step,
whenever it joined.
"""

from __future__ import annotations

import math

from stage.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of the update that leads to ``step`` (the first one is step 1)."""
    if step < config.warmup_steps:
        return config.lr * max(step, 1) / config.warmup_steps
    span = config.total_steps - config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / span) if span else 1.0
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)
