"""The model against itself in other forms: cut or whole, chunked or not, batched or one by one, autograd."""

# mypy: disable-error-code="no-untyped-call"

import math

import attrs
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn import functional as F

from stage import functions, genesis, kernels
from stage.config import ModelConfig
from stage.model import Stage, TailLoss, document_index
from stage.parameters import parameter_specs
from stage.subspace import basis
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
            out.backward()
            losses = out.losses
        else:
            out.backward(dc)
        dc = c_in.grad if c_in is not None else None
        version.release()
    return losses


CUTS = [(6,), (3, 3), (2, 1, 3), (1, 2, 2, 1), (1, 1, 1, 1, 2), (1, 1, 1, 1, 1, 1)]


@pytest.mark.parametrize("layers", CUTS[1:], ids=len)
@pytest.mark.parametrize("with_docs", [False, True])
def test_a_boundary_changes_neither_loss_nor_gradient(layers: tuple[int, ...], with_docs: bool) -> None:
    """Two to six stages against the same layers in one piece, in float64."""
    ids = tokens()
    docs = document_index((5, 17), CONFIG.seq).expand(2, -1) if with_docs else None
    config = attrs.evolve(CONFIG, layers=layers)
    whole = [make(attrs.evolve(CONFIG, layers=CUTS[0]), 0, torch.float64)]
    chain = [make(config, stage, torch.float64) for stage in range(config.stages)]
    expected = train(whole, ids, docs)
    torch.testing.assert_close(train(chain, ids, docs), expected, rtol=1e-12, atol=1e-12)
    gradients = whole[0][1].layout.views(whole[0][1].gradient)
    seen = {}
    for _, weights in chain:
        seen |= weights.layout.views(weights.gradient)
    assert set(seen) == set(gradients)
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-12, atol=1e-12)


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
    together, alone = make(CONFIG, 0, torch.float64), make(CONFIG, 0, torch.float64)
    counts = torch.tensor([1.0, 3.0], dtype=torch.float64)
    out = together[0].forward(together[1].begin().leaves, ids, weights=counts)
    assert isinstance(out, TailLoss)
    out.backward()
    losses = torch.cat([train([alone], ids[[row]]) for row in (0, 1, 1, 1)])
    torch.testing.assert_close(out.losses, losses[:2])
    torch.testing.assert_close(together[1].gradient, alone[1].gradient, rtol=1e-11, atol=1e-12)


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
    assert torch.autograd.gradcheck(lambda c: functions.ReadNorm.apply(c, fixed, U, 1e-5), (rand(2, 5, 4),))
    assert torch.autograd.gradcheck(
        lambda h: functions.ReadWide.apply(h, 1e-5, torch.float64), (rand(2, 5, 12),)
    )
    assert torch.autograd.gradcheck(
        lambda c, z: functions.AddUnit.apply(c, z, 12, 1e-5), (rand(2, 5, 4), rand(2, 5, 4))
    )
    assert torch.autograd.gradcheck(
        lambda x: functions.NormRotate.apply(x, angle.cos(), angle.sin(), 1e-5), (rand(2, 5, 3, 6),)
    )
    assert torch.autograd.gradcheck(functions.Gate.apply, (rand(3, 4), rand(3, 4)))


