"""Model and training settings that people start from. Torch-free."""

from __future__ import annotations

import secrets
from typing import Final

from stage.config import ModelConfig, TrainingConfig

DEMO_LAYERS: Final = 6
"""Layers of the demo's model, however many stages it is cut in (at most as many as layers)."""
DEMO_OPEN_END: Final = 400
"""Length of the schedule where a demo ends by time and not by steps."""


def demo(layers: tuple[int, ...], steps: int | None) -> tuple[ModelConfig, TrainingConfig]:
    """A byte-level model that learns something within minutes on two cores. See docs/benchmarks.md."""
    model = ModelConfig(
        vocab=256, d=128, k=16, heads=2, kv_heads=1, head_dim=64, ffn=256, seq=128,
        layers=layers, rope_theta=100.0, f_scale=3.0,
    )  # fmt: skip
    total = steps or DEMO_OPEN_END
    training = TrainingConfig(
        seed=secrets.randbits(32),
        target_batch=64,
        average_every=2,
        slice_fraction=0.2,
        lr=1.2e-2,
        warmup_steps=min(5, total),
        total_steps=total,
        eval_every=10,
    )
    return model, training
