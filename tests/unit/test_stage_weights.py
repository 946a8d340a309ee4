"""Copy-on-write weights and the optimizer that steps on them."""

# mypy: disable-error-code="no-untyped-call"

import math
from typing import Literal

import attrs
import pytest
import torch

from p2p.errors import LocalError
from p2p.event import Event
from stage import genesis
from stage.config import ModelConfig, TrainingConfig
from stage.model import Stage, TailLoss
from stage.optimizer import Optimizer
from stage.parameters import BLOCK, Layout, ParameterSpec
from stage.schedule import learning_rate
from stage.weights import Version, Weights

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

MODEL = ModelConfig(d=16, k=4, heads=2, kv_heads=1, head_dim=8, ffn=24, seq=12, layers=(1,), vocab=32)
TRAINING = TrainingConfig(seed=3, lr=1e-2, warmup_steps=2, total_steps=10, min_lr_ratio=0.1)


def forward(stage: Stage, version: Version, seed: int) -> TailLoss:
    ids = torch.randint(0, 32, (1, 13), generator=torch.Generator().manual_seed(seed))
    out = stage.forward(version.leaves, ids)
    assert isinstance(out, TailLoss)
    return out


def test_layout_puts_decayed_tensors_first_and_fills_blocks() -> None:
    layout = Layout.of([ParameterSpec("scale", (5,), False, 0.0), ParameterSpec("matrix", (3, 7), True, 0.1)])
    assert [spec.name for spec in layout.specs] == ["matrix", "scale"]
    assert layout.offsets == (0, 32)
    assert (layout.decayed, layout.size) == (32, BLOCK)
    other = Layout.of([ParameterSpec("matrix", (7, 3), True, 0.1), ParameterSpec("scale", (5,), False, 0.0)])
    assert layout.fingerprint != other.fingerprint


def test_a_step_does_not_disturb_a_graph_in_flight() -> None:
    """Bit for bit the gradient at the weights that the forward pass saw."""
    stage, weights = Stage(MODEL, 0, 3), genesis.genesis(MODEL, 0, 3)
    optimizer = Optimizer(weights, TRAINING)
    alone = weights.begin()
    forward(stage, alone, 1).backward()
    alone.release()
    expected = weights.gradient.clone()
    weights.zero_gradient()

    held = weights.begin()
    graph = forward(stage, held, 1)
    between = weights.begin()
    forward(stage, between, 2).backward()
    between.release()
    before = weights.flat.clone()
    assert optimizer.step(1, 1).outcome == "updated"
    assert not torch.equal(weights.flat, before)
    assert torch.equal(held.flat, before)
    graph.backward()
    held.release()
    assert torch.equal(weights.gradient, expected)


def test_without_holders_the_weights_change_in_place() -> None:
    weights = genesis.genesis(MODEL, 0, 3)
    version = weights.begin()
    version.release()
    version.release()
    address = weights.flat.data_ptr()
    assert weights.writable().data_ptr() == address
    kept = weights.begin()
    assert weights.writable().data_ptr() != address
    assert kept.flat.data_ptr() == address


def test_old_versions_are_bounded_and_a_release_frees_one() -> None:
    weights = Weights([ParameterSpec("w", (4, 4), True, 1.0)], max_versions=2)
    held = []
    for _ in range(2):
        held.append(weights.begin())
        weights.writable()
    held.append(weights.begin())
    assert weights.can_write is False
    with pytest.raises(LocalError, match="still held"):
        weights.writable()
    held[0].release()
    assert bool(weights.can_write)
    weights.writable()
    assert weights.versions == 2


def reference_step(optimizer: Optimizer, step: int, samples: int) -> torch.Tensor:
    """The same update by torch's own AdamW, from the same moments."""
    weights = optimizer.weights
    flat, decayed = weights.flat.clone(), weights.layout.decayed
    parts = [flat[:decayed].clone().requires_grad_(), flat[decayed:].clone().requires_grad_()]
    mean = weights.gradient / samples
    mean *= min(1.0, optimizer.max_norm / float(mean.norm()))
    parts[0].grad, parts[1].grad = mean[:decayed].clone(), mean[decayed:].clone()
    reference = torch.optim.AdamW(
        [{"params": [parts[0]], "weight_decay": 0.1}, {"params": [parts[1]], "weight_decay": 0.0}],
        lr=learning_rate(step, TRAINING),
        betas=(0.9, 0.95),
        foreach=False,
    )
    for index, part in enumerate(parts):
        where = slice(0, decayed) if index == 0 else slice(decayed, None)
        reference.state[part] = {
            "step": torch.tensor(float(optimizer.updates)),
            "exp_avg": optimizer.moments.read("exp_avg", 0, flat.numel())[where].clone(),
            "exp_avg_sq": optimizer.moments.read("exp_avg_sq", 0, flat.numel())[where].clone(),
        }
    reference.step()
    return torch.cat([part.detach() for part in parts])


