"""Ways to compute one stage: each gives the gradients and the training of the plain one."""

import hashlib

import attrs
import pytest
import torch

from stage.compute import StageCompute, wire_shape
from stage.config import ModelConfig, TrainingConfig
from stage.messages import Request
from stage.moments import GROUP, Moments8
from stage.settings import ComputeSettings, GraphMode
from stage.ticket import Ticket

torch.set_num_threads(1)

MODEL = ModelConfig(
    d=64, k=8, heads=2, kv_heads=1, head_dim=32, ffn=96, seq=16, layers=(2, 2, 2), vocab=64,
    full_rank_tail=True,
)  # fmt: skip
TRAINING = TrainingConfig(seed=3, lr=1e-2, warmup_steps=2, total_steps=20)


def request(ids: bytes) -> Request:
    ticket = Ticket(
        run="r", trainer="", kind="train", shard=0, position=0, ids_hash=hashlib.sha256(ids).digest(),
        weight=1.0,
    )  # fmt: skip
    return Request(
        ticket=ticket, clock=[], basis=0, path=[], tokens=MODEL.seq, documents=[5], dtype="fp32",
        dtype_back="fp32", inline=True, deadline_s=9.0,
    )  # fmt: skip


def train(stage: int, settings: ComputeSettings, steps: int = 3) -> StageCompute:
    """Steps of two microbatches each, whose graphs wait for each other."""
    compute = StageCompute(MODEL, TRAINING, stage, settings=settings)
    compute.warm_up()
    shape = wire_shape(MODEL, TRAINING, stage)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        held = []
        for _ in range(2):
            ids = torch.randint(64, (17,), generator=generator, dtype=torch.int32).numpy().tobytes()
            c = torch.randn(shape.c_bytes // 4, generator=generator).numpy().tobytes()
            held.append(compute.forward(request(ids), memoryview(ids), memoryview(c)))
        for each in held:
            dc = torch.randn(shape.next_back_bytes // 4, generator=generator).numpy().tobytes()
            compute.backward(each, memoryview(dc))
        assert compute.step(step) == 2
    return compute


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "settings",
    [ComputeSettings(graph="recompute"), ComputeSettings(optimizer="host")],
    ids=["recompute", "host"],
)
def test_the_same_training_to_the_bit(stage: int, settings: ComputeSettings) -> None:
    plain, other = train(stage, ComputeSettings(graph="retain")), train(stage, settings)
    assert torch.equal(plain.weights.flat, other.weights.flat)
    compute = other.weights.compute
    assert compute is None or torch.equal(compute, plain.weights.flat)


@pytest.mark.long
@pytest.mark.parametrize(("stage", "graph"), [(0, "retain"), (1, "recompute"), (2, "retain")])
def test_compiled_layers_train_as_eager_ones(stage: int, graph: GraphMode) -> None:
    torch.compiler.reset()
    plain = train(stage, ComputeSettings(graph=graph, compile="off"), 2)
    other = train(stage, ComputeSettings(graph=graph, compile="on"), 2)
    assert other.graph_bytes > 0
    for moment in ("exp_avg", "exp_avg_sq"):
        mine, expected = (each.optimizer.moments.read(moment, 0, each.floats) for each in (other, plain))
        assert float((mine - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("graph", ["retain", "recompute"])
def test_bf16_stays_close(graph: str) -> None:
    plain = train(2, ComputeSettings(), 1)
    low = train(2, ComputeSettings(dtype="bf16", graph=graph), 1)  # type: ignore[arg-type]
    assert low.weights.compute is not None
    assert torch.equal(low.weights.compute, low.weights.flat.bfloat16())
    moments = [each.optimizer.moments.read("exp_avg", 0, each.floats) for each in (plain, low)]
    error = torch.linalg.vector_norm(moments[0] - moments[1]) / torch.linalg.vector_norm(moments[0])
    assert float(error) < 0.05


def test_a_small_budget_recomputes_and_copies_nothing() -> None:
    compute = StageCompute(MODEL, TRAINING, 1, settings=ComputeSettings(memory_gib=1e-6))
    decision = compute.warm_up()
    assert (decision.graphs, decision.versions, compute.weights.max_copies) == (0, 0, 0)
    assert not bool(compute.weights.gradient.any())
    assert StageCompute(MODEL, TRAINING, 1).warm_up().graphs == 8


def test_8bit_moments_come_back_to_the_bit_and_never_lose_v() -> None:
    size = 64 * GROUP
    generator = torch.Generator().manual_seed(2)
    spread = torch.exp2(-20 * torch.rand(size, generator=generator))
    m = torch.randn(size, generator=generator) * spread
    v = m.square() + 1e-12
    v[:GROUP] = m[:GROUP] = 0.0
    moments = Moments8(torch.zeros(size))
    assert moments.nbytes == 2 * size + 8 * size // GROUP
    moments.write("exp_avg", 0, m)
    moments.write("exp_avg_sq", 0, v)
    first = [moments.read(name, 0, size) for name in ("exp_avg", "exp_avg_sq")]  # type: ignore[arg-type]
    assert bool((first[1][GROUP:] > 0).all())
    assert not bool(first[1][:GROUP].any())
    assert not bool(first[0][:GROUP].any())
    near = v[GROUP:].view(-1, GROUP) > v[GROUP:].view(-1, GROUP).amax(1, keepdim=True) * 2**-31
    ratio = (first[1] / v)[GROUP:].view(-1, GROUP)[near]
    assert float(ratio.min()) > 0.95
    assert float(ratio.max()) < 1.05
    again = Moments8(torch.zeros(size))
    again.write("exp_avg", 0, first[0])
    again.write("exp_avg_sq", 0, first[1])
    assert torch.equal(again.read("exp_avg", 0, size), first[0])
    assert torch.equal(again.read("exp_avg_sq", 0, size), first[1])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_8bit_trains_as_fp32_does(seed: int) -> None:
    """200 steps on a regression: the last losses are within a tenth of each other."""
    from stage.optimizer import Optimizer
    from stage.parameters import ParameterSpec
    from stage.weights import Weights

    training = attrs.evolve(TRAINING, lr=3e-3, total_steps=250, weight_decay=0.0)
    last = []
    for kind in ("device", "8bit"):
        torch.manual_seed(seed)
        specs = [ParameterSpec("a", (64, 32), True, 1.0), ParameterSpec("b", (1, 64), True, 1.0)]
        weights = Weights(specs)
        optimizer = Optimizer(weights, training, kind=kind)  # type: ignore[arg-type]
        weights.writable().normal_(std=0.2)
        target, losses = torch.randn(32), []
        for step in range(1, 221):
            x = torch.randn(64, 32)
            version = weights.begin()
            out = (torch.tanh(x @ version.leaves["a"].t()) @ version.leaves["b"].t()).squeeze(1)
            loss = (out - torch.sin(x @ target)).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            version.release()
            optimizer.step(step, 1)
            losses.append(float(loss.detach()))
        last.append(sum(losses[-40:]) / 40)
    assert last[1] == pytest.approx(last[0], rel=0.1)
