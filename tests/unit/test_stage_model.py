"""The model against itself in other forms: cut or whole, chunked or not, batched or one by one, autograd."""

# mypy: disable-error-code="no-untyped-call"

import math

import attrs
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stage import functions, genesis, kernels
from stage.config import ModelConfig
from stage.model import Stage, TailLoss, basis, document_index, parameter_specs
from stage.weights import Version, Weights

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

SEED = 11
CONFIG = ModelConfig(d=32, k=8, heads=4, kv_heads=2, head_dim=8, ffn=48, seq=24, layers=(3,), vocab=64)
CUT = attrs.evolve(CONFIG, layers=(1, 1, 1))


def make(config: ModelConfig, stage: int, dtype: torch.dtype) -> tuple[Stage, Weights]:
    start = genesis.genesis(config, stage, SEED)
    weights = Weights(parameter_specs(config, stage), dtype=dtype)
    weights.writable().copy_(start.flat)
    return Stage(config, stage, SEED, dtype=dtype), weights


def tokens(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab, (batch, CONFIG.seq + 1), generator=generator)


def train(parts: list[tuple[Stage, Weights]], ids: Tensor, docs: Tensor | None = None) -> Tensor:
    """Forward and backward through a chain of stages; the losses."""
    held: list[tuple[Version, Tensor | None, Tensor | TailLoss]] = []
    c: Tensor | None = None
    for stage, weights in parts:
        version = weights.begin()
        c_in = c.detach().requires_grad_() if c is not None else None
        out = stage.forward(version.leaves, ids, c_in, docs=docs)
        held.append((version, c_in, out))
        c = out if isinstance(out, Tensor) else None
    dc: Tensor | None = None
    losses = torch.empty(0)
    for version, c_in, out in reversed(held):
        if isinstance(out, TailLoss):
            losses = out.losses
            out.total.backward()
        else:
            out.backward(dc)
        dc = c_in.grad if c_in is not None else None
        version.release()
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("with_docs", [False, True])
def test_chained_stages_equal_the_whole_model(dtype: torch.dtype, tolerance: float, with_docs: bool) -> None:
    ids = tokens()
    docs = document_index((5, 17), CONFIG.seq).expand(2, -1) if with_docs else None
    whole = [make(CONFIG, 0, dtype)]
    chain = [make(CUT, stage, dtype) for stage in range(3)]
    expected = train(whole, ids, docs)
    torch.testing.assert_close(train(chain, ids, docs), expected, rtol=tolerance, atol=tolerance)
    gradients = whole[0][1].layout.views(whole[0][1].gradient)
    seen = set()
    for _, weights in chain:
        for name, gradient in weights.layout.views(weights.gradient).items():
            torch.testing.assert_close(gradient, gradients[name], rtol=tolerance, atol=tolerance)
            seen.add(name)
    assert seen == set(gradients)


