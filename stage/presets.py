"""Model and training settings that people start from. Torch-free.

``demo`` learns something on a laptop within minutes, ``100m`` is what a CPU still steps in seconds on bytes,
``1b`` and ``8b`` are the reference system's shapes (8b: parameter for parameter).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

from p2p.errors import LocalError
from stage.config import ModelConfig, TrainingConfig

DEMO_LAYERS: Final = 6
"""Layers of the demo's model, however many stages it is cut in (at most as many as layers)."""
DEMO_OPEN_END: Final = 400
"""Length of the schedule where a demo ends by time and not by steps."""

Settings = tuple[ModelConfig, TrainingConfig]


def demo(layers: tuple[int, ...] = (2, 2, 2), steps: int | None = None) -> Settings:
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


def small(layers: tuple[int, ...] = (4, 4, 4), steps: int | None = None) -> Settings:
    """``100m``: 110 million parameters over bytes, 1024 tokens a sequence."""
    model = ModelConfig(
        vocab=256, d=1024, k=20, heads=16, kv_heads=4, head_dim=64, ffn=3072, seq=1024,
        layers=layers, full_rank_tail=True,
    )  # fmt: skip
    return model, _long_run(steps or 5_000, target_batch=64, average_every=5, lr=1e-3, warmup_steps=200)


def billion(layers: tuple[int, ...] = (3, 4, 5), steps: int | None = None) -> Settings:
    """``1b``: width 2048, 12 layers, the vocabulary and the sequence of ``8b``."""
    model = ModelConfig(
        vocab=128_256, d=2048, k=40, heads=16, kv_heads=8, head_dim=128, ffn=8192, seq=4096,
        layers=layers, rope_theta=500_000.0, f_scale=1.0, full_rank_tail=True,
    )  # fmt: skip
    return model, _long_run(steps or 50_000, target_batch=512, average_every=20, lr=3e-4, warmup_steps=2_000)


def reference(layers: tuple[int, ...] = (6, 4, 4, 4, 4, 4, 6), steps: int | None = None) -> Settings:
    """``8b``: 8,632,167,168 trainable parameters, as the reference system's run of that name."""
    model = ModelConfig(
        vocab=128_256, d=5120, k=51, heads=40, kv_heads=8, head_dim=128, ffn=18_432, seq=4096,
        layers=layers, rope_theta=500_000.0, f_scale=1.0, full_rank_tail=True,
    )  # fmt: skip
    total = steps or 154_900
    return model, _long_run(total, target_batch=2048, average_every=20, lr=3e-4, warmup_steps=4_000)


def _long_run(
    total: int, *, target_batch: int, average_every: int, lr: float, warmup_steps: int
) -> TrainingConfig:
    return TrainingConfig(
        seed=secrets.randbits(32),
        target_batch=target_batch,
        average_every=average_every,
        slice_fraction=0.05,
        lr=lr,
        warmup_steps=min(warmup_steps, total),
        total_steps=total,
        min_lr_ratio=0.01,
        eval_every=100,
    )


PRESETS: Final[dict[str, Callable[..., Settings]]] = {
    "demo": demo,
    "100m": small,
    "1b": billion,
    "8b": reference,
}
"""By name. Each takes ``layers``, the layers of every stage, and ``steps``, the schedule's length."""


def preset(name: str, layers: tuple[int, ...] | None = None, steps: int | None = None) -> Settings:
    """The settings of that name, in its own cut or in the given one. Raises LocalError."""
    if name not in PRESETS:
        raise LocalError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name](steps=steps) if layers is None else PRESETS[name](layers, steps)
