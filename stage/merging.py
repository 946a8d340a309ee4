"""Putting the average of a slice into weights that have moved on since it was packed.

Three rules, chosen by ``training.merge``:

- ``delta``: ``w += average - packed``. What was learned meanwhile stays whole.
- ``overwrite``: ``w = average``. What was learned meanwhile is lost where the slice lies.
- ``ema``: ``e = mu e + (1 - mu) (w - packed)``, ``w = average + e`` (AsyncMesh, arXiv 2601.22442). What was
  learned meanwhile stays as far as it persists, and noise fades. e is one fp32 number a weight that each
  replica keeps for itself; where a slice is averaged for the first time in this process, or after the state
  was replaced, ``e = w - packed``. mu is 0.5 for the first thirtieth of the run and then goes by half a
  cosine to 0.99 at its end, as in that paper's code, where a weight is averaged 1500 times; to less where it
  is averaged less often, so that e never remembers more than a fifteenth of the run.

A block is in flight from when it is packed until its correction is merged or given up. Packed again
meanwhile, it would be corrected twice for the same distance, and corrections that pile up diverge (with one
more pack before a correction lands, already where it is taken whole). So of a block that was in flight when
it was packed, the later average is not merged. A replica's rounds follow each other and never meet this;
whoever lets rounds overlap meets it at the end of a cycle, since the next one cuts the slices anew.

For the device thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import attrs
import torch
from torch import Tensor

from stage import kernels
from stage.config import TrainingConfig
from stage.parameters import BLOCK
from stage.weights import Weights

MU_FIRST: Final = 0.5
MU_LAST: Final = 0.99
MU_HELD: Final = 1 / 30
"""Of the run's steps, before mu begins to grow."""
REMEMBERED: Final = 1 / 15
"""Most of a weight's averages in a run that e remembers: 1 / (1 - mu) of them."""


@attrs.frozen
class PackedSlice:
    """A slice as it was when its round began."""

    number: int
    """Of the round."""
    index: int
    key: int
    values: Tensor
    """fp32, 1-D, on the CPU."""
    generation: int
    again: Tensor | None = None
    """Its blocks that were in flight already when it was packed (bool); None: none was."""

    def buffer(self) -> memoryview:
        """The slice as little-endian fp32."""
        return self.values.numpy().data.cast("B")


def smoothing(training: TrainingConfig, number: int) -> float:
    """mu of a round: one value for all replicas, since it follows from the round's number."""
    done = number * training.average_every / training.total_steps
    grown = min(1.0, max(0.0, (done - MU_HELD) / (1 - MU_HELD)))
    averages = training.total_steps / (training.average_every * training.slices)
    last = max(MU_FIRST, min(MU_LAST, 1 - 1 / (REMEMBERED * averages)))
    return last - (last - MU_FIRST) * (1 + math.cos(math.pi * grown)) / 2


class Merger:
    """The merge rule of a run, and what it remembers."""

    def __init__(self, training: TrainingConfig, weights: Weights, stage: int = 0) -> None:
        self._weights = weights
        self._stage = stage
        self.drift: Tensor | None = None
        """e, like the masters; None where the rule needs none."""
        self._visited = torch.zeros(weights.layout.size // BLOCK, dtype=torch.bool)
        """Blocks whose e means something."""
        self._in_flight = torch.zeros_like(self._visited)
        """Blocks that were packed and whose correction has not landed."""
        self.configure(training)

    def configure(self, training: TrainingConfig) -> None:
        """Take up settings of a newer manifest; another rule begins without a past."""
        self._training = training
        if (self.drift is not None) == (training.merge == "ema"):
            return
        self.drift = torch.zeros_like(self._weights.flat) if training.merge == "ema" else None
        self.forget()

    def forget(self) -> None:
        """The state was replaced: what drifted from another one means nothing."""
        self._visited.zero_()

    def pack(self, number: int, generation: int = 0) -> PackedSlice:
        """The slice of round ``number``, in flight from now on: ``merge`` or ``give_up`` ends that."""
        slices = self._training.slices
        cycle, index = divmod(number, slices)
        key = kernels.slice_key(self._training.seed, self._stage, cycle)
        values = kernels.slice_pack(self._weights.flat, index, slices, key).cpu()
        blocks = kernels.slice_blocks(self._in_flight.numel(), index, slices, key)
        again = self._in_flight[blocks]
        self._in_flight[blocks] = True
        return PackedSlice(number, index, key, values, generation, again if bool(again.any()) else None)

    def give_up(self, packed: PackedSlice) -> None:
        """The slice's round brought nothing: what it took is no longer in flight."""
        blocks = self._blocks(packed)
        self._in_flight[blocks if packed.again is None else blocks[~packed.again]] = False

    def _blocks(self, packed: PackedSlice) -> Tensor:
        return kernels.slice_blocks(self._in_flight.numel(), packed.index, self._training.slices, packed.key)

    def merge(self, packed: PackedSlice, average: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
        """Merge ``average`` (fp32, as packed, on the CPU) where ``ranges`` of its numbers were averaged."""
        self.give_up(packed)
        if packed.again is not None:
            ranges = _without(ranges, packed.again)
        weights, training = self._weights, self._training
        flat, compute = weights.writable(), weights.compute
        together = compute is not None and compute.device == flat.device and compute.dtype != flat.dtype
        values = packed.values.to(flat.device)
        if self.drift is not None:
            self._first_visits(self.drift, flat, values, packed, ranges)
        kernels.slice_merge(
            flat, values, average.to(flat.device), packed.index, training.slices, packed.key, training.merge,
            ranges, drift=self.drift, mu=smoothing(training, packed.number),
            compute=compute if together else None,
        )  # fmt: skip
        if not together:
            weights.refresh()

    def _first_visits(
        self,
        drift: Tensor,
        flat: Tensor,
        values: Tensor,
        packed: PackedSlice,
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        """Start e where it does not exist: with (w - packed) in its place the rule gives e = w - packed."""
        blocks = self._blocks(packed)
        wanted = torch.zeros(blocks.numel(), dtype=torch.bool)
        for start, stop in ranges:
            wanted[start // BLOCK : -(-stop // BLOCK)] = True
        places = (wanted & ~self._visited[blocks]).nonzero().view(-1)
        if not places.numel():
            return
        fresh = blocks[places]
        self._visited[fresh] = True
        here, there = fresh.to(flat.device), places.to(flat.device)
        moved = flat.view(-1, BLOCK)[here].sub_(values.view(-1, BLOCK)[there])
        drift.view(-1, BLOCK).index_copy_(0, here, moved)


def _without(ranges: Sequence[tuple[int, int]], blocks: Tensor) -> list[tuple[int, int]]:
    """The ranges of a slice's numbers without those in its ``blocks`` that are marked."""
    kept: list[tuple[int, int]] = []
    for start, stop in ranges:
        at = start
        while at < stop:
            end = min(stop, (at // BLOCK + 1) * BLOCK)
            if not bool(blocks[at // BLOCK]):
                joined = bool(kept) and kept[-1][1] == at
                kept.append((kept.pop()[0] if joined else at, end))
            at = end
    return kept