def test_a_batch_is_the_sum_of_its_sequences() -> None:
    ids = tokens(3)
    together, alone = make(CONFIG, 0, torch.float64), make(CONFIG, 0, torch.float64)
    losses = train([together], ids)
    ones = torch.cat([train([alone], ids[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(losses, ones, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together[1].gradient, alone[1].gradient, rtol=1e-11, atol=1e-12)


def test_weights_of_tickets_scale_the_gradient_and_not_the_loss() -> None:
    ids = tokens(2)
    stage, weights = make(CONFIG, 0, torch.float64)
    out = stage.forward(weights.begin().leaves, ids, weights=torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert isinstance(out, TailLoss)
    torch.testing.assert_close(out.total, out.losses[0] + 3 * out.losses[1])


def test_the_future_and_other_documents_are_not_seen() -> None:
    stage, weights = make(CUT, 0, torch.float64)
    leaves = weights.begin().leaves
    ids = tokens(1)
    docs = document_index((10,), CONFIG.seq).unsqueeze(0)
    before = stage.forward(leaves, ids, docs=docs)
    changed = ids.clone()
    changed[0, 9] = (changed[0, 9] + 1) % CONFIG.vocab
    after = stage.forward(leaves, changed, docs=docs)
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    assert torch.equal(before[0, :9], after[0, :9])
    assert not torch.equal(before[0, 9], after[0, 9])
    assert torch.equal(before[0, 10:], after[0, 10:])


def test_a_document_in_a_row_reads_as_if_it_were_alone() -> None:
    stage, weights = make(CUT, 0, torch.float64)
    leaves = weights.begin().leaves
    ids = tokens(1)
    row = stage.forward(leaves, ids, docs=document_index((10,), CONFIG.seq).unsqueeze(0))
    alone = stage.forward(leaves, ids[:, 10:])
    assert isinstance(row, Tensor)
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(row[:, 10:], alone, rtol=1e-12, atol=1e-12)


def test_the_branch_norm_is_the_full_width_rms_norm() -> None:
    U = basis(32, 8, SEED)
    torch.testing.assert_close(U.T @ U, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-12)
    z = torch.randn(5, 8, dtype=torch.float64)
    added = functions.AddUnit.apply(torch.zeros_like(z), z, 32, 1e-5)
    torch.testing.assert_close(added @ U.T, F.rms_norm(z @ U.T, (32,), eps=1e-5))


def test_the_boundary_carries_all_of_the_residual_stream() -> None:
    """h of the next stage, computed at full width, is what c and the token table give."""
    stage, weights = make(CUT, 0, torch.float64)
    ids = tokens(1)
    out = stage.forward(weights.begin().leaves, ids)
    assert isinstance(out, Tensor)
    fixed = kernels.token_table(ids[:, :-1].contiguous(), CONFIG.d, SEED, CONFIG.f_scale).double()
    h = out @ stage.U.T + fixed
    torch.testing.assert_close((h - fixed) @ stage.U, out, rtol=1e-6, atol=1e-7)


def test_written_out_backward_passes() -> None:
    torch.manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    U, fixed = basis(12, 4, SEED), torch.randn(2, 5, 12, dtype=torch.float64)
    angle = torch.rand(5, 1, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda c, g: functions.ReadNorm.apply(c, fixed, U, g, 1e-5), (rand(2, 5, 4), rand(12))
    )
    assert torch.autograd.gradcheck(
        lambda c, z: functions.AddUnit.apply(c, z, 12, 1e-5), (rand(2, 5, 4), rand(2, 5, 4))
    )
    assert torch.autograd.gradcheck(
        lambda x: functions.NormRotate.apply(x, angle.cos(), angle.sin(), 1e-5), (rand(2, 5, 3, 6),)
    )


@pytest.mark.parametrize("chunk", [1, 7 * 20, 1 << 22])
def test_chunked_cross_entropy_equals_torch(chunk: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    out = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    targets, counts = torch.randint(0, 20, (2, 9)), torch.tensor([1.0, 2.0], dtype=torch.float64)
    total, losses = functions.CrossEntropy.apply(x, out, targets, counts, True, chunk)
    (3 * total).backward()
    grads, (x.grad, out.grad) = (x.grad, out.grad), (None, None)
    each = F.cross_entropy((x @ out.T).flatten(0, 1), targets.flatten(), reduction="none").view(2, 9).mean(1)
    (3 * (each * counts).sum()).backward()
    torch.testing.assert_close(losses, each)
    torch.testing.assert_close(grads, (x.grad, out.grad))


def test_genesis_is_the_same_everywhere_and_starts_near_uniform() -> None:
    first, second = genesis.genesis(CUT, 1, SEED), genesis.genesis(CUT, 1, SEED)
    assert torch.equal(first.flat, second.flat)
    assert not torch.equal(first.flat, genesis.genesis(CUT, 1, SEED + 1).flat)
    whole = genesis.genesis(CONFIG, 0, SEED).named()
    for name, tensor in first.named().items():
        assert torch.equal(tensor, whole[name]), name
    losses = train([make(CONFIG, 0, torch.float32)], tokens())
    assert abs(float(losses.mean()) - math.log(CONFIG.vocab)) < 0.3


def test_evaluation_makes_no_gradient() -> None:
    stage, weights = make(CONFIG, 0, torch.float32)
    with torch.no_grad():
        out = stage.forward(weights.named(), tokens())
    assert isinstance(out, TailLoss)
    assert not out.total.requires_grad
    assert not bool(weights.gradient.any())
