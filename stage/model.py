"""One pipeline stage of a c-native decoder-only transformer, as plain functions over named tensors.

The residual stream is ``h = c·Uᵀ + F[token]``: U (d×k) orthonormal and the token table F frozen, both
derived from the run's seed, so ``c`` (T×k) is the whole state and the boundary between stages is ``c``
itself. A layer reads h, its branch yields z (T×k), and ``c ← c + z / sqrt(‖z‖²/d + ε)``. Since U is
orthonormal, ‖z·Uᵀ‖ = ‖z‖ and this equals an RMS norm (without scale) of the full-width branch output:
nothing is ever projected, so a wire in fp32 loses nothing.

    head    c = E[token]
    layer   c += unit(attention(rms(h))·Zo),  c += unit(swiglu(rms(h))·Z2)      h from c each time
    tail    loss = cross-entropy(rms(h)·g · Woutᵀ, next token)

Nothing leaves the tail, so its layers need not write into span(U): with ``full_rank_tail`` its residual
stream is h itself (T×d) and its output projections are full matrices, h += unit(branch·Wᵀ). In the
``constrained`` variant all stages are like that, their matrices kept in span(U) by the optimizer, and a
boundary is c = (h − F[token])·U; see ``stage.subspace``.

Attention is causal, grouped-query, with rotary positions and parameter-free RMS norms on queries and
keys; documents, if given, do not see each other and count positions from their own start.

Shape suffixes in comments: B microbatches, T tokens, d width, k rank, V vocabulary, H heads.
Sources: Subspace Networks (arXiv 2506.01260) in reparametrised form; RoPE 2104.09864; GQA 2305.13245;
SwiGLU 2002.05202; QK-norm 2010.04245.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor
from torch.nn import functional as F

from stage import kernels
from stage.config import ModelConfig
from stage.functions import AddUnit, Gate, NormRotate, ReadNorm, ReadWide, output_loss
from stage.parameters import is_wide, layer_range
from stage.subspace import Basis, Window, basis

LOGITS_CHUNK = 1 << 26
"""Most logits (tokens × vocabulary) that exist at a time: 268 MB in fp32."""


class TailLoss:
    """What the tail stage answers: the losses, and the start of the backward pass.

    The output matrix, the loss and both gradients are one fused pass, which runs when the microbatch is
    committed: a forward pass ends at x, so that nothing of the size of the logits is kept in between and no
    product is computed twice. ``losses`` [B] is the mean of each microbatch in nats a token.
    """

    def __init__(self, x: Tensor, out: Tensor, targets: Tensor, weights: Tensor) -> None:
        self.x = x
        self._out = out
        self._targets = targets
        self._weights = weights
        self._losses: Tensor | None = None

    @property
    def losses(self) -> Tensor:
        """Mean loss of each microbatch, computed alone if ``backward`` did not run."""
        if self._losses is None:
            with torch.no_grad():
                self._losses, _ = self._fused(None)
        return self._losses

    def logits(self, place: int) -> Tensor:
        """What follows the token at ``place`` [B, V], fp32 at least; alone, without any loss."""
        with torch.no_grad():
            return (self.x[:, place] @ self._out.t()).to(self._weights.dtype)

    def seed(self, accumulate: Tensor) -> Tensor:
        """Computes the losses, adds the gradient of the output matrix to ``accumulate``; gradient of x."""
        with torch.no_grad():
            self._losses, dx = self._fused(accumulate)
        assert dx is not None
        return dx

    def backward(self) -> None:
        """The whole backward pass of the weighted sum of the losses, into the leaves' ``grad``."""
        if self._out.grad is None:
            self._out.grad = torch.zeros_like(self._out)
        torch.autograd.backward(self.x, self.seed(self._out.grad))

    def _fused(self, accumulate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return output_loss(
            self.x.detach(), self._out.detach(), self._targets, self._weights, accumulate, LOGITS_CHUNK
        )


@attrs.frozen
class Prepared:
    """What all layers of a microbatch share, made once."""

    ids: Tensor
    """[B, T+1]"""
    fixed: Tensor
    """F's rows for the tokens, [B, T, d] in the compute dtype."""
    rotary: tuple[Tensor, Tensor]
    """[.., T, 1, hd/2] each."""
    mask: Tensor | None
    """With documents, the block-diagonal causal mask."""


class Stage:
    """The frozen parts of one stage (U, F, rotary tables) and its forward pass.

    ``dtype`` is that of the leaves and of the activations; the state between layers, the norms' sums and
    the losses are fp32 (fp64 where everything is). A pass is ``prepare``, ``enter``, a ``layer`` each,
    ``leave``: pure functions of their arguments, so that a caller may run any layer again.
    """

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
        self.is_wide = is_wide(config, stage)
        self.layers = layer_range(config, stage)
        self.dtype = dtype
        self.state_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        self.device = device
        self.use(Basis(basis(config.d, config.k, seed)))
        self.window: Window | None = None
        """Gathers the gradients of h behind the boundary, where the stage is wide and somebody wants them."""
        half = torch.arange(config.head_dim // 2, dtype=torch.float64) / (config.head_dim // 2)
        angle = torch.arange(config.seq, dtype=torch.float64)[:, None] * config.rope_theta**-half
        self._cos = angle.cos().to(self.state_dtype).to(device)
        self._sin = angle.sin().to(self.state_dtype).to(device)

    def use(self, basis: Basis) -> None:
        """Compute in this basis from now on; the state of the stage has to be in it too."""
        self.basis_version = basis.version
        self.U = basis.U.to(self.device, self.state_dtype)

    def compile(self) -> None:
        """Send layers through torch.compile from now on; the first passes then take long.

        All layers share one graph. A compiled backward pass may write over what its forward pass kept, so a
        graph gives its gradients once: no ``retain_graph``.
        """
        self.block = torch.compile(self.block)  # type: ignore[method-assign]

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
        prepared = self.prepare(ids, docs)
        state = self.enter(leaves, prepared, c)
        for layer in self.layers:
            state = self.layer(leaves, layer, state, prepared)
        left = self.leave(leaves, state, prepared)
        return self.loss(leaves, left, prepared, weights) if self.is_tail else left

    def prepare(self, ids: Tensor, docs: Tensor | None = None) -> Prepared:
        """What the layers need to know of the tokens; see ``forward``."""
        tokens = ids[:, :-1].contiguous()
        return Prepared(ids, self.token_rows(tokens), *self._positions(docs, tokens.shape[1]))

    def enter(self, leaves: Mapping[str, Tensor], prepared: Prepared, c: Tensor | None) -> Tensor:
        """The state before the first layer: c [B, T, k], or h [B, T, d] where the stage is wide."""
        if c is None:
            c = F.embedding(prepared.ids[:, :-1], leaves["embed"]).to(self.state_dtype)
        if not self.is_wide:
            return c
        h = c @ self.U.t() + prepared.fixed
        if self.window is not None and h.requires_grad:
            h.register_hook(self.window.add)  # type: ignore[no-untyped-call]
        return h

    def layer(self, leaves: Mapping[str, Tensor], layer: int, state: Tensor, prepared: Prepared) -> Tensor:
        """The state after a layer of the whole model's numbering."""
        wo, w2 = ("wo", "w2") if self.is_wide else ("zo", "z2")
        at = f"layers.{layer}."
        return self.block(
            leaves[at + "qkv"], leaves[at + wo], leaves[at + "gate"], leaves[at + "up"], leaves[at + w2],
            state, prepared,
        )  # fmt: skip

    def block(
        self, qkv: Tensor, wo: Tensor, gate: Tensor, up: Tensor, w2: Tensor, state: Tensor, prepared: Prepared
    ) -> Tensor:
        """A layer by its tensors alone: what torch.compile takes, once for all layers of the stage."""
        state = self._write(state, self._attention(self._read(state, prepared), qkv, prepared) @ wo.t())
        x = self._read(state, prepared)
        inner: Tensor = Gate.apply(x @ gate.t(), x @ up.t())  # type: ignore[no-untyped-call]
        return self._write(state, inner @ w2.t())

    def leave(self, leaves: Mapping[str, Tensor], state: Tensor, prepared: Prepared) -> Tensor:
        """What follows the last layer: c [B, T, k] for the next stage; the tail's x [B, T, d]."""
        if self.is_tail:
            return self._read(state, prepared) * leaves["norm_out"]
        if self.is_wide:
            return kernels.project_difference(state, prepared.fixed.to(state.dtype), self.U)
        return state

    def loss(
        self, leaves: Mapping[str, Tensor], x: Tensor, prepared: Prepared, weights: Tensor | None = None
    ) -> TailLoss:
        """The tail's answer for x of ``leave``."""
        ids = prepared.ids
        counts = torch.ones(ids.shape[0], device=ids.device) if weights is None else weights
        return TailLoss(x, leaves["out"], ids[:, 1:], counts.to(self.state_dtype))

    def token_rows(self, tokens: Tensor) -> Tensor:
        """F's rows for these tokens, scaled: the frozen part of h, made once a microbatch. [B, T, d]"""
        config = self.config
        return kernels.token_table(tokens.contiguous(), config.d, self.seed, config.f_scale).to(self.dtype)

    def _read(self, state: Tensor, prepared: Prepared) -> Tensor:
        x: Tensor
        if self.is_wide:
            x = ReadWide.apply(state, self.config.eps, self.dtype)  # type: ignore[no-untyped-call]
        else:
            x = ReadNorm.apply(state, prepared.fixed, self.U, self.config.eps)  # type: ignore[no-untyped-call]
        return x

    def _write(self, state: Tensor, z: Tensor) -> Tensor:
        written: Tensor = AddUnit.apply(state, z, self.config.d, self.config.eps)  # type: ignore[no-untyped-call]
        return written

    def _attention(self, x: Tensor, qkv: Tensor, prepared: Prepared) -> Tensor:
        config = self.config
        batch, length, _ = x.shape
        turned = config.heads + config.kv_heads
        heads = (x @ qkv.t()).view(batch, length, turned + config.kv_heads, config.head_dim)
        qk = NormRotate.apply(heads[:, :, :turned], *prepared.rotary, config.eps)  # type: ignore[no-untyped-call]
        qk = qk.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            qk[:, : config.heads],
            qk[:, config.heads :],
            heads[:, :, turned:].transpose(1, 2),
            attn_mask=prepared.mask,
            is_causal=prepared.mask is None,
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
