"""One pipeline stage of a c-native decoder-only transformer, as plain functions over named tensors.

The residual stream is ``h = c·Uᵀ + F[token]``: U (d×k) orthonormal and the token table F frozen, both
derived from the run's seed, so ``c`` (T×k) is the whole state and the boundary between stages is ``c``
itself. A layer reads h, its branch yields z (T×k), and ``c ← c + z / sqrt(‖z‖²/d + ε)``. Since U is
orthonormal, ‖z·Uᵀ‖ = ‖z‖ and this equals an RMS norm (without scale) of the full-width branch output:
nothing is ever projected, so a wire in fp32 loses nothing.

    head    c = E[token]
    layer   c += unit(attention(rms(h)·g)·Zo),  c += unit(swiglu(rms(h)·g)·Z2)      h from c each time
    tail    loss = cross-entropy(rms(h)·g · Woutᵀ, next token)

Attention is causal, grouped-query, with rotary positions and parameter-free RMS norms on queries and
keys; documents, if given, do not see each other and count positions from their own start. Layers are
named by their number in the whole model, not in the stage, so that the same run cut differently has the
same weights.

Shape suffixes in comments: B microbatches, T tokens, d width, k rank, V vocabulary, H heads.
Sources: Subspace Networks (arXiv 2506.01260) in reparametrised form; RoPE 2104.09864; GQA 2305.13245;
SwiGLU 2002.05202; QK-norm 2010.04245.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from stage import kernels
from stage.config import ModelConfig
from stage.functions import AddUnit, CrossEntropy, NormRotate, ReadNorm
from stage.weights import ParameterSpec

BASIS = 0
"""Version of U; stays 0 while U never moves."""
OUT_STD = 0.02
"""Small, so that the first loss is that of the uniform distribution."""
LOGITS_CHUNK = 1 << 22
"""Most logits (tokens × vocabulary) that exist at a time."""


def parameter_specs(config: ModelConfig, stage: int) -> tuple[ParameterSpec, ...]:
    """The tensors of a stage: name, shape, whether weight decay applies, spread at genesis.

    The spread sqrt(2/5d) is 0.02 at d = 1024 and keeps narrow models from starting nearly linear
    ("small init", arXiv 1910.05895); branch outputs are scaled down by depth.
    """
    d, k, ffn = config.d, config.k, config.ffn
    inner = config.heads * config.head_dim
    qkv = inner + 2 * config.kv_heads * config.head_dim
    std = math.sqrt(2 / (5 * d))
    specs = []
    if stage == 0:
        specs.append(ParameterSpec("embed", (config.vocab, k), True, std))
    first = sum(config.layers[:stage])
    for layer in range(first, first + config.layers[stage]):
        out_std = std / math.sqrt(2 * (layer + 1))
        specs += [
            ParameterSpec(f"layers.{layer}.qkv", (qkv, d), True, std),
            ParameterSpec(f"layers.{layer}.zo", (k, inner), True, out_std),
            ParameterSpec(f"layers.{layer}.gate", (ffn, d), True, std),
            ParameterSpec(f"layers.{layer}.up", (ffn, d), True, std),
            ParameterSpec(f"layers.{layer}.z2", (k, ffn), True, out_std),
            ParameterSpec(f"layers.{layer}.norm_attention", (d,), False, 0.0),
            ParameterSpec(f"layers.{layer}.norm_ffn", (d,), False, 0.0),
        ]
    if stage == config.stages - 1:
        specs.append(ParameterSpec("out", (config.vocab, d), True, OUT_STD))
        specs.append(ParameterSpec("norm_out", (d,), False, 0.0))
    return tuple(specs)


def basis(d: int, k: int, seed: int) -> Tensor:
    """U (d×k, fp64), orthonormal, from the seed: QR with the sign of R's diagonal made positive.

    LAPACKs differ in the last bit of a float64; rounding to fp32 afterwards hides nearly all of that,
    and a last-bit difference of U between nodes is harmless (each node's h is off by 1e-7).
    """
    draw = kernels.random_normal(seed, stream("basis"), d * k, 1.0).double().view(d, k)
    q, r = torch.linalg.qr(draw)
    signed: Tensor = q * torch.sign(torch.diagonal(r))
    return signed


@attrs.frozen
class TailLoss:
    """What the tail stage answers."""

    total: Tensor
    """Weighted sum over the microbatches: backward starts here."""
    losses: Tensor
    """Mean loss of each microbatch in nats a token, [B], detached."""


class Stage:
    """The frozen parts of one stage (U, F, rotary tables) and its forward pass."""

    def __init__(
        self,
        config: ModelConfig,
        stage: int,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.index = stage
        self.seed = seed
        self.is_head = stage == 0
        self.is_tail = stage == config.stages - 1
        self.first_layer = sum(config.layers[:stage])
        self.dtype = dtype
        self.U = basis(config.d, config.k, seed).float().to(dtype).to(device)
        half = torch.arange(config.head_dim // 2, dtype=torch.float64) / (config.head_dim // 2)
        angle = torch.arange(config.seq, dtype=torch.float64)[:, None] * config.rope_theta**-half
        self._cos = angle.cos().to(dtype).to(device)
        self._sin = angle.sin().to(dtype).to(device)

    def forward(
        self,
        leaves: Mapping[str, Tensor],
        ids: Tensor,
        c: Tensor | None = None,
        *,
        docs: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor | TailLoss:
        """One stage's pass over a batch of microbatches.

        ``ids`` [B, T+1] int64; ``c`` [B, T, k] from the stage before, None at the head; ``docs`` [B, T]
        a document number a token; ``weights`` [B] the tickets' weights. The tail answers a TailLoss,
        the others c.
        """
        tokens = ids[:, :-1]
        fixed = self.token_rows(tokens)
        c = leaves["embed"][tokens] if c is None else c
        rotary, mask = self._positions(docs, tokens.shape[1])
        for layer in range(self.first_layer, self.first_layer + self.config.layers[self.index]):
            at = f"layers.{layer}."
            x = self._read(c, fixed, leaves[at + "norm_attention"])
            z = self._attention(x, leaves[at + "qkv"], rotary, mask) @ leaves[at + "zo"].t()
            c = self._write(c, z)
            x = self._read(c, fixed, leaves[at + "norm_ffn"])
            z = (F.silu(x @ leaves[at + "gate"].t()) * (x @ leaves[at + "up"].t())) @ leaves[at + "z2"].t()
            c = self._write(c, z)
        if not self.is_tail:
            return c
        x = self._read(c, fixed, leaves["norm_out"])
        counts = ids.new_ones(ids.shape[0], dtype=self.dtype) if weights is None else weights
        need = torch.is_grad_enabled()
        total, losses = CrossEntropy.apply(x, leaves["out"], ids[:, 1:], counts, need, LOGITS_CHUNK)  # type: ignore[no-untyped-call]
        return TailLoss(total, losses)

    def token_rows(self, tokens: Tensor) -> Tensor:
        """F's rows for these tokens, scaled: the frozen part of h, made once a microbatch. [B, T, d]"""
        config = self.config
        return kernels.token_table(tokens.contiguous(), config.d, self.seed, config.f_scale).to(self.dtype)

    def _read(self, c: Tensor, fixed: Tensor, scale: Tensor) -> Tensor:
        x: Tensor = ReadNorm.apply(c, fixed, self.U, scale, self.config.eps)  # type: ignore[no-untyped-call]
        return x

    def _write(self, c: Tensor, z: Tensor) -> Tensor:
        c_next: Tensor = AddUnit.apply(c, z, self.config.d, self.config.eps)  # type: ignore[no-untyped-call]
        return c_next

    def _attention(
        self, x: Tensor, qkv: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        config = self.config
        batch, length, _ = x.shape
        turned = config.heads + config.kv_heads
        heads = (x @ qkv.t()).view(batch, length, turned + config.kv_heads, config.head_dim)
        qk = NormRotate.apply(heads[:, :, :turned], *rotary, config.eps)  # type: ignore[no-untyped-call]
        qk = qk.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            qk[:, : config.heads],
            qk[:, config.heads :],
            heads[:, :, turned:].transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=config.heads != config.kv_heads,
        )
        return out.transpose(1, 2).flatten(2)

    def _positions(self, docs: Tensor | None, length: int) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Rotary tables ([.., T, 1, hd/2]) and, with documents, the block-diagonal causal mask."""
        if docs is None:
            return (self._cos[:length, None], self._sin[:length, None]), None
        place = torch.arange(length, device=docs.device)
        begins = torch.ones_like(docs, dtype=torch.bool)
        begins[:, 1:] = docs[:, 1:] != docs[:, :-1]
        position = place - torch.where(begins, place, 0).cummax(dim=1).values
        mask = (docs[:, :, None] == docs[:, None, :]) & (place[:, None] >= place)
        rotary = self._cos[position][:, :, None], self._sin[position][:, :, None]
        return rotary, mask[:, None]


def document_index(starts: tuple[int, ...], length: int) -> Tensor:
    """Document number of each of ``length`` tokens, from the places where a new document begins. [T]"""
    docs = torch.zeros(length, dtype=torch.int64)
    for start in starts:
        if 0 < start < length:
            docs[start:] += 1
    return docs


def stream(name: str) -> int:
    """The generator's stream for a tensor of this name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
