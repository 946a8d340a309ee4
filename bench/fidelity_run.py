"""One run of the fidelity suite: stages chained in one process, whole batches, a wire between them."""

from __future__ import annotations

import math
import time

import attrs
import torch
from torch import Tensor

from stage import boundary, subspace
from stage.config import ModelConfig, TrainingConfig, WireDtype
from stage.data import Row, Source
from stage.genesis import fill
from stage.model import Stage, TailLoss, document_index
from stage.optimizer import Optimizer
from stage.parameters import parameter_specs
from stage.weights import Version, Weights

EVAL_ROWS = 256
EVAL_BATCH = 64


@attrs.frozen(kw_only=True)
class Curve:
    """What a run came to; losses in nats a byte."""

    arm: str
    lr: float
    seed: int
    steps: int
    tokens: int
    loss: float
    """Of the held-out rows, after the last step."""
    halfway: float
    """The same after half of the steps."""
    seconds: float
    """Processor time."""
    parameters: int = 0


class PlainStage(Stage):
    """A branch's output is added as it is, without the norm: the papers' digest's toy."""

    def _write(self, state: Tensor, z: Tensor) -> Tensor:
        return state + z


MOVE = 1.0
"""Length of a move of the basis, in ``Window.moved``'s unit."""


class Chain:
    """All stages, one replica each, on whole batches."""

    def __init__(self, model: ModelConfig, training: TrainingConfig, kind: type[Stage], device: str) -> None:
        self.model, self.training, self.device = model, training, device
        self.stages = [kind(model, index, training.seed, device=device) for index in range(model.stages)]
        self.weights = [
            Weights(parameter_specs(model, index), device=device) for index in range(model.stages)
        ]
        for stage, weights in zip(self.stages, self.weights, strict=True):
            fill(weights, training.seed)
            subspace.constrain(weights.writable(), weights.layout, stage.U)
        self.optimizers = [
            Optimizer(weights, training, stage=index, stages=model.stages, basis=self.stages[index].U)
            for index, weights in enumerate(self.weights)
        ]

    def step(self, step: int, rows: list[Row]) -> None:
        """Forward, backward, an update of every stage."""
        self.accumulate(rows)
        self.update(step, len(rows))

    def update(self, step: int, samples: int) -> None:
        """An update of every stage with what is accumulated."""
        for optimizer in self.optimizers:
            optimizer.step(step, samples)

    def accumulate(self, rows: list[Row]) -> None:
        """Forward and backward."""
        ids, docs = self._tensors(rows)
        held: list[tuple[Version, Tensor | None, Tensor | TailLoss]] = []
        c: Tensor | None = None
        for stage, weights in zip(self.stages, self.weights, strict=True):
            c_in = None if c is None else self._wire(c, self.training.wire_dtype).requires_grad_()
            version = weights.begin()
            out = stage.forward(version.leaves, ids, c_in, docs=docs)
            held.append((version, c_in, out))
            c = out if isinstance(out, Tensor) else None
        dc: Tensor | None = None
        for version, c_in, out in reversed(held):
            if isinstance(out, TailLoss):
                out.backward()
            else:
                assert dc is not None
                torch.autograd.backward(out, self._wire(dc, self.training.wire_dtype_backward))
            dc = None if c_in is None else c_in.grad
            version.release()

    def watch(self) -> None:
        """Gather from now on the gradients that say where the basis should move."""
        self.stages[-1].window = subspace.Window(self.model.d, self.device)

    def move(self) -> None:
        """Move the basis of all stages and begin a new window."""
        tail = self.stages[-1]
        assert tail.window is not None
        old, new = tail.U, tail.window.moved(subspace.Basis(tail.U, tail.basis_version), MOVE)
        for stage, optimizer in zip(self.stages, self.optimizers, strict=True):
            stage.use(new)
            subspace.switch(optimizer, old, stage.U)
        self.watch()

    def evaluate(self, rows: list[Row]) -> float:
        """Mean loss of these rows."""
        losses = []
        with torch.no_grad():
            for start in range(0, len(rows), EVAL_BATCH):
                ids, docs = self._tensors(rows[start : start + EVAL_BATCH])
                out: Tensor | TailLoss | None = None
                for stage, weights in zip(self.stages, self.weights, strict=True):
                    c = self._wire(out, self.training.wire_dtype) if isinstance(out, Tensor) else None
                    out = stage.forward(weights.named(), ids, c, docs=docs)
                assert isinstance(out, TailLoss)
                losses.append(out.losses)
        return float(torch.cat(losses).mean())

    def _wire(self, c: Tensor, dtype: WireDtype) -> Tensor:
        """What arrives at the other side."""
        if dtype == "fp32":
            return c.detach().clone()
        flat = c.detach().flatten(0, 1)
        packed = boundary.pack(flat.cpu(), dtype)
        return boundary.unpack(packed, flat.shape[0], flat.shape[1], dtype).view(c.shape).to(c.device)

    def _tensors(self, rows: list[Row]) -> tuple[Tensor, Tensor | None]:
        """Ids [B, T+1] and document numbers [B, T], None where every row is one document."""
        ids = torch.stack([torch.frombuffer(bytearray(row.ids), dtype=torch.int32) for row in rows]).long()
        docs = None
        if any(row.starts for row in rows):
            docs = torch.stack([document_index(row.starts, self.model.seq) for row in rows]).to(self.device)
        return ids.to(self.device), docs


def train(
    arm: str,
    model: ModelConfig,
    training: TrainingConfig,
    source: Source,
    kind: type[Stage] = Stage,
    device: str = "cpu",
    move_every: int = 0,
) -> Curve:
    """A whole run."""
    chain = Chain(model, training, kind, device)
    if move_every:
        chain.watch()
    held_out = source.held_out(EVAL_ROWS)
    steps, batch, began = training.total_steps, training.target_batch, time.process_time()
    halfway = math.nan
    for step in range(1, steps + 1):
        first = (step - 1) * batch
        chain.step(step, [source.row(0, first + i) for i in range(batch)])
        if move_every and step % move_every == 0 and step != steps:
            chain.move()
        if step == steps // 2:
            halfway = round(chain.evaluate(held_out), 4)
    return Curve(
        arm=arm,
        lr=training.lr,
        seed=training.seed,
        steps=steps,
        tokens=steps * batch * model.seq,
        loss=round(chain.evaluate(held_out), 4),
        halfway=halfway,
        seconds=round(time.process_time() - began, 1),
    )
