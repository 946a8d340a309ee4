"""Robust means: one bad contributor of five moves nothing far, honest ones get their mean."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import LocalError, RemoteError
from stage.robust import RULES, RobustReducer, reducer

FLOATS = 300


def reduced(rule: str, rows: list[numpy.ndarray], weights: list[float]) -> numpy.ndarray:
    one = reducer(rule)(FLOATS * 4)
    for row, weight in zip(rows, weights, strict=True):
        one.add(row.astype("<f4").tobytes(), weight)
    return numpy.frombuffer(one.finish(), "<f4")


def honest(seed: int, count: int) -> list[numpy.ndarray]:
    """Replicas of one stage: the same numbers but for what a few steps of their own changed."""
    generator = numpy.random.default_rng(seed)
    base = generator.normal(size=FLOATS)
    return [base + 0.02 * generator.normal(size=FLOATS) for _ in range(count)]


POISONS = {
    "negated": lambda row, _: -row,
    "thousandfold": lambda row, _: 1000 * row,
    "enormous": lambda row, _: 1e30 * row,
    "random": lambda row, generator: generator.normal(size=FLOATS),
    "stale": lambda row, generator: row + 0.4 * generator.normal(size=FLOATS),
    "shifted": lambda row, _: row + 1.0,
    "zero": lambda row, _: 0 * row,
}


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(RULES)), st.sampled_from(sorted(POISONS)), st.integers(0, 1 << 30))
def test_one_bad_contributor_of_five_moves_the_mean_by_less_than_honest_ones_differ(
    rule: str, poison: str, seed: int
) -> None:
    rows = honest(seed, 4)
    mean = numpy.mean(rows, axis=0)
    apart = max(float(numpy.linalg.norm(row - mean)) for row in rows)
    bad = POISONS[poison](rows[seed % 4], numpy.random.default_rng(seed + 1))
    rows.insert(seed % 5, bad)
    result = reduced(rule, rows, [1.0] * 5)
    assert float(numpy.linalg.norm(result - mean)) < apart


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.lists(st.floats(0.3, 4), min_size=9, max_size=9), st.integers(0, 1 << 30))
def test_among_honest_ones_clipping_is_the_weighted_mean(count: int, weights: list[float], seed: int) -> None:
    rows = [row.astype("<f4") for row in honest(seed, count)]
    exact = numpy.average(numpy.stack(rows).astype(float), axis=0, weights=weights[:count])
    assert reduced("clip", rows, weights[:count]) == pytest.approx(exact, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("count", [1, 2])
def test_two_contributors_get_their_weighted_mean(rule: str, count: int) -> None:
    rows = honest(3, 1) + [row * 50 for row in honest(4, count - 1)]
    exact = numpy.average(rows, axis=0, weights=[1.0, 3.0][:count])
    assert reduced(rule, rows, [1.0, 3.0][:count]) == pytest.approx(exact, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_contributors_that_agree_are_left_alone(rule: str) -> None:
    row = honest(5, 1)[0].astype("<f4")
    assert reduced(rule, [row] * 4, [1.0, 2.0, 1.0, 4.0]) == pytest.approx(row, rel=1e-6)


@pytest.mark.parametrize("rule", ["none", *sorted(RULES)])
@pytest.mark.parametrize("bad", [numpy.nan, numpy.inf, -numpy.inf, 3e38])
def test_what_is_not_usable_is_refused_by_every_rule(rule: str, bad: float) -> None:
    one = reducer(rule)(FLOATS * 4)
    rows = [row.astype("<f4") for row in honest(6, 2)]
    spoiled = rows[0].copy()
    spoiled[FLOATS // 2] = bad
    one.add(rows[0].tobytes(), 1.0)
    with pytest.raises(RemoteError):
        one.add(spoiled.tobytes(), 1.0)
    with pytest.raises(RemoteError):
        one.add(rows[0].tobytes()[:-4], 1.0)
    one.add(rows[1].tobytes(), 1.0)
    mean = numpy.frombuffer(one.finish(), "<f4")
    assert mean == pytest.approx((rows[0] + rows[1]) / 2, rel=1e-5, abs=1e-6)


def test_misuse() -> None:
    for nbytes in (0, 3):
        with pytest.raises(LocalError):
            RobustReducer(nbytes, RULES["clip"])
    one = RobustReducer(4, RULES["clip"])
    with pytest.raises(LocalError):
        one.finish()
    with pytest.raises(LocalError):
        one.add(bytes(4), 0.0)
