"""The trainable tensors of a stage, without torch: names, shapes, places in the flat buffer, FLOPs.

Everything that counts (plans, layouts, genesis, docs) starts from ``parameter_specs``. Layers are named by
their number in the whole model, not in the stage, so that the same run cut differently has the same
weights, as long as the cut leaves them the same shape (``full_rank_tail`` gives the tail's layers another).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any, Final

import attrs

from stage.config import ModelConfig

BLOCK: Final = 256
"""Floats of an averaging block; the flat buffer is a whole number of them."""
ALIGN: Final = 16
"""Floats between possible starts of a tensor: 64 bytes, a cache line and an AVX-512 register."""
OUT_STD: Final = 0.02
"""Small, so that the first loss is that of the uniform distribution."""


@attrs.frozen
class ParameterSpec:
    """One named tensor of a stage and how it starts."""

    name: str
    shape: tuple[int, ...]
    decayed: bool
    std: float
    """Standard deviation at genesis; 0 for norm scales, which start at one."""
    constrained: bool = False
    """Whether the columns of this matrix [d, n] are kept in span(U) by projection."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@attrs.frozen
class Layout:
    """Where each tensor lies in the flat buffer, in floats."""

    specs: tuple[ParameterSpec, ...]
    offsets: tuple[int, ...]
    decayed: int
    """Floats of the leading range that weight decay applies to."""
    size: int
    """Floats in all, a multiple of BLOCK."""
    constrained: tuple[tuple[int, int], ...] = ()
    """Start and end of each matrix that is kept in span(U): together, after all others that decay."""

    @classmethod
    def of(cls, specs: Iterable[ParameterSpec]) -> Layout:
        """Decayed tensors first, of these the constrained ones last, else in the given order."""
        ordered = tuple(sorted(specs, key=lambda spec: (not spec.decayed, spec.constrained)))
        offsets, constrained = [], []
        decayed = position = 0
        for spec in ordered:
            offsets.append(position)
            if spec.constrained:
                constrained.append((position, position + spec.numel))
            position += -(-spec.numel // ALIGN) * ALIGN
            if spec.decayed:
                decayed = position
        size = -(-position // BLOCK) * BLOCK
        return cls(ordered, tuple(offsets), decayed, size, tuple(constrained))

    @property
    def fingerprint(self) -> str:
        """Names, shapes and places in one hash: equal exactly where states are exchangeable."""
        table = [(spec.name, spec.shape, at) for spec, at in zip(self.specs, self.offsets, strict=True)]
        return hashlib.sha256(repr((table, self.size)).encode()).hexdigest()

    def views(self, flat: Any) -> dict[str, Any]:
        """The named tensors inside a flat buffer of this layout."""
        return {
            spec.name: flat[offset : offset + spec.numel].view(spec.shape)
            for spec, offset in zip(self.specs, self.offsets, strict=True)
        }

    def constrained_views(self, flat: Any) -> list[Any]:
        """The constrained matrices [d, n] inside a flat buffer of this layout."""
        constrained = [spec.name for spec in self.specs if spec.constrained]
        views = self.views(flat) if constrained else {}
        return [views[name] for name in constrained]


def is_free(config: ModelConfig, stage: int) -> bool:
    """Whether the stage's layers write where they like, since nothing of theirs crosses a boundary."""
    return config.full_rank_tail and stage == config.stages - 1


def is_wide(config: ModelConfig, stage: int) -> bool:
    """Whether the stage's residual stream is h (T×d) and its output projections are full-size matrices."""
    return config.variant == "constrained" or is_free(config, stage)


def parameter_specs(config: ModelConfig, stage: int) -> tuple[ParameterSpec, ...]:
    """The tensors of a stage: name, shape, whether weight decay applies, spread at genesis.

    The spread sqrt(2/5d) is 0.02 at d = 1024 and keeps narrow models from starting nearly linear
    ("small init", arXiv 1910.05895); branch outputs are scaled down by depth. The norms on what a layer
    reads have no scale of their own: the matrix after them absorbs it.
    """
    d, k, ffn = config.d, config.k, config.ffn
    inner = config.heads * config.head_dim
    qkv = inner + 2 * config.kv_heads * config.head_dim
    std = math.sqrt(2 / (5 * d))
    specs = []
    if stage == 0:
        specs.append(ParameterSpec("embed", (config.vocab, k), True, std))
    writes = ("wo", "w2", d) if is_wide(config, stage) else ("zo", "z2", k)
    constrained = is_wide(config, stage) and not is_free(config, stage)
    for layer in layer_range(config, stage):
        out_std = std / math.sqrt(2 * (layer + 1))
        specs += [
            ParameterSpec(f"layers.{layer}.qkv", (qkv, d), True, std),
            ParameterSpec(f"layers.{layer}.{writes[0]}", (writes[2], inner), True, out_std, constrained),
            ParameterSpec(f"layers.{layer}.gate", (ffn, d), True, std),
            ParameterSpec(f"layers.{layer}.up", (ffn, d), True, std),
            ParameterSpec(f"layers.{layer}.{writes[1]}", (writes[2], ffn), True, out_std, constrained),
        ]
    if stage == config.stages - 1:
        specs.append(ParameterSpec("out", (config.vocab, d), True, OUT_STD))
        specs.append(ParameterSpec("norm_out", (d,), False, 0.0))
    return tuple(specs)


def layer_range(config: ModelConfig, stage: int) -> range:
    """The layers of a stage, by their number in the whole model."""
    first = sum(config.layers[:stage])
    return range(first, first + config.layers[stage])


def parameter_count(config: ModelConfig, stage: int) -> int:
    """Trainable parameters of a stage."""
    return sum(spec.numel for spec in parameter_specs(config, stage))


def forward_flops(config: ModelConfig, stage: int) -> int:
    """Floating-point operations of one sequence's forward pass; a backward pass takes twice as many.

    Two a weight and token (an embedding is looked up, not multiplied) and 4·T·d a token for causal
    attention's two products over the full square, as the reference system counts them.
    """
    weights = sum(spec.numel for spec in parameter_specs(config, stage) if spec.name != "embed")
    attention = 4 * config.layers[stage] * config.heads * config.head_dim * config.seq
    return config.seq * (2 * weights + attention)


def ticket_flops(config: ModelConfig, stage: int, kind: str) -> int:
    """What a stage is credited with for one microbatch: forward for all kinds, and backward for ``train``.

    Recomputation is a worker's own choice against memory and is not counted, as in the reference system's
    points (its FLOPs formula, 9.6: 2N + 4·L·heads·head_dim·T a token, backward twice that).
    """
    return forward_flops(config, stage) * (3 if kind == "train" else 1)


def stream(name: str) -> int:
    """The generator's stream for a tensor of this name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