@pytest.mark.parametrize("chunk", [1, 7 * 20, 1 << 22])
def test_chunked_cross_entropy_equals_torch(chunk: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    out = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    targets, counts = torch.randint(0, 20, (2, 9)), torch.tensor([1.0, 2.0], dtype=torch.float64)
    before = torch.randn_like(out)
    accumulated = before.clone()
    with torch.no_grad():
        losses, dx = functions.output_loss(x, out, targets, counts, accumulated, chunk)
        alone, nothing = functions.output_loss(x, out, targets, counts, None, chunk)
    each = F.cross_entropy((x @ out.T).flatten(0, 1), targets.flatten(), reduction="none").view(2, 9).mean(1)
    (each * counts).sum().backward()
    torch.testing.assert_close(losses, each.detach())
    torch.testing.assert_close(alone, each.detach())
    assert nothing is None
    torch.testing.assert_close((dx, accumulated - before), (x.grad, out.grad))


def test_the_gradient_of_the_output_matrix_is_gathered_in_fp32() -> None:
    """Blocks of the vocabulary, bf16 products, an fp32 accumulator."""
    torch.manual_seed(0)
    x, out = torch.randn(1, 40, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets, counts = torch.randint(0, 50, (1, 40)), torch.ones(1)
    low, high = torch.zeros(50, 16), torch.zeros(50, 16)
    _, dx = functions.output_loss(x, out, targets, counts, low, 1 << 20)
    functions.output_loss(x.float(), out.float(), targets, counts, high, 1 << 20)
    assert dx is not None
    assert dx.dtype is torch.bfloat16
    assert float((low - high).norm() / high.norm()) < 0.01


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
    assert not out.losses.requires_grad
    assert not bool(weights.gradient.any())


def full_width(
    config: ModelConfig, parts: list[Weights], ids: Tensor, begins: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same model written at full width with torch's own pieces: mean loss a row, gradients by name.

    The residual stream is h throughout; a branch's output projection is the d×inner matrix U·Z, and a norm
    is applied to the branch's full output. Nothing of stage/model.py is used but the basis and the weights.
    """
    named = {
        name: view.clone().requires_grad_() for weights in parts for name, view in weights.named().items()
    }
    U, d = basis(config.d, config.k, SEED), config.d
    tokens_in, length = ids[:, :-1], config.seq
    fixed = kernels.token_table(tokens_in.contiguous(), d, SEED, config.f_scale).double()
    h = named["embed"][tokens_in] @ U.T + fixed
    half = torch.arange(config.head_dim // 2, dtype=torch.float64) / (config.head_dim // 2)
    ends = (*begins[1:], length)
    position = torch.cat([torch.arange(end - begin) for begin, end in zip(begins, ends, strict=True)])
    turn = torch.polar(torch.ones(()).double(), position.double()[:, None] * config.rope_theta**-half)
    unseen = torch.full((length, length), -math.inf).double()
    for begin, end in zip(begins, ends, strict=True):
        unseen[begin:end, begin:end] = unseen[begin:end, begin:end].triu(1)

    def unit(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=config.eps)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.complex(*unit(x).chunk(2, dim=-1)) * turn[:, None]
        return torch.cat((pairs.real, pairs.imag), -1).transpose(1, 2)

    for layer in range(sum(config.layers)):
        at = f"layers.{layer}."
        wo, w2 = (
            named[at + wide] if at + wide in named else U @ named[at + thin]
            for wide, thin in (("wo", "zo"), ("w2", "z2"))
        )
        heads = (unit(h) @ named[at + "qkv"].T).unflatten(-1, (-1, config.head_dim))
        q, k, v = heads.split((config.heads, config.kv_heads, config.kv_heads), dim=2)
        k, v = (x.repeat_interleave(config.heads // config.kv_heads, dim=2) for x in (k, v))
        scores = rotated(q) @ rotated(k).transpose(2, 3) / math.sqrt(config.head_dim)
        scores += unseen
        branch = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
        h = h + unit(branch @ wo.T)
        x = unit(h)
        h = h + unit((F.silu(x @ named[at + "gate"].T) * (x @ named[at + "up"].T)) @ w2.T)
    logits = unit(h) * named["norm_out"] @ named["out"].T
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    losses.sum().backward()
    return losses.detach(), {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}


@pytest.mark.parametrize("full_rank_tail", [False, True])
@pytest.mark.parametrize("layers", CUTS, ids=len)
@pytest.mark.parametrize("begins", [(0,), (0, 5, 17)], ids=len)
def test_the_c_native_form_is_the_full_width_model(
    layers: tuple[int, ...], full_rank_tail: bool, begins: tuple[int, ...]
) -> None:
    config = attrs.evolve(CONFIG, layers=layers, full_rank_tail=full_rank_tail)
    parts = [make(config, stage, torch.float64) for stage in range(config.stages)]
    docs = document_index(begins, CONFIG.seq).expand(2, -1) if begins[1:] else None
    losses = train(parts, tokens(), docs)
    expected, gradients = full_width(config, [weights for _, weights in parts], tokens(), begins)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    for _, weights in parts:
        for name, gradient in weights.layout.views(weights.gradient).items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("low", "of_loss", "of_gradient"), [(torch.bfloat16, 5e-3, 0.12), (torch.float16, 1e-3, 0.015)]
)
@pytest.mark.parametrize("full_rank_tail", [False, True])
def test_half_precision_stays_near_fp32(
    full_rank_tail: bool, low: torch.dtype, of_loss: float, of_gradient: float
) -> None:
    config = attrs.evolve(CONFIG, layers=(2, 2), full_rank_tail=full_rank_tail)
    results = {}
    for dtype in (torch.float32, low):
        parts = [make(config, stage, dtype) for stage in range(2)]
        c = parts[0][0].forward(parts[0][1].begin().leaves, tokens())
        assert isinstance(c, Tensor)
        assert c.dtype is torch.float32
        losses = train(parts, tokens())
        assert losses.dtype is torch.float32
        results[dtype] = losses, torch.cat([weights.gradient.float() for _, weights in parts])
    (loss, gradient), (low_loss, low_gradient) = results[torch.float32], results[low]
    torch.testing.assert_close(low_loss, loss, rtol=of_loss, atol=of_loss)
    assert float((low_gradient - gradient).norm() / gradient.norm()) < of_gradient


@pytest.mark.parametrize("k", [8, functions.THIN + 4])
def test_reading_in_bf16_sums_in_fp32(k: int) -> None:
    """bf16 costs the rounding of the token table, x and its gradient: not that of c, U or the sums."""
    torch.manual_seed(0)
    U = basis(256, k, SEED)
    c, fixed, dx = (torch.randn(2, 16, width, dtype=torch.float64) for width in (k, 256, 256))
    fixed, dx = fixed.bfloat16(), dx.bfloat16()
    c_low, c_high = c.float().requires_grad_(), c.float().double().requires_grad_()
    low = functions.ReadNorm.apply(c_low, fixed, U.float(), 1e-5)
    high = functions.ReadNorm.apply(c_high, fixed.double(), U, 1e-5)
    low.backward(dx)
    high.backward(dx.double())
    assert low.dtype is torch.bfloat16
    assert c_low.grad is not None
    assert c_low.grad.dtype is torch.float32
    bound = 2**-8  # half a unit in the last place of bf16, twice: h and x
    torch.testing.assert_close(low.double(), high, rtol=2 * bound, atol=1e-3)
    assert float((c_low.grad.double() - c_high.grad).norm() / c_high.grad.norm()) < bound


@pytest.mark.long
@pytest.mark.parametrize("full_rank_tail", [False, True])
def test_a_compiled_layer_is_the_layer(full_rank_tail: bool) -> None:
    """One graph without breaks, which serves every layer of the stage."""
    torch.compiler.reset()
    config = attrs.evolve(CONFIG, layers=(1, 2), full_rank_tail=full_rank_tail)
    stage, weights = make(config, 1, torch.float32)
    prepared, leaves = stage.prepare(tokens()), weights.begin().leaves
    torch.manual_seed(0)
    state = torch.randn(2, CONFIG.seq, CONFIG.d if full_rank_tail else CONFIG.k, requires_grad=True)
    weigh = torch.arange(state.numel()).view_as(state).cos()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    results = []
    for block in (stage.block, torch.compile(stage.block, fullgraph=True, backend=graphs)):
        stage.block = block  # type: ignore[method-assign]
        weights.zero_gradient()
        state.grad = None
        after = stage.layer(leaves, 2, stage.layer(leaves, 1, state, prepared), prepared)
        # Once: a compiled backward pass may write over what its forward pass kept.
        (after * weigh).sum().backward(inputs=[state, *leaves.values()])
        assert state.grad is not None
        results.append((after.detach(), state.grad, weights.gradient.clone()))
    assert graphs.frame_count == 1
    for eager, compiled in zip(*results, strict=True):
        assert float((compiled - eager).norm() / eager.norm()) < 5e-6