def test_update_equals_torch_adamw_with_mean_gradient_and_clipping() -> None:
    weights = genesis.genesis(MODEL, 0, 3)
    optimizer = Optimizer(weights, TRAINING, stages=4)
    assert optimizer.max_norm == 0.5
    for step in (1, 2, 3):
        weights.gradient.normal_(generator=torch.Generator().manual_seed(step))
        expected = reference_step(optimizer, step, 6)
        taken = optimizer.step(step, 6)
        assert taken.outcome == "updated"
        assert taken.samples == 6
        torch.testing.assert_close(weights.flat, expected, rtol=1e-5, atol=1e-7)
        assert not bool(weights.gradient.any())


def test_few_samples_are_carried_over_and_none_touches_nothing() -> None:
    weights = genesis.genesis(MODEL, 0, 3)
    optimizer = Optimizer(weights, attrs.evolve(TRAINING, min_step_samples=4))
    before = weights.flat.clone()
    weights.gradient.fill_(1.0)
    assert optimizer.step(1, 0).outcome == "empty"
    taken = optimizer.step(1, 3)
    assert (taken.outcome, taken.samples) == ("carried", 0)
    assert torch.equal(weights.flat, before)
    assert bool(weights.gradient.all())
    assert optimizer.step(2, 4).outcome == "updated"


@pytest.mark.catalogue(35)
def test_a_gradient_that_is_not_finite_is_dropped_and_reported() -> None:
    events: list[Event] = []
    weights = genesis.genesis(MODEL, 0, 3)
    optimizer = Optimizer(weights, TRAINING, stage=2, emit=events.append)
    before = weights.flat.clone()
    weights.gradient[7] = float("nan")
    assert optimizer.step(5, 8).outcome == "not finite"
    assert torch.equal(weights.flat, before)
    assert not bool(weights.gradient.any())
    assert [type(event).__name__ for event in events] == ["BadGradient"]


def test_held_state_survives_later_steps() -> None:
    weights = genesis.genesis(MODEL, 0, 3)
    optimizer = Optimizer(weights, TRAINING)
    weights.gradient.fill_(1.0)
    optimizer.step(1, 1)
    size = weights.layout.size
    held = optimizer.hold(1)
    before = [held.read(vector, 0, size).clone() for vector in range(3)]
    weights.gradient.fill_(-1.0)
    optimizer.step(2, 1)
    assert all(torch.equal(held.read(vector, 0, size), before[vector]) for vector in range(3))
    assert not torch.equal(weights.flat, before[0])
    held.release()
    optimizer.load(before, held.updates, held.fingerprint)
    assert torch.equal(weights.flat, before[0])
    assert optimizer.updates == 1
    with pytest.raises(LocalError, match="another stage"):
        optimizer.load(before, 1, "0" * 64)
    with pytest.raises(LocalError, match="wrong size"):
        optimizer.load([before[0][:-1], *before[1:]], 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule(schedule: Literal["linear", "cosine"]) -> None:
    config = attrs.evolve(TRAINING, schedule=schedule)
    rates = [learning_rate(step, config) for step in range(1, 21)]
    assert rates[0] == pytest.approx(0.5e-2)
    assert max(rates) == rates[1] == pytest.approx(1e-2)
    assert rates[1:10] == sorted(rates[1:10], reverse=True)
    assert rates[5] == pytest.approx(0.55e-2)
    assert rates[9:] == pytest.approx([1e-3] * 11)
    assert learning_rate(3, attrs.evolve(config, warmup_steps=0, total_steps=1)) == pytest.approx(1e-3)
    assert all(math.isfinite(rate) for rate in rates)
