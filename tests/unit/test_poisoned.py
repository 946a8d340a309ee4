"""One contributor of five is poisoned: with a rule the others train on, without one its NaN is refused."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.robust import RULES

torch.set_num_threads(1)  # OpenMP spins while it waits, and other tests need the cores

STEPS = 160
"""More than the rounds that a stale contributor is behind; as in docs/benchmarks.md."""
BY = 1.03


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import poison

    return poison


@cache
def honest(steps: int) -> float:
    import poison

    return poison.others_loss("none", None, steps, 1)


@pytest.mark.parametrize("kind", ["nan", "infinite"])
def test_what_is_not_finite_is_refused_without_a_rule(poison: Any, kind: str) -> None:
    loss = poison.others_loss("none", kind, 4, 1)
    assert math.isfinite(loss)
    assert loss < 1.05 * honest(4)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["negated", "thousandfold", "random", "stale"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_with_a_rule_the_others_lose_less_than_three_percent(poison: Any, rule: str, kind: str) -> None:
    assert poison.others_loss(rule, kind, STEPS, 1) < BY * honest(STEPS)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_without_a_rule_the_same_poison_ruins_them(poison: Any) -> None:
    assert poison.others_loss("none", "negated", STEPS, 1) > 1.1 * honest(STEPS)
