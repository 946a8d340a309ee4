"""Replicas in one process: one of each stage is plain training, several are averaged; claims are judged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.chained import Chain
from stage.config import ModelConfig, TrainingConfig
from stage.data import Source

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

MODEL = ModelConfig(
    d=32, k=4, heads=2, kv_heads=1, head_dim=16, ffn=48, seq=16, layers=(1, 1, 1), f_scale=3.0
)  # fmt: skip
BATCH, STEPS = 16, 4


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import convergence

    return convergence


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text that is easy to learn\n" for i in range(400)))
    return Source(path, MODEL.seq, 2)


def training(**how: Any) -> TrainingConfig:
    every = {"lr": 1e-2, "target_batch": BATCH, "warmup_steps": 1, "total_steps": STEPS, "average_every": 1}
    return TrainingConfig(seed=3, **(every | how))


def train(suite: Any, source: Source, replicas: int, **how: Any) -> Any:
    run = suite.Replicas(MODEL, training(**how), replicas)
    for step in range(STEPS):
        run.step(step + 1, [source.row(0, step * BATCH + number) for number in range(BATCH)])
    run.finish()
    return run


def test_one_replica_is_plain_training(suite: Any, source: Source) -> None:
    run, chain, held_out = train(suite, source, 1), Chain(MODEL, training()), source.held_out(16)
    for step in range(STEPS):
        for number in range(BATCH):
            chain.microbatch(source.row(0, step * BATCH + number))
        chain.step(step + 1)
    expected = sum(map(chain.evaluate, held_out)) / len(held_out)
    assert run.loss(held_out) == pytest.approx(expected, rel=1e-4)


def test_replicas_are_averaged(suite: Any, source: Source) -> None:
    whole = train(suite, source, 2, slice_fraction=1.0)
    slices = train(suite, source, 2, slice_fraction=0.25)
    never = train(suite, source, 2, average_every=STEPS + 1)
    assert whole.disagreement() < slices.disagreement() < never.disagreement()
    taken = [member.optimizers[0].updates for member in slices.members]
    assert taken == [STEPS, STEPS]


def test_weights_that_were_left_are_judged_as_they_are(suite: Any, source: Source) -> None:
    run, held_out = train(suite, source, 2), source.held_out(16)
    judge = suite.Replicas(MODEL, training(), 2)
    judge.load([[member.weights[stage].flat for member in run.members] for stage in range(MODEL.stages)])
    assert judge.loss(held_out) == run.loss(held_out)
    judge.load([[run.members[0].weights[stage].flat] for stage in range(MODEL.stages)])
    assert judge.disagreement() == 0.0
    assert judge.loss(held_out) != run.loss(held_out)


@pytest.mark.parametrize(("off", "verdict"), [(0.005, "holds"), (0.03, "fails"), (-0.03, "fails")])
def test_verdicts(suite: Any, off: float, verdict: str) -> None:
    results = [
        {"arm": arm, "seed": seed, "loss": (2.5 + 0.1 * seed) * (1 + off * (arm == "swarm-1"))}
        for arm in ("process", "swarm-1")
        for seed in (1, 2, 3)
    ]
    lines = suite.table(json.loads(json.dumps(results)))
    assert len(lines) == 3
    assert lines[-1].endswith(verdict)
