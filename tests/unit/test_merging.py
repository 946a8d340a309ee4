"""Merging an average into weights that have moved on, against the rules written out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import attrs
import pytest
import torch
from torch import Tensor

from stage import genesis, kernels
from stage.config import ModelConfig, TrainingConfig
from stage.merging import Merger, PackedSlice, smoothing
from stage.parameters import BLOCK
from stage.weights import Weights

MODEL = ModelConfig(d=16, k=4, heads=2, kv_heads=1, head_dim=8, ffn=24, seq=12, layers=(1,), vocab=32)
TRAINING = TrainingConfig(seed=3, slice_fraction=0.25, average_every=2, total_steps=100, warmup_steps=0)
SLICES = TRAINING.slices


@pytest.fixture
def weights() -> Weights:
    made = genesis.genesis(MODEL, 0, 3)
    assert made.layout.size // BLOCK > 2 * SLICES  # a slice has several blocks
    return made


def pack(weights: Weights, number: int) -> PackedSlice:
    cycle, index = divmod(number, SLICES)
    key = kernels.slice_key(TRAINING.seed, 0, cycle)
    return PackedSlice(number, index, key, kernels.slice_pack(weights.flat, index, SLICES, key), 0)


def places(weights: Weights, packed: PackedSlice) -> Tensor:
    """Where the numbers of a slice lie in the flat weights."""
    blocks = kernels.slice_blocks(weights.layout.size // BLOCK, packed.index, SLICES, packed.key)
    return (blocks[:, None] * BLOCK + torch.arange(BLOCK)).view(-1)


def noise() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = genesis.genesis(MODEL, 0, 3).layout.size
    while True:
        yield torch.randn(size, generator=generator) * 0.01


@pytest.mark.parametrize("merge", ["delta", "overwrite", "ema"])
@pytest.mark.parametrize("partly", [False, True])
def test_rules(weights: Weights, merge: Literal["delta", "overwrite", "ema"], partly: bool) -> None:
    """Three cycles, each with a permutation of its own; with ``partly`` some ranges were not averaged."""
    training = attrs.evolve(TRAINING, merge=merge)
    merger = Merger(training, weights)
    drift = torch.full_like(weights.flat, math.nan)  # where nothing was averaged yet
    moves = noise()
    for number in range(3 * SLICES):
        packed = pack(weights, number)
        size = packed.values.numel()
        ranges = [(0, size // 3), (size // 2, size - 7)] if partly and number % 2 else [(0, size)]
        average = packed.values + next(moves)[:size]
        weights.writable().add_(next(moves))
        expected, at = weights.flat.clone(), places(weights, packed)
        merger.merge(packed, average, ranges)
        averaged = torch.zeros(size, dtype=torch.bool)
        for start, stop in ranges:
            averaged[start:stop] = True
        now, e, mu = expected[at], drift[at], smoothing(training, number)
        moved = now - packed.values
        touched = averaged.view(-1, BLOCK).any(dim=1).repeat_interleave(BLOCK)
        e = torch.where(e.isnan() & touched, moved, e)  # a drift begins with its whole block
        e = torch.where(averaged, mu * e + (1 - mu) * moved, e)
        drift[at] = e
        new = {"delta": now + (average - packed.values), "overwrite": average, "ema": average + e}[merge]
        expected[at] = torch.where(averaged, new, now)
        torch.testing.assert_close(weights.flat, expected, rtol=1e-5, atol=1e-6)


def test_every_cycle_cuts_the_weights_anew(weights: Weights) -> None:
    """Each block once a cycle, in another order the next time."""
    merger = Merger(TRAINING, weights)
    blocks = weights.layout.size // BLOCK
    orders = []
    for cycle in range(3):
        packed = [merger.pack(cycle * SLICES + index) for index in range(SLICES)]
        order = torch.cat([kernels.slice_blocks(blocks, p.index, SLICES, p.key) for p in packed])
        assert sorted(order.tolist()) == list(range(blocks))
        orders.append(tuple(order.tolist()))
        for each in packed:
            assert each.again is None
            assert torch.equal(each.values, weights.flat[places(weights, each)])
            merger.give_up(each)
    assert len(set(orders)) == 3


def test_what_is_in_flight_is_not_corrected_twice(weights: Weights) -> None:
    """Rounds that overlap: of a block that a second round packed before the first one's correction landed
    only that one is merged; afterwards it takes part as before."""
    merger = Merger(TRAINING, weights)
    first = merger.pack(SLICES - 1)
    later = [merger.pack(number) for number in range(SLICES, 2 * SLICES)]  # all blocks, cut anew
    mine = set(places(weights, first).tolist())
    before = weights.flat.clone()
    for packed in later:
        merger.merge(packed, packed.values + 1.0, [(0, packed.values.numel())])
    moved = (weights.flat - before).round()
    assert {at for at in range(weights.layout.size) if moved[at] == 0} == mine
    merger.merge(first, first.values + 1.0, [(0, first.values.numel())])
    assert (weights.flat - before).round().eq(1).all()
    assert all(merger.pack(number).again is None for number in range(2 * SLICES, 3 * SLICES))


def test_a_round_that_brought_nothing_leaves_nothing_in_flight(weights: Weights) -> None:
    merger = Merger(TRAINING, weights)
    lost, twice = merger.pack(0), merger.pack(0)
    assert twice.again is not None
    assert twice.again.all()
    merger.give_up(twice)  # of blocks that are in flight for the first one
    assert merger.pack(0).again is not None
    merger.give_up(lost)
    assert merger.pack(0).again is None


def test_first_visits_add_what_was_learned_whole(weights: Weights) -> None:
    """As delta does; also after the state was replaced, and after a change of the rule."""
    ema, delta = attrs.evolve(TRAINING, merge="ema"), TRAINING
    merger, moves = Merger(ema, weights), noise()
    for number in range(4 * SLICES):
        if number == SLICES:
            merger.forget()
        elif number == 2 * SLICES:
            merger.configure(delta)
            assert merger.drift is None
            merger.configure(ema)
        packed = pack(weights, number)
        average = packed.values + 0.5
        weights.writable().add_(next(moves))
        wanted = weights.flat[places(weights, packed)] + 0.5
        merger.merge(packed, average, [(0, average.numel())])
        found = weights.flat[places(weights, packed)]
        assert torch.allclose(found, wanted, atol=1e-5) == (number < 3 * SLICES)


def test_the_compute_copy_follows() -> None:
    weights = genesis.genesis(MODEL, 0, 3, compute_dtype=torch.bfloat16)
    merger = Merger(attrs.evolve(TRAINING, merge="ema"), weights)
    packed = pack(weights, 0)
    merger.merge(packed, packed.values + 1.0, [(0, packed.values.numel())])
    assert weights.compute is not None
    assert torch.equal(weights.compute, weights.flat.to(torch.bfloat16))


def test_smoothing_grows_from_a_half_to_nearly_one() -> None:
    training = attrs.evolve(TRAINING, average_every=1, total_steps=6000)
    found = [smoothing(training, number) for number in range(0, 8000, 20)]
    assert found[:10] == [0.5] * 10
    assert found == sorted(found)
    assert found[-1] == smoothing(training, 6000) == 0.99
    middle = smoothing(training, 200 + 2900)
    assert math.isclose(middle, (0.5 + 0.99) / 2, rel_tol=1e-6)


def test_smoothing_remembers_no_more_than_a_fifteenth_of_the_run() -> None:
    """A weight is averaged total_steps / (average_every · slices) times."""
    for total, last in ((12_000, 0.99), (600, 0.9), (100, 0.5), (7, 0.5)):
        training = attrs.evolve(TRAINING, average_every=1, total_steps=total)
        assert math.isclose(smoothing(training, total), last)
