"""PowerSGD in one process: what a step's two rounds make of the replicas' gradients."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stage import factors
from stage.parameters import Layout, ParameterSpec
from stage.powersgd import Contribution, PowerSGD, Ranges, orthonormal


def layout(rows: int, columns: int) -> Layout:
    return Layout.of(
        [
            ParameterSpec("wide", (rows, columns), True, 0.1),
            ParameterSpec("small", (3, 5), True, 0.1),
            ParameterSpec("scale", (columns,), False, 0.0),
        ]
    )


@attrs.define(eq=False)
class Swarm:
    """Replicas whose rounds are a weighted mean."""

    rows: int
    columns: int
    rank: int
    count: int = 3
    layout: Layout = attrs.field(init=False)
    replicas: list[PowerSGD] = attrs.field(init=False)
    gradients: list[Tensor] = attrs.field(init=False)
    samples: list[int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.layout = layout(self.rows, self.columns)
        self.gradients = [torch.zeros(self.layout.size) for _ in range(self.count)]
        self.replicas = [PowerSGD(self.layout, self.rank, 7, gradient) for gradient in self.gradients]
        self.samples = [0] * self.count

    def feed(self, seed: int, samples: list[int], rank: int | None = None) -> None:
        """Gradients of so many samples each; of ``rank``, if it is given."""
        generator = torch.Generator().manual_seed(seed)
        for at, (gradient, count) in enumerate(zip(self.gradients, samples, strict=True)):
            for view in self.layout.views(gradient).values():
                fresh = torch.randn(view.shape, generator=generator)
                if rank is not None and fresh.dim() == 2:
                    left = torch.randn(fresh.shape[0], rank, generator=torch.Generator().manual_seed(5))
                    fresh = left @ torch.randn(rank, fresh.shape[1], generator=generator)
                view.add_(count * fresh)
            self.samples[at] += count

    def mean(self, values: list[Tensor], weights: list[int]) -> Tensor:
        total = sum(weights)
        parts = [
            value.double() * weight / total for value, weight in zip(values, weights, strict=True) if weight
        ]
        return torch.stack(parts).sum(dim=0).float()

    def exact(self) -> Tensor:
        """The mean gradient over all samples, errors of earlier steps included."""
        return torch.stack([gradient.double() for gradient in self.gradients]).sum(dim=0).float() / sum(
            self.samples
        )

    def contribute(self) -> list[Contribution]:
        weights = self.samples
        first = [one.project(n) for one, n in zip(self.replicas, weights, strict=True)]
        p = self.mean([each.values for each in first], weights)
        whole = [(0, p.numel())]
        return [one.contribute(p, whole, n) for one, n in zip(self.replicas, weights, strict=True)]

    def step(self, averaged: Ranges | None = None) -> list[Tensor]:
        sent = self.contribute()
        mean = self.mean([each.values for each in sent], self.samples)
        ranges = [(0, mean.numel())] if averaged is None else averaged
        found = [one.finish(s, mean, ranges, ranges) for one, s in zip(self.replicas, sent, strict=True)]
        self.samples = [0] * self.count
        return found


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000),
    st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any),
)  # fmt: skip
def test_enough_rank_is_exact_and_all_get_the_same(
    rows: int, columns: int, rank: int, seed: int, samples: list[int]
) -> None:
    """Gradients of no higher rank than the factors come out whole; whoever has no samples gets them too."""
    swarm = Swarm(rows, columns, rank, len(samples))
    swarm.feed(seed, samples, rank=rank)
    wanted = swarm.exact()
    found = swarm.step()
    for other in found[1:]:
        assert torch.equal(found[0], other)
    assert close(found[0], wanted, 1e-3)
    left = torch.stack(swarm.gradients).sum(dim=0)
    assert float(left.norm()) <= 2e-3 * sum(samples) * float(wanted.norm())


def test_rank_of_the_smaller_side_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the gradient, even where factors do not pay."""
    monkeypatch.setattr(factors, "SMALLEST_SAVING", 0)
    for rows, columns in ((6, 40), (40, 6), (9, 9)):
        swarm = Swarm(rows, columns, min(rows, columns))
        swarm.feed(1, [2, 5, 1])
        wanted = swarm.exact()
        assert len(swarm.replicas[0].matrices) == 2
        assert close(swarm.step()[0], wanted)


def test_what_does_not_fit_waits_and_comes_later() -> None:
    """Error feedback: nothing that was ever fed is lost, it is in what was applied or in what waits."""
    swarm = Swarm(48, 64, 2)
    fed = torch.zeros(swarm.layout.size)
    applied = torch.zeros(swarm.layout.size)
    for step in range(12):
        before = torch.stack(swarm.gradients).sum(dim=0)
        swarm.feed(step, [3, 1, 4])
        fed += torch.stack(swarm.gradients).sum(dim=0) - before
        applied += 8 * swarm.step()[0]
        assert not close(applied, fed, 1e-2)  # two columns do not carry it all
        assert close(applied + torch.stack(swarm.gradients).sum(dim=0), fed, 1e-4)
    waits = float(torch.stack(swarm.gradients).sum(dim=0).norm())
    for _ in range(60):  # with nothing new it drains
        swarm.samples = [1, 1, 1]
        applied += 3 * swarm.step()[0]
    assert float(torch.stack(swarm.gradients).sum(dim=0).norm()) < 0.1 * waits


