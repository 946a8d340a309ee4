"""One router, step by step: charges, corrections, failures. Many of them: test_router_swarm."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.identity import PeerId
from stage.messages import Load
from stage.router import BACKOFF_FIRST_S, BACKOFF_MOST_S, Choice, Router

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def router_of(*peers: PeerId, seed: int = 0) -> Router:
    router = Router(random.Random(seed))
    router.update(dict.fromkeys(peers, 0.0))
    return router


def choose(router: Router, now: float = 0.0) -> Choice:
    choice = router.choose(now)
    assert choice is not None
    return choice


def test_equal_replicas_share_equally_from_the_first() -> None:
    router = router_of(A, B, C)
    assert Counter(choose(router).peer for _ in range(30)) == {A: 10, B: 10, C: 10}


@pytest.mark.parametrize("how", ["busy", "failed"])
def test_one_that_comes_back_is_not_flooded_either(how: str) -> None:
    router = router_of(A, B)

    def work(now: float, microbatches: int) -> Counter[PeerId]:
        asked = Counter[PeerId]()
        for _ in range(microbatches):
            choice = choose(router, now)
            asked[choice.peer] += 1
            router.answered(choice, now, 0.1, Load(4, 0, 0.1))
        return asked

    work(0.0, 20)
    choice = router.choose(0.0, exclude={A})
    assert choice is not None
    if how == "busy":
        router.busy(choice, 0.0, 20.0)
    else:
        router.failed(choice, 0.0)
    assert work(0.5, 400) == {A: 400}
    assert work(30.0, 30)[B] <= 16


def test_a_wrong_first_guess_is_corrected_exactly() -> None:
    """Many in flight before anything is known: each was charged the guess, each gets it back."""
    router = router_of(A)
    early = [choose(router) for _ in range(8)]
    router.update({A: 0.0, B: 0.0})  # enters at A's charged level
    for choice in early:
        router.answered(choice, 0.0, 0.1, Load(4, 0, 0.1))
    # A owes 0.8 s for eight microbatches and B stands at 8.0: A is to be asked until it is level.
    turns = []
    for _ in range(60):
        choice = choose(router, 1.0)
        turns.append(choice.peer)
        router.answered(choice, 1.0, 0.1, Load(4, 0, 0.1))
    assert turns == [A] * 60


def test_an_unused_choice_costs_nothing() -> None:
    router = router_of(A, B)
    first = choose(router)
    router.answered(first, 1.0, 1.0, Load(4, 0, 1.0))
    other = choose(router)
    assert other.peer != first.peer
    for _ in range(10):
        router.unused(other)
        assert choose(router).peer == other.peer


def test_busy_is_no_failure() -> None:
    router = router_of(A, B)
    first = choose(router, 5.0)
    router.busy(first, 5.0, 0.05)
    others = {choose(router, 5.01).peer for _ in range(5)}
    assert others == {B} if first.peer == A else {A}
    assert first.peer in {choose(router, 5.06).peer for _ in range(7)}


def test_all_busy_says_how_long_to_wait() -> None:
    router = router_of(A, B)
    for _ in range(2):
        choice = choose(router, 1.0)
        router.busy(choice, 1.0, 0.5 if choice.peer == A else 2.0)
    assert router.choose(1.1) is None
    assert router.wait_s(1.1) == pytest.approx(0.4)
    assert router.wait_s(100.0) == 0.0
    assert choose(router, 1.6).peer == A
    assert router_of().wait_s(0.0) is None
    assert router_of().empty()


def test_failures_back_off_longer_each_time_up_to_a_limit() -> None:
    router = router_of(A)
    now, waits = 0.0, []
    for _ in range(2000):  # far more than a float's exponent has room for
        router.failed(choose(router, now), now)
        wait = router.wait_s(now)
        assert wait is not None
        waits.append(wait)
        now += wait
    assert 0.75 * BACKOFF_FIRST_S <= waits[0] <= 1.25 * BACKOFF_FIRST_S
    assert waits[1] > 1.2 * BACKOFF_FIRST_S
    assert all(0.75 * BACKOFF_MOST_S <= wait <= 1.25 * BACKOFF_MOST_S for wait in waits[6:])


def test_all_that_was_in_flight_fails_as_one() -> None:
    router = router_of(A)
    choices = [choose(router) for _ in range(8)]
    for number, choice in enumerate(choices):
        router.failed(choice, 0.001 * number)
    wait = router.wait_s(0.0)
    assert wait is not None
    assert wait <= 1.25 * BACKOFF_FIRST_S


def test_one_failure_is_forgiven_by_a_fresh_record_a_series_only_by_an_answer() -> None:
    router = router_of(A)
    router.failed(choose(router, 0.0), 0.0)
    router.update({A: 0.0})  # the old record says nothing new
    assert router.choose(0.0) is None
    router.update({A: 1.0})
    second = choose(router, 0.0)
    router.failed(second, 0.0)
    router.update({A: 2.0})
    assert router.choose(0.0) is None, "a record is cheap: two failures weigh more"
    wait = router.wait_s(0.0)
    assert wait is not None
    router.answered(choose(router, wait), wait, 0.1, Load(1, 0, 0.1))
    router.failed(choose(router, wait), wait)
    again = router.wait_s(wait)
    assert again is not None
    assert again <= 1.25 * BACKOFF_FIRST_S, "an answer wipes the slate"


def test_who_left_the_roster_is_forgotten_and_late_replies_of_it_change_nothing() -> None:
    router = router_of(A, B)
    gone = [choose(router) for _ in range(4)]
    router.update({B: 1.0})
    for choice in gone:
        if choice.peer == A:
            router.accepted(choice, 0.0, Load(5))
            router.answered(choice, 1.0, 1.0, Load(5, 0, 1.0))
            router.busy(choice, 0.0, 1.0)
            router.failed(choice, 0.0)
            router.unused(choice)
    assert {choose(router).peer for _ in range(5)} == {B}
    router.update({})
    assert router.empty()
    assert router.choose(0.0) is None


def test_exclusion() -> None:
    router = router_of(A, B)
    assert {router.choose(0.0, {A}).peer for _ in range(4)} == {B}  # type: ignore[union-attr]
    assert router.choose(0.0, {A, B}) is None


def test_room_is_known_room_less_what_was_sent() -> None:
    router = router_of(A)
    first = choose(router)
    assert not first.room, "nothing is known yet"
    router.accepted(first, 0.0, Load(2))
    assert [choose(router).room for _ in range(3)] == [True, True, False]
    router.answered(first, 0.1, 0.1, Load(1, 0, 0.1))
    last = choose(router)
    assert last.room
    router.accepted(last, 0.1, Load(9))
    router.busy(last, 0.0, 0.0)
    assert not choose(router).room


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("cabfux"), st.integers(0, 3), st.floats(0.0, 3.0)), max_size=60),
    st.integers(0, 2**32),
)
def test_any_course_of_events_keeps_time_forward_and_somebody_reachable(
    course: list[tuple[str, int, float]], seed: int
) -> None:
    """Whatever replies come, the router never says to wait for ever while the roster has a replica."""
    peers = [PeerId(str(number)) for number in range(3)]
    router = router_of(*peers, seed=seed)
    now = 0.0
    open_: list[Choice] = []
    for word, number, amount in course:
        now += amount / 10
        choice = open_.pop(number % len(open_)) if open_ and word in "abfu" else None
        if word == "c" and (chosen := router.choose(now)) is not None:
            open_.append(chosen)
        elif word == "x":
            router.update(dict.fromkeys(peers[: number or 3], now))
        elif choice is not None:
            match word:
                case "a":
                    router.answered(choice, now, amount, Load(number, number, amount / 2))
                case "b":
                    router.busy(choice, now, amount)
                case "f":
                    router.failed(choice, now)
                case _:
                    router.unused(choice)
    wait = router.wait_s(now)
    assert wait is not None
    assert 0 <= wait <= 1.25 * BACKOFF_MOST_S
    assert router.choose(now + wait + 1e-6) is not None


def test_who_knows_the_microbatch_is_asked_first_unless_it_failed() -> None:
    router = router_of(A, B)
    for _ in range(5):
        choice = router.choose(0.0, prefer=B)
        assert choice is not None
        assert choice.peer == B
    router.busy(choice, 0.0, 5.0)
    again = router.choose(1.0, prefer=B)
    assert again is not None
    assert again.peer == B, "who is busy joins what it works on all the same"
    router.failed(again, 1.0)
    for prefer in (B, C):
        other = router.choose(1.0, prefer=prefer)
        assert other is not None
        assert other.peer == A


def test_an_answer_that_was_kept_says_nothing_of_speed() -> None:
    router = router_of(A)
    router.answered(choose(router), 1.0, 1.0, Load(4, 0, 0.5))
    patience = router.patience_s(A, 0.0, 100.0)
    for _ in range(50):
        router.answered(choose(router), 2.0, None, Load(4, 0, 0.5))
    assert router.patience_s(A, 0.0, 100.0) == patience


def test_patience_follows_what_answers_take_between_its_bounds() -> None:
    router = router_of(A)
    assert router.patience_s(A, 10.0, 120.0) == 120.0, "nothing is known yet"
    for _ in range(40):
        router.answered(choose(router), 0.0, 5.0, Load(4, 0, 0.1))
    assert 30.0 <= router.patience_s(A, 10.0, 120.0) < 40.0
    assert router.patience_s(A, 50.0, 120.0) == 50.0
    assert router.patience_s(A, 1.0, 20.0) == 20.0
    for number in range(40):
        router.answered(choose(router), 0.0, 1.0 + 8.0 * (number % 2), Load(4, 0, 0.1))
    assert router.patience_s(A, 10.0, 120.0) > 45.0, "answers that vary are waited for longer"
