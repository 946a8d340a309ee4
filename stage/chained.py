"""The stages of a run chained in one process: the yardstick that a swarm is measured against.

Same stages, same data, same optimizer, microbatches of one sequence, graphs kept from forward to
backward (nothing recomputed), fp32 handed over by reference: what a swarm does minus everything that
makes it one. Both the comparison of losses (to 1e-5) and tokens a second start from here.
"""

from __future__ import annotations

import time

import attrs
import torch
from torch import Tensor

from stage.config import ModelConfig, TrainingConfig
from stage.data import Row, Source
from stage.genesis import genesis
from stage.model import Stage, TailLoss, document_index
from stage.optimizer import Optimizer
from stage.weights import Version

WARM_UP = 4
"""Microbatches before the clock starts."""


@attrs.frozen
class _InFlight:
    version: Version
    c_in: Tensor | None
    out: Tensor | TailLoss


class Chain:
    """All stages of a run, one replica each."""

    def __init__(self, model: ModelConfig, training: TrainingConfig) -> None:
        self.training = training
        self.stages = [Stage(model, index, training.seed) for index in range(model.stages)]
        self.weights = [genesis(model, index, training.seed) for index in range(model.stages)]
        self.optimizers = [
            Optimizer(weights, training, stage=index, stages=model.stages, basis=self.stages[index].U)
            for index, weights in enumerate(self.weights)
        ]
        self.samples = 0
        """Microbatches in the accumulators."""

    def microbatch(self, row: Row) -> float:
        """Forward and backward through all stages; the loss."""
        ids, docs = _tensors(row)
        held: list[_InFlight] = []
        c: Tensor | None = None
        for stage, weights in zip(self.stages, self.weights, strict=True):
            version = weights.begin()
            c_in = None if c is None else c.detach().requires_grad_()
            out = stage.forward(version.leaves, ids, c_in, docs=docs)
            held.append(_InFlight(version, c_in, out))
            c = out if isinstance(out, Tensor) else None
        dc: Tensor | None = None
        loss = 0.0
        for part in reversed(held):
            if isinstance(part.out, TailLoss):
                part.out.backward()
                loss = float(part.out.losses[0])
            else:
                torch.autograd.backward(part.out, dc)
            dc = None if part.c_in is None else part.c_in.grad
            part.version.release()
        self.samples += 1
        return loss

    def step(self, step: int) -> None:
        """An update of every stage."""
        for optimizer in self.optimizers:
            optimizer.step(step, self.samples)
        self.samples = 0

    def evaluate(self, row: Row) -> float:
        """Loss of a held-out row."""
        ids, docs = _tensors(row)
        out: Tensor | TailLoss | None = None
        with torch.no_grad():
            for stage, weights in zip(self.stages, self.weights, strict=True):
                c = out if isinstance(out, Tensor) else None
                out = stage.forward(weights.named(), ids, c, docs=docs)
        assert isinstance(out, TailLoss)
        return float(out.losses[0])


def _tensors(row: Row) -> tuple[Tensor, Tensor | None]:
    """Ids [1, T+1] and document numbers [1, T] of a row, None where it is one document."""
    ids = torch.frombuffer(bytearray(row.ids), dtype=torch.int32).long()
    docs = document_index(row.starts, len(ids) - 1).unsqueeze(0) if row.starts else None
    return ids.unsqueeze(0), docs


def chained_tokens_per_second(
    model: ModelConfig, training: TrainingConfig, source: Source, *, steps: int, threads: int
) -> float:
    """Tokens a second over ``steps`` steps of ``target_batch`` microbatches.

    Sets the process's number of torch threads, so call it in a process of its own.
    """
    torch.set_num_threads(threads)
    chain = Chain(model, training)
    for position in range(WARM_UP):
        chain.microbatch(source.row(0, position))
    chain.step(1)
    began = time.perf_counter()
    for step in range(steps):
        for number in range(training.target_batch):
            chain.microbatch(source.row(0, step * training.target_batch + number))
        chain.step(step + 1)
    return steps * training.target_batch * model.seq / (time.perf_counter() - began)
