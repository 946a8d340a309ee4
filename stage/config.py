"""What is trained and how: the ``[model]`` and ``[training]`` sections of a run manifest.

Frozen values, checked when they are made, so that nothing downstream meets an impossible shape. Kept
apart from the code that uses them because trainers, seeds and authorities read manifests too and must
not import torch. A violated rule raises ``LocalError`` with one sentence that names the setting.

Shape rules: ``d`` a multiple of 4 (the token table is generated in groups of four), ``k <= d``,
``heads * head_dim == d``, ``kv_heads`` divides ``heads``, ``head_dim`` even (rotary pairs), at least
one layer a stage. Upper bounds are generous and keep a hostile manifest from asking for a petabyte.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

import attrs

from p2p.errors import LocalError

WireDtype = Literal["fp32", "bf16", "int8"]

_MODEL_BOUNDS: Final = {
    "vocab": (2, 1 << 24),
    "d": (4, 1 << 16),
    "k": (1, 1 << 16),
    "heads": (1, 1 << 12),
    "kv_heads": (1, 1 << 12),
    "head_dim": (2, 1 << 12),
    "ffn": (1, 1 << 20),
    "seq": (1, 1 << 20),
    "rope_theta": (1.0, 1e12),
    "eps": (0.0, 1.0),
    "f_scale": (0.0, 1e3),
}
_TRAINING_BOUNDS: Final = {
    "seed": (0, (1 << 63) - 1),
    "target_batch": (1, 1 << 24),
    "min_step_samples": (1, 1 << 24),
    "average_every": (1, 1 << 20),
    "slice_fraction": (0.001, 1.0),
    "powersgd_rank": (1, 1 << 12),
    "max_stale_steps": (1, 1 << 20),
    "warm_steps": (0, 1 << 20),
    "lr": (0.0, 100.0),
    "warmup_steps": (0, 1 << 40),
    "total_steps": (1, 1 << 40),
    "min_lr_ratio": (0.0, 1.0),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "weight_decay": (0.0, 10.0),
    "max_norm": (0.0, 1e9),
    "eval_every": (0, 1 << 40),
}
MAX_STAGES: Final = 256
SLOTS: Final = 32
"""Microbatches that a worker takes at a time where nobody says otherwise: over long lines most of them are on
their way, and trainers send no more than keeps everybody busy (``stage.credits``)."""
_MAX_LAYERS: Final = 4096


@attrs.frozen(kw_only=True)
class ModelConfig:
    """Shape of the whole model and its cut into stages."""

    vocab: int = 256
    d: int
    """Width of the residual stream."""
    k: int
    """Numbers a token that cross a stage boundary."""
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    seq: int
    """Tokens of a training sequence (T); rows carry T+1 ids."""
    layers: tuple[int, ...]
    """Layers of each stage, head first."""
    rope_theta: float = 10000.0
    eps: float = 1e-5
    f_scale: float = 3.0
    """Scale of the frozen token table F: it has to be heard among the branches. Measured."""
    variant: Literal["subspace", "constrained"] = "subspace"
    """How what a layer writes is kept in span(U): by form, or by projection. See ``stage.subspace``."""
    full_rank_tail: bool = False
    """Whether the tail's layers write full vectors: nothing of theirs crosses a boundary."""

    @property
    def stages(self) -> int:
        """Number of pipeline stages."""
        return len(self.layers)

    def __attrs_post_init__(self) -> None:
        _check_bounds("model", self, _MODEL_BOUNDS)
        if not 1 <= len(self.layers) <= MAX_STAGES:
            raise LocalError(f"model.layers names {len(self.layers)} stages; 1 to {MAX_STAGES} are possible")
        if min(self.layers) < 1 or sum(self.layers) > _MAX_LAYERS:
            raise LocalError(
                f"model.layers = {list(self.layers)}: every stage needs at least one layer, "
                f"and all together at most {_MAX_LAYERS}"
            )
        if self.d % 4:
            raise LocalError(f"model.d = {self.d} must be a multiple of 4")
        if self.k > self.d:
            raise LocalError(f"model.k = {self.k} must not exceed model.d = {self.d}")
        if self.head_dim % 2:
            raise LocalError(f"model.head_dim = {self.head_dim} must be even (rotary pairs)")
        if self.heads * self.head_dim != self.d:
            raise LocalError(
                f"model.heads × model.head_dim = {self.heads} × {self.head_dim} = "
                f"{self.heads * self.head_dim} must equal model.d = {self.d}"
            )
        if self.heads % self.kv_heads:
            raise LocalError(f"model.kv_heads = {self.kv_heads} must divide model.heads = {self.heads}")


