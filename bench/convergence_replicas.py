"""Replicas of every stage in one process, trained and averaged as a swarm does it, and judged like one.

Each row takes one replica of every stage, in turns. Each replica takes its own update with the mean of its
own gradients; each ``average_every`` steps a slice of its weights is averaged with its mates' (weighed by
samples, with the packing, merging and reducing of a run), and the average arrives ``DELAY`` rows later. With
one replica a stage this is training in one process, and nothing else.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from fidelity_run import Chain

from stage.config import ModelConfig, TrainingConfig
from stage.data import Row
from stage.merging import Merger, PackedSlice
from stage.model import Stage
from stage.reduce import KernelReducer

DELAY = 6
"""Rows of the run that pass while a round goes on: the median in the swarms that ``convergence.py`` ran."""


class Replicas:
    """So many of each stage."""

    def __init__(self, model: ModelConfig, training: TrainingConfig, replicas: int) -> None:
        self.training = training
        self.stages = range(model.stages)
        self.members = [Chain(model, training, Stage, "cpu") for _ in range(replicas)]
        self._mergers = [
            [Merger(training, member.weights[stage], stage) for member in self.members]
            for stage in self.stages
        ]
        self._samples = [[0] * replicas for _ in self.stages]
        """In the accumulator of each stage's replicas."""
        self._unaveraged = [[0] * replicas for _ in self.stages]
        """Whose update was made since the last round."""
        self._under_way: list[tuple[list[PackedSlice], Tensor]] = []
        """Of each stage, what was packed and its average."""

    # Training

    def step(self, step: int, rows: list[Row]) -> None:
        """The rows between two steps of the clock, and the update that leads to ``step``."""
        self._accumulate(range(DELAY), rows[:DELAY])
        self._land()
        self._accumulate(range(DELAY, len(rows)), rows[DELAY:])
        for stage in self.stages:
            for number, member in enumerate(self.members):
                samples = self._samples[stage][number]
                member.optimizers[stage].step(step, samples)
                self._unaveraged[stage][number] += samples
                self._samples[stage][number] = 0
        if len(self.members) > 1 and step % self.training.average_every == 0:
            self._round(step // self.training.average_every)

    def finish(self) -> None:
        """The last round ends."""
        self._land()

    def _accumulate(self, numbers: Iterable[int], rows: list[Row]) -> None:
        together: dict[tuple[int, ...], list[Row]] = defaultdict(list)
        for number, row in zip(numbers, rows, strict=False):
            together[self._path(number)].append(row)
        for path, some in together.items():
            self._chain(path).accumulate(some)
            for stage, replica in enumerate(path):
                self._samples[stage][replica] += len(some)

    def _round(self, number: int) -> None:
        for stage in self.stages:
            packed = [merger.pack(number) for merger in self._mergers[stage]]
            reducer = KernelReducer(packed[0].values.nbytes)
            for one, weight in zip(packed, self._unaveraged[stage], strict=True):
                reducer.add(one.buffer(), float(weight))
            average = torch.frombuffer(bytearray(reducer.finish()), dtype=torch.float32)
            self._under_way.append((packed, average))
            self._unaveraged[stage] = [0] * len(self.members)

    def _land(self) -> None:
        for stage, (packed, average) in enumerate(self._under_way):
            for merger, one in zip(self._mergers[stage], packed, strict=True):
                merger.merge(one, average, [(0, average.numel())])
        self._under_way.clear()

    # Judging

    def load(self, weights: Sequence[Sequence[Tensor]]) -> None:
        """Take over weights (flat, fp32) of every stage's replicas, over again where there are fewer."""
        for stage, known in enumerate(weights):
            for number, member in enumerate(self.members):
                member.weights[stage].writable().copy_(known[number % len(known)])
                member.weights[stage].refresh()

    def loss(self, rows: list[Row]) -> float:
        """Mean of these rows, each on two paths that share no replica (on one where there is no other)."""
        together: dict[tuple[int, ...], list[Row]] = defaultdict(list)
        for number, row in enumerate(rows):
            for turn in range(min(2, len(self.members))):
                together[self._path(number, turn)].append(row)
        sums = [self._chain(path).evaluate(some) * len(some) for path, some in together.items()]
        return sum(sums) / sum(map(len, together.values()))

    def disagreement(self) -> float:
        """Mean relative distance of replicas to their stage's mean."""
        apart = []
        for stage in self.stages:
            each = torch.stack([member.weights[stage].flat for member in self.members])
            mean = each.mean(dim=0)
            apart += [float((one - mean).norm() / mean.norm()) for one in each]
        return sum(apart) / len(apart)

    def _path(self, number: int, turn: int = 0) -> tuple[int, ...]:
        """Replicas of a row: all combinations in turns; another ``turn`` is another replica everywhere."""
        count = len(self.members)
        return tuple((number // count**stage + turn) % count for stage in self.stages)

    def _chain(self, path: tuple[int, ...]) -> Chain:
        """The stages with the weights of these replicas."""
        chain = copy.copy(self.members[0])
        chain.weights = [self.members[replica].weights[stage] for stage, replica in enumerate(path)]
        return chain
