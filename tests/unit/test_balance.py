"""Moves between stages: they help, they end, and no stage is emptied."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.identity import PeerId
from stage.balance import LEAST_GAIN, Move, propose

Rates = list[dict[PeerId, float]]


def stages(*counts: int, rate: float = 1.0) -> Rates:
    numbers = iter(range(sum(counts)))
    return [{PeerId(f"p{next(numbers):03}"): rate for _ in range(count)} for count in counts]


def moved(rates: Rates, work: list[float], move: Move) -> Rates:
    after = [dict(stage) for stage in rates]
    after[move.target][move.peer] = after[move.origin].pop(move.peer) * work[move.origin] / work[move.target]
    return after


def settled(rates: Rates, work: list[float] | None = None, cost_s: float = 30.0) -> tuple[Rates, int]:
    work = work or [1.0] * len(rates)
    for moves in range(1000):
        move = propose(rates, work, cost_s=lambda _peer, _stage: cost_s)
        if move is None:
            return rates, moves
        rates = moved(rates, work, move)
    raise AssertionError("moves without end")


def test_replicas_spread_over_the_stages() -> None:
    rates, moves = settled(stages(4, 1, 1))
    assert ([len(stage) for stage in rates], moves) == ([2, 2, 2], 2)
    assert [len(stage) for stage in settled(stages(9, 1, 1, 1))[0]] == [3, 3, 3, 3]
    assert settled(stages(2, 1, 1))[1] == 0  # to move would only turn it round


def test_a_stage_with_more_work_gets_more_replicas() -> None:
    rates = stages(4, 4)
    rates[1] = dict.fromkeys(rates[1], 1 / 3)
    assert [len(stage) for stage in settled(rates, [1.0, 3.0])[0]] == [2, 6]


def test_nobody_moves_who_must_not_or_whose_move_costs_more_than_it_brings() -> None:
    rates = stages(4, 1)
    assert propose(rates, [1.0, 1.0], cost_s=lambda _peer, _stage: None) is None
    assert propose(rates, [1.0, 1.0], cost_s=lambda _peer, _stage: 7200.0) is None
    only = sorted(rates[0])[2]
    move = propose(rates, [1.0, 1.0], cost_s=lambda peer, _stage: 1.0 if peer == only else None)
    assert move is not None
    assert (move.peer, move.origin, move.target, move.gain) == (only, 0, 1, 1.0)


def test_an_empty_stage_is_filled_first_and_the_last_of_one_stays() -> None:
    move = propose(stages(2, 0, 1), [1.0] * 3, cost_s=lambda _peer, _stage: 60.0)
    assert move is not None
    assert (move.target, move.gain) == (1, float("inf"))
    assert propose(stages(1, 0), [1.0] * 2, cost_s=lambda _peer, _stage: 60.0) is None


@given(
    st.lists(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), min_size=2, max_size=6),
    st.lists(st.floats(0.2, 5), min_size=6, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_every_move_lifts_the_slowest_that_it_touches_and_they_end(
    speeds: list[list[float]], work: list[float]
) -> None:
    numbers = iter(range(1000))
    rates = [{PeerId(f"p{next(numbers):03}"): rate for rate in stage} for stage in speeds]
    work = work[: len(rates)]
    for _ in range(200):
        move = propose(rates, work, cost_s=lambda _peer, _stage: 0.0)
        if move is None:
            return
        after = moved(rates, work, move)
        before_slow = sum(rates[move.target].values())
        assert before_slow == min(sum(stage.values()) for stage in rates)
        assert min(sum(after[move.origin].values()), sum(after[move.target].values())) >= (
            before_slow * (1 + LEAST_GAIN) * (1 - 1e-9)
        )
        assert all(after)
        rates = after
    raise AssertionError("moves without end")