@attrs.frozen(kw_only=True)
class TrainingConfig:
    """How the model is trained; interface names, see ``docs/architecture.md``."""

    seed: int
    """Genesis weights, token table, basis, slice permutations and data order all follow from it."""
    target_batch: int = 16
    """Samples (sequences) that advance the run's step clock by one."""
    min_step_samples: int = 1
    """With fewer samples a replica carries its gradient over to the next step."""
    average_every: int = 2
    """Steps between two averaging rounds."""
    slice_fraction: float = 0.05
    """Share of a stage's weights that one round averages."""
    merge: Literal["delta", "ema", "overwrite"] = "delta"
    """How an average comes into weights that have moved on meanwhile; see ``stage.merging``."""
    max_stale_steps: int = 5
    """A replica further behind the step clock than this goes back to SYNCING."""
    warm_steps: int = 2
    """Steps with averaging weight 0 after SYNCING."""
    wire_dtype: WireDtype = "fp32"
    """Of the boundary c, forward."""
    wire_dtype_backward: WireDtype = "fp32"
    averaging: Literal["sparta", "powersgd"] = "sparta"
    """What keeps the replicas of a stage together: slices of weights, or gradients as well, every step."""
    powersgd_rank: int = 64
    """Columns of a matrix's factors, where ``averaging = "powersgd"``; see ``stage.powersgd``."""
    robust: Literal["none", "clip", "trimmed", "centered-clip"] = "none"
    lr: float = 3e-3
    warmup_steps: int = 5
    total_steps: int = 1000
    """The schedule's length; training may go on at ``min_lr_ratio`` after it."""
    min_lr_ratio: float = 0.1
    schedule: Literal["linear", "cosine"] = "linear"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    max_norm: float = 1.0
    """Bound of the global gradient norm."""
    eval_every: int = 10
    """Steps between two evaluations; 0 means never."""

    @property
    def slices(self) -> int:
        """Number of disjoint slices that together are all weights of a stage."""
        return max(1, round(1 / self.slice_fraction))

    def __attrs_post_init__(self) -> None:
        _check_bounds("training", self, _TRAINING_BOUNDS)
        if self.warmup_steps > self.total_steps:
            raise LocalError(
                f"training.warmup_steps = {self.warmup_steps} must not exceed "
                f"training.total_steps = {self.total_steps}"
            )
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1.0:
                raise LocalError(f"training.{name} must be below 1")


def split_layers(total: int, stages: int) -> tuple[int, ...]:
    """Cut ``total`` layers in ``stages`` as evenly as possible, the spare ones in the middle.

    The middle, since head and tail also carry the embedding and the output matrix.
    """
    if stages < 1 or stages > total:
        raise LocalError(f"{total} layers cannot be cut in {stages} stages; name at most {total}")
    base, spare = divmod(total, stages)
    first = (stages - spare) // 2
    return tuple(base + (first <= stage < first + spare) for stage in range(stages))


def _check_bounds(section: str, config: Any, bounds: dict[str, tuple[float, float]]) -> None:
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not math.isfinite(value) or not low <= value <= high:
            raise LocalError(f"{section}.{name} = {value} must be between {low} and {high}")
