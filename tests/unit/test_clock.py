"""The step clock: the newest signed count of each trainer, whatever the order it is heard in."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.errors import RemoteError
from p2p.identity import Identity, PeerId
from stage.clock import MAX_READINGS, Reading, StepClock, readings_from_wire

TRAINERS = [Identity.generate(bytes([number]) * 32) for number in range(1, 4)]
STRANGER = Identity.generate(bytes([9]) * 32)
LISTED = frozenset(who.peer_id for who in TRAINERS)


def made(target_batch: int = 10) -> StepClock:
    return StepClock("run", LISTED, target_batch)


@cache
def reading(who: int, samples: int, run: str = "run") -> Reading:
    return Reading.signed(TRAINERS[who], run, samples)


def test_the_step_is_the_sum_over_trainers_by_the_target_batch() -> None:
    clock = made()
    assert (clock.samples, clock.step, clock.readings) == (0, 0, [])
    assert not clock.observe([reading(0, 6)])
    assert clock.observe([reading(1, 5)])
    assert (clock.samples, clock.step) == (11, 1)
    assert not clock.observe([reading(2, 8)])
    assert clock.observe([reading(2, 29)])
    assert clock.step == 4


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60)), max_size=12), st.randoms())
def test_order_and_repetition_do_not_matter_and_advances_are_told(
    heard: list[tuple[int, int]], random: Any
) -> None:
    straight, shuffled = made(), made()
    for who, samples in heard:
        before = straight.step
        assert straight.observe([reading(who, samples)]) == (straight.step > before)
    twice = heard * 2
    random.shuffle(twice)
    shuffled.observe([reading(who, samples) for who, samples in twice])
    assert shuffled.samples == straight.samples
    expected = sum(max((s for w, s in heard if w == who), default=0) for who in range(3))
    assert straight.samples == expected


def test_a_count_that_went_back_is_old_news() -> None:
    clock = made()
    clock.observe([reading(0, 25)])
    assert not clock.observe([reading(0, 24), Reading(TRAINERS[0].peer_id, 3, b"not even signed")])
    assert clock.samples == 25


@pytest.mark.parametrize(
    "forged",
    [
        Reading.signed(STRANGER, "run", 99),
        reading(0, 99, run="another"),
        Reading(TRAINERS[0].peer_id, 99, reading(0, 98).signature),
        Reading(TRAINERS[0].peer_id, 99, reading(1, 99).signature),
        Reading(PeerId("nonsense"), 99, bytes(64)),
    ],
)
def test_a_forged_reading_condemns_the_header_and_moves_nothing(forged: Reading) -> None:
    clock = made()
    clock.observe([reading(0, 9)])
    with pytest.raises(RemoteError, match="clock"):
        clock.observe([reading(1, 31), forged])
    assert clock.samples == 9
    assert clock.observe([reading(1, 31)]), "the advance must still be told to somebody"


def test_readings_travel_and_the_last_changed_go_first() -> None:
    many = [Identity.generate(number.to_bytes(32, "big")) for number in range(1, MAX_READINGS + 3)]
    clock = StepClock("run", frozenset(who.peer_id for who in many), 10)
    clock.observe([Reading.signed(who, "run", 1) for who in many])
    clock.observe([Reading.signed(many[0], "run", 2)])
    sent = clock.readings
    assert len(sent) == MAX_READINGS
    assert many[0].peer_id in {r.trainer for r in sent}
    assert many[1].peer_id not in {r.trainer for r in sent}
    other = StepClock("run", frozenset(who.peer_id for who in many), 10)
    other.observe(readings_from_wire([r.to_wire() for r in sent]))
    assert other.samples == MAX_READINGS + 1


@settings(deadline=None, max_examples=50)
@given(st.randoms(use_true_random=False))
def test_replicas_that_miss_headers_never_run_ahead_or_back_and_meet_again(random: Any) -> None:
    """Three trainers: one is gone for ever half way, one tells old counts; each replica hears half of it."""
    truth, told = [0, 0, 0], made()
    replicas = [made() for _ in range(4)]
    for tick in range(60):
        who = random.randrange(3)
        if who == 0 and tick > 30:
            continue  # gone, and its count stays what it was
        truth[who] += random.randrange(8)
        said = truth[who] if who != 1 or random.random() < 0.5 else random.randrange(truth[who] + 1)
        told.observe([reading(who, said)])
        header = told.readings
        for replica in replicas:
            if random.random() < 0.5:
                before = replica.step
                advanced = replica.observe(header)
                assert replica.step >= before
                assert advanced == (replica.step > before)
                assert replica.samples <= sum(truth)
    for replica in replicas:
        replica.observe(told.readings)
    assert {replica.step for replica in replicas} == {told.step}


GOOD = reading(0, 5).to_wire()


@pytest.mark.parametrize(
    "value",
    [
        None, {}, "x", [None], [GOOD[:2]], [[*GOOD, 0]], [[b"x", 5, GOOD[2]]], [[GOOD[0], -1, GOOD[2]]],
        [[GOOD[0], 2**63, GOOD[2]]], [[GOOD[0], True, GOOD[2]]], [[GOOD[0], 5.0, GOOD[2]]],
        [[GOOD[0], 5, b"short"]], [[GOOD[0], 5, "x" * 64]], [GOOD] * (MAX_READINGS + 1),
    ],
)  # fmt: skip
def test_bad_readings_are_remote_errors(value: Any) -> None:
    with pytest.raises(RemoteError):
        readings_from_wire(value)


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=65), max_size=4)
        | st.integers(),
        min_size=1,
        max_size=3,
    )
)
def test_nonsense_is_a_remote_error(value: Any) -> None:
    try:
        readings = readings_from_wire(value)
    except RemoteError:
        return
    with pytest.raises(RemoteError):
        made().observe(readings)
