"""The constrained variant: what keeps weights in span(U), what leaves it, and what a boundary then loses."""

import attrs
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from p2p.averaging import Outcome
from p2p.errors import LocalError
from stage import genesis, subspace
from stage.compute import StageCompute
from stage.config import ModelConfig, TrainingConfig
from stage.model import Stage, TailLoss
from stage.optimizer import Optimizer
from stage.parameters import Layout, parameter_specs
from stage.weights import Weights

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

SEED = 5
CONFIG = ModelConfig(
    d=32, k=8, heads=4, kv_heads=2, head_dim=8, ffn=48, seq=24, layers=(6,), vocab=64, variant="constrained"
)
TRAINING = TrainingConfig(seed=SEED, lr=1e-2, warmup_steps=1, total_steps=200, target_batch=2)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, CONFIG.vocab, (2, CONFIG.seq + 1), generator=torch.Generator().manual_seed(seed))


class Chain:
    """The stages of a cut, handing over what a boundary hands over."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        self.stages = [Stage(config, index, SEED, dtype=dtype) for index in range(config.stages)]
        self.weights = [
            Weights(parameter_specs(config, index), dtype=dtype) for index in range(config.stages)
        ]
        self.optimizers = []
        for index, (stage, weights) in enumerate(zip(self.stages, self.weights, strict=True)):
            weights.writable().copy_(genesis.genesis(config, index, SEED).flat)
            subspace.constrain(weights.writable(), weights.layout, stage.U)
            optimizer = Optimizer(weights, TRAINING, stage=index, stages=config.stages, basis=stage.U)
            self.optimizers.append(optimizer)

    def backward(self, ids: Tensor) -> Tensor:
        """Losses; gradients are added to the accumulators."""
        held: list[tuple[Tensor | None, Tensor | TailLoss]] = []
        c: Tensor | None = None
        for stage, weights in zip(self.stages, self.weights, strict=True):
            c_in = None if c is None else c.detach().requires_grad_()
            version = weights.begin()
            out = stage.forward(version.leaves, ids, c_in)
            version.release()  # no step comes between
            held.append((c_in, out))
            c = out if isinstance(out, Tensor) else None
        dc: Tensor | None = None
        losses = torch.empty(0)
        for c_in, out in reversed(held):
            if isinstance(out, TailLoss):
                out.backward()
                losses = out.losses
            else:
                torch.autograd.backward(out, dc)
            dc = None if c_in is None else c_in.grad
        return losses

    def step(self, step: int) -> None:
        for optimizer in self.optimizers:
            optimizer.step(step, 2)

    def farthest(self) -> float:
        """The largest share of a constrained matrix that is outside span(U)."""
        return max(
            subspace.outside(matrix, stage.U)
            for stage, weights in zip(self.stages, self.weights, strict=True)
            for matrix in weights.layout.constrained_views(weights.flat)
        )

    def gradients(self) -> dict[str, Tensor]:
        """By name; of constrained matrices the part that a boundary lets pass, which is in span(U)."""
        named: dict[str, Tensor] = {}
        for stage, weights in zip(self.stages, self.weights, strict=True):
            flat = weights.gradient.clone()
            subspace.constrain(flat, weights.layout, stage.U)
            named |= weights.layout.views(flat)
        return named


CUTS = [(3, 3), (2, 1, 3), (1, 2, 2, 1), (1, 1, 1, 1, 2), (1, 1, 1, 1, 1, 1)]


@pytest.mark.parametrize("layers", CUTS, ids=len)
def test_a_boundary_changes_neither_loss_nor_gradient(layers: tuple[int, ...]) -> None:
    """Two to six stages against the same layers in one piece, in float64."""
    whole, cut = (Chain(attrs.evolve(CONFIG, layers=cut), torch.float64) for cut in ((6,), layers))
    torch.testing.assert_close(cut.backward(tokens()), whole.backward(tokens()), rtol=1e-12, atol=1e-12)
    expected, seen = whole.gradients(), cut.gradients()
    assert set(seen) == set(expected)
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


def test_it_is_the_subspace_model_in_another_form() -> None:
    """With W = U·Z and the same other weights, losses are equal, and the gradient of Z is U^T·(that of W)."""
    config = attrs.evolve(CONFIG, layers=(2, 2))
    wide, thin = (
        Chain(attrs.evolve(config, variant=variant), torch.float64) for variant in ("constrained", "subspace")
    )
    names = {"wo": "zo", "w2": "z2"}
    for wide_part, thin_part in zip(wide.weights, thin.weights, strict=True):
        for name, view in wide_part.named().items():
            layer, dot, last = name.rpartition(".")
            values = wide.stages[0].U.t() @ view if last in names else view
            thin_part.named()[layer + dot + names.get(last, last)].copy_(values)
    torch.testing.assert_close(wide.backward(tokens()), thin.backward(tokens()), rtol=1e-12, atol=1e-12)
    expected = thin.gradients()
    for name, gradient in wide.gradients().items():
        layer, dot, last = name.rpartition(".")
        values = wide.stages[0].U.t() @ gradient if last in names else gradient
        other = expected[layer + dot + names.get(last, last)]
        torch.testing.assert_close(values, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("full_rank_tail", [False, True])
def test_a_hundred_steps_and_a_new_basis_stay_in_the_span(full_rank_tail: bool) -> None:
    chain = Chain(attrs.evolve(CONFIG, layers=(2, 1, 1), full_rank_tail=full_rank_tail))
    window = chain.stages[-1].window = subspace.Window(CONFIG.d)
    first, start = float(chain.backward(tokens()).mean()), chain.stages[0].U
    for step in range(1, 101):
        chain.backward(tokens(step % 4))
        chain.step(step)
        if step != 50:
            continue
        assert chain.farthest() < 1e-5
        old = subspace.Basis(chain.stages[0].U)
        new = window.moved(old, 1.0)
        assert new.version == 1
        assert window.passed(new.U) > window.passed(old.U)
        for stage, optimizer in zip(chain.stages, chain.optimizers, strict=True):
            stage.use(new)
            subspace.switch(optimizer, old.U, stage.U)
            if optimizer.weights.layout.constrained:
                moments = optimizer.weights.layout.constrained_views(optimizer.moments.exp_avg)
                assert max(subspace.outside(moment, stage.U) for moment in moments) < 1e-5
    assert subspace.outside(chain.stages[0].U, start) > 1e-3
    assert chain.farthest() < 1e-5
    assert float(chain.backward(tokens()).mean()) < first


def test_the_basis_moves_toward_the_gradient() -> None:
    torch.manual_seed(0)
    U = subspace.Basis(subspace.basis(16, 3, SEED))
    window = subspace.Window(16)
    with pytest.raises(LocalError, match="nowhere to move"):
        window.moved(U, 1.0)
    for _ in range(3):
        window.add(torch.randn(2, 5, 1) * torch.ones(16) + 0.1 * torch.randn(2, 5, 16))
    shares = [window.passed(U.U)]
    for version in range(1, 6):
        U = window.moved(U, 1.0)
        assert U.version == version
        torch.testing.assert_close(U.U.T @ U.U, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
        shares.append(window.passed(U.U))
    assert shares == sorted(shares)
    assert shares[-1] > 0.9
    still = window.moved(U, 1e-9)
    torch.testing.assert_close(still.U, U.U, rtol=0, atol=1e-8)  # continuous: no sign flips


def test_what_follows_the_last_projection_decides_whether_its_gradient_leaves_the_span() -> None:
    """Behind a boundary w2's gradient is in span(U), wo's is not; elementwise Adam leaves it even so."""
    chain = Chain(attrs.evolve(CONFIG, layers=(1, 5)), torch.float64)
    chain.backward(tokens())
    weights, U = chain.weights[0], chain.stages[0].U
    gradients = weights.layout.views(weights.gradient)
    assert subspace.outside(gradients["layers.0.w2"], U) < 1e-12
    assert subspace.outside(gradients["layers.0.wo"], U) > 0.1
    w2 = weights.named()["layers.0.w2"].clone()
    gradient, step = gradients["layers.0.w2"], 1e-2
    elementwise = gradient / (gradient.square().sqrt() + 1e-8)
    columns = gradient / (gradient.square().mean(0).sqrt() + 1e-8)
    assert subspace.outside(step * elementwise, U) > 0.1
    assert subspace.outside(w2 - step * columns, U) < 1e-12


def test_a_learned_scale_behind_a_constrained_matrix_loses_at_the_boundary() -> None:
    U = subspace.basis(32, 8, SEED)
    branch = torch.randn(5, 8, dtype=torch.float64) @ U.T
    unit = F.rms_norm(branch, (32,))
    scale = 1 + 0.3 * torch.randn(32, dtype=torch.float64)
    assert subspace.outside(unit.T, U) < 1e-12
    assert subspace.outside((unit * scale).T, U) > 0.1


def test_the_second_moment_is_that_of_adam_averaged_over_a_column() -> None:
    torch.manual_seed(0)
    U = subspace.basis(8, 3, SEED)
    W = (U @ torch.randn(3, 5, dtype=torch.float64)).contiguous()
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    expected, em, ev = W.clone(), torch.zeros_like(W), torch.zeros(5, dtype=torch.float64)
    for updates in range(4):
        g = torch.randn_like(W)
        subspace.adamw_columns(
            W, g, m, v, U, updates=updates, lr=0.1, beta1=0.9, beta2=0.95, weight_decay=0.2, eps=1e-8
        )
        em, ev = 0.9 * em + 0.1 * g, 0.95 * ev + 0.05 * g.square().mean(0)
        unit = em / (1 - 0.9 ** (updates + 1)) / ((ev / (1 - 0.95 ** (updates + 1))).sqrt() + 1e-8)
        expected = U @ U.T @ (expected * (1 - 0.1 * 0.2) - 0.1 * unit)
        torch.testing.assert_close(W, expected)
        torch.testing.assert_close(v, ev.expand_as(v))


def test_where_constrained_matrices_lie() -> None:
    """Together, behind what else decays; none in a full-rank tail, none as shipped."""
    config = attrs.evolve(CONFIG, layers=(1, 2), full_rank_tail=True)
    head, tail = (Layout.of(parameter_specs(config, stage)) for stage in range(2))
    assert [spec.name for spec in head.specs if spec.constrained] == ["layers.0.wo", "layers.0.w2"]
    assert head.specs[-1].constrained
    assert head.constrained[-1][1] <= head.decayed
    assert head.constrained[0][0] >= max(
        o for s, o in zip(head.specs, head.offsets, strict=True) if not s.constrained
    )
    assert tail.constrained == ()
    shipped = ModelConfig(d=32, k=8, heads=4, kv_heads=2, head_dim=8, ffn=48, seq=24, layers=(1, 1))
    assert shipped.variant == "subspace"
    assert Layout.of(parameter_specs(shipped, 0)).constrained == ()
    with pytest.raises(LocalError, match="need the basis"):
        Optimizer(Weights(parameter_specs(config, 0)), TRAINING)


def test_a_merge_of_single_elements_stays_in_the_span() -> None:
    compute = StageCompute(attrs.evolve(CONFIG, layers=(1, 1)), attrs.evolve(TRAINING, slice_fraction=0.2), 0)
    packed = compute.pack(0)
    mean = packed.values + 0.1 * torch.randn(packed.values.shape, generator=torch.Generator().manual_seed(0))
    outcome = Outcome(
        number=0, slice_index=0, members=(), fraction=1.0, vector=bytearray(mean.numpy().tobytes()),
        averaged=[(0, mean.numel())], contributors=[], checksum="", drops=(), payload_out=0, payload_in=0,
        weight_total=2.0,
    )  # fmt: skip
    before = compute.weights.flat.clone()
    assert compute.merge(packed, outcome) > 0
    matrices = compute.weights.layout.constrained_views(compute.weights.flat)
    assert max(subspace.outside(matrix, compute.stage.U) for matrix in matrices) < 1e-5
    olds = compute.weights.layout.constrained_views(before)
    assert all(not torch.equal(matrix, old) for matrix, old in zip(matrices, olds, strict=True))
