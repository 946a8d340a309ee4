"""The arms of the fidelity suite run, differ where they should, and keep their budgets."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from stage.config import ModelConfig
from stage.data import Source

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

BASE = ModelConfig(
    d=32, k=4, heads=2, kv_heads=1, head_dim=16, ffn=48, seq=16, layers=(1, 1, 1), f_scale=3.0
)  # fmt: skip


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import fidelity

    monkeypatch.setattr(sys.modules["fidelity_run"], "EVAL_ROWS", 8)
    return fidelity


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of a text that is easy to learn\n" for i in range(300)))
    return path


def test_every_arm_trains(suite: Any, text: Path) -> None:
    source = Source(text, BASE.seq, 2)
    losses = {}
    for name, arm in suite.arms(BASE).items():
        how = suite.training(arm, 1e-2, 1, 2, 4)
        moving = 1 if arm.move_every else 0
        curve = suite.train(name, arm.model, how, source, arm.stage, "cpu", moving)
        assert math.isfinite(curve.loss)
        assert curve.tokens == 2 * 4 * BASE.seq
        losses[name] = curve.loss
    assert losses["wire/int8-int8"] != losses["subspace"]
    assert losses["wire/int8-int8"] == pytest.approx(losses["subspace"], abs=0.01)
    assert len(set(losses.values())) > len(losses) // 2


def test_budgets(suite: Any) -> None:
    arms = suite.arms(BASE)
    assert arms["subspace"].parameters < arms["ffn/wider"].parameters
    dense = arms["dense/small-embedding"].parameters
    assert 0.95 * dense < arms["ffn/wider"].parameters <= dense
    assert arms["constrained/fixed"].parameters > arms["subspace"].parameters


def test_it_reports_the_best_learning_rate_of_each_arm(
    suite: Any, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    monkeypatch.setitem(suite.SIZES, "small", BASE)
    monkeypatch.setattr(suite, "Source", lambda path, seq, seed: Source(text, seq, seed))
    options = ["--arm", "subspace", "--steps", "2", "--batch", "2", "--lr", "1e-3", "--lr", "1e-2"]
    options += ["--seed", "1", "--seed", "2"]
    result = CliRunner().invoke(suite.main, [*options, "--json"], catch_exceptions=False)
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert len(lines) == 5
    runs, last = lines[:4], lines[4]
    means = {lr: sum(run["loss"] for run in runs if run["lr"] == lr) / 2 for lr in (1e-3, 1e-2)}
    assert last["best"] == pytest.approx(min(means.values()), abs=1e-3)
    assert last["best_lr"] == min(means, key=lambda lr: means[lr])
    assert CliRunner().invoke(suite.main, ["--arm", "none such"]).exit_code == 2


@pytest.fixture
def averaging(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import fidelity_averaging

    return fidelity_averaging


@pytest.fixture
def tiny(averaging: Any, monkeypatch: pytest.MonkeyPatch, text: Path) -> Any:
    """The suite with a model and a text that cost nothing."""
    monkeypatch.setattr(averaging, "EVAL_ROWS", 8)
    model = ModelConfig(
        d=16, k=4, heads=2, kv_heads=1, head_dim=8, ffn=24, seq=8, layers=(1,), rope_theta=100.0
    )  # fmt: skip
    monkeypatch.setattr(averaging, "MODEL", model)
    monkeypatch.setattr(averaging, "CURVE", 2)
    monkeypatch.setitem(averaging.ARMS, "decay/powersgd", averaging.Arm(gradients=True, rank=1, decay=True))
    monkeypatch.setattr(averaging, "Source", lambda path, seq, seed: Source(text, seq, seed))
    return averaging


def test_averaging_is_judged_arm_by_arm(tiny: Any) -> None:
    names = ["gradients", "none", "decay/gradients", "decay/powersgd", "decay/ema", "decay/newcomer"]
    options = ["--steps=2", "--replicas=2", "--seed=1", "--seed=2", "--lr=1e-3", "--lr=1e-2"]
    arms = [option for name in names for option in ("--arm", name)]
    result = CliRunner().invoke(tiny.main, [*options, *arms, "--json"], catch_exceptions=False)
    lines = {line["arm"]: line for line in map(json.loads, result.output.splitlines()) if "gap" in line}
    assert list(lines) == names
    for name, line in lines.items():
        assert len(line["seeds"]) == 2
        assert all(map(math.isfinite, line["seeds"]))
        assert len(line["grid"]) == (1 if tiny.ARMS[name].newcomer else 2)
    assert lines["gradients"]["gap"] == lines["decay/gradients"]["gap"] == 0
    assert lines["none"]["mb"] == 0 < lines["decay/ema"]["mb"] < lines["gradients"]["mb"] / 10
    assert lines["decay/ema"]["mb"] < lines["decay/powersgd"]["mb"] < lines["gradients"]["mb"]
    assert lines["decay/newcomer"]["bump"] is not None


def test_all_weights_averaged_every_step_are_equal(tiny: Any) -> None:
    result = tiny.train("decay/full", tiny.ARMS["decay/full"], 1e-2, 1, 3, 3, tiny.Text.of(1, 3 * 3 * 8))
    assert result.disagreement < 1e-6
    assert result.loss == pytest.approx(result.one, abs=1e-3)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_averages_late_and_in_slices_lose_in_the_order_of_their_rules(averaging: Any) -> None:
    """One seed of the table in docs/benchmarks.md, each arm with its best learning rate."""
    steps = 640  # 32 coverages: after 8 the rules are as far apart as chance puts them
    text = averaging.Text.of(1, steps * 4 * averaging.BATCH)
    lrs = {"gradients": 4e-3, "ema": 4e-3, "delta": 4e-3, "overwrite": 1.2e-2, "none": 4e-3}
    loss = {
        name: averaging.train(name, averaging.ARMS[name], lr, 1, steps, 4, text).loss
        for name, lr in lrs.items()
    }
    assert loss["ema"] <= loss["delta"] + 0.005
    assert loss["delta"] < loss["overwrite"] < loss["none"]
    assert loss["gradients"] < loss["ema"] < 1.09 * loss["gradients"]