def test_a_failed_round_changes_nothing() -> None:
    swarm, other = Swarm(32, 64, 4), Swarm(32, 64, 4)
    for one in (swarm, other):
        one.feed(1, [2, 2, 2])
    before = [gradient.clone() for gradient in swarm.gradients]
    swarm.contribute()  # and no finish
    for gradient, was in zip(swarm.gradients, before, strict=True):
        assert torch.equal(gradient, was)
    assert torch.equal(swarm.step()[0], other.step()[0])


def test_what_comes_while_a_round_goes_on_is_of_the_next() -> None:
    swarm = Swarm(32, 64, 4)
    swarm.feed(1, [2, 2, 2])
    sent, samples = swarm.contribute(), list(swarm.samples)
    mean = swarm.mean([each.values for each in sent], samples)
    own = [gradient.clone() for gradient in swarm.gradients]
    swarm.feed(2, [1, 1, 1])
    late = [now - was for now, was in zip(swarm.gradients, own, strict=True)]
    whole = [(0, mean.numel())]
    for one, part, was, more, now in zip(swarm.replicas, sent, own, late, swarm.gradients, strict=True):
        one.finish(part, mean, whole, whole)
        basis = part.bases[0]
        (matrix,) = one.matrices
        kept = swarm.layout.views(was)[matrix.name]
        wanted = kept - basis @ (basis.T @ kept) + swarm.layout.views(more)[matrix.name]
        assert close(swarm.layout.views(now)[matrix.name], wanted, 1e-4)
        assert close(swarm.layout.views(now)["small"], swarm.layout.views(more)["small"], 1e-4)


def test_of_a_round_that_averaged_a_part_the_rest_waits() -> None:
    swarm = Swarm(32, 64, 4)
    swarm.feed(1, [2, 2, 2])
    before = torch.stack(swarm.gradients).sum(dim=0)
    factors = swarm.replicas[0].matrices[0].columns * 4
    found = swarm.step(averaged=[(0, factors // 2), (factors, factors + 10)])
    for other in found[1:]:
        assert torch.equal(found[0], other)
    assert close(6 * found[0] + torch.stack(swarm.gradients).sum(dim=0), before, 1e-4)
    small = swarm.layout.views(found[0])["small"].reshape(-1)
    assert small[:10].all()
    assert not small[10:].any()


def test_whose_numbers_are_not_in_the_mean_keeps_them() -> None:
    swarm = Swarm(32, 64, 4)
    swarm.feed(1, [2, 2, 2])
    before = swarm.gradients[1].clone()
    sent = swarm.contribute()
    mean = swarm.mean([each.values for each in sent], [2, 0, 2])
    swarm.replicas[1].finish(sent[1], mean, [(0, mean.numel())], [])
    assert torch.equal(swarm.gradients[1], before)


def test_a_newcomer_with_other_right_factors_gets_the_same_gradient() -> None:
    swarm = Swarm(32, 64, 4)
    for step in range(3):
        swarm.feed(step, [2, 2, 2])
        swarm.step()
    swarm.replicas[2] = PowerSGD(swarm.layout, 4, 7, swarm.gradients[2])
    swarm.feed(9, [2, 2, 2])
    found = swarm.step()
    assert torch.equal(found[0], found[2])
    assert torch.equal(swarm.replicas[0]._right[0], swarm.replicas[2]._right[0])


def test_directions_that_are_only_rounding_are_none() -> None:
    """Machines that round differently would not agree about them."""
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(50, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    basis = orthonormal(p)
    lengths = torch.linalg.vector_norm(basis, dim=0)
    assert lengths.round().tolist() == [1.0] * 3 + [0.0] * 5
    jitter = orthonormal(p * (1 + 1e-7 * torch.randn(p.shape, generator=generator)))
    assert torch.allclose(basis, jitter, atol=1e-4)
    assert not orthonormal(torch.zeros(4, 2)).any()


def test_what_pays() -> None:
    matrices, whole = factors.factored(layout(64, 64), 16)
    assert [matrix.name for matrix in matrices] == ["wide"]
    assert sum(stop - start for start, stop in whole) == 15 + 64
    assert not factors.factored(layout(64, 64), 17)[0]
    assert factors.sizes(layout(64, 64), 16) == (16 * 64, 16 * 64, 15 + 64)
    assert factors.sizes(layout(64, 64), 64) == (0, 0, 64 * 64 + 15 + 64)
