"""The one-process yardstick: it learns, and the same seed gives the same bits."""

from pathlib import Path

import pytest
import torch

from stage.chained import Chain
from stage.config import ModelConfig, TrainingConfig
from stage.data import Source

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

MODEL = ModelConfig(d=32, k=8, heads=2, kv_heads=1, head_dim=16, ffn=48, seq=32, layers=(1, 1), f_scale=3.0)
TRAINING = TrainingConfig(seed=3, lr=2e-2, warmup_steps=2, total_steps=12, target_batch=4)


def train(source: Source, steps: int) -> list[float]:
    chain, losses = Chain(MODEL, TRAINING), []
    for step in range(steps):
        losses += [chain.microbatch(source.row(0, 4 * step + i)) for i in range(4)]
        chain.step(step + 1)
    return [*losses, chain.evaluate(source.held_out(1)[0])]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text that is easy to learn\n" for i in range(300)))
    return Source(path, MODEL.seq, TRAINING.seed)


def test_it_learns(source: Source) -> None:
    losses = train(source, 12)
    assert losses[0] == pytest.approx(5.55, abs=0.2)
    assert losses[-1] < 0.6 * losses[0]


def test_the_same_seed_gives_the_same_bits(source: Source) -> None:
    assert train(source, 3) == train(source, 3)
