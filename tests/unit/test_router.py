"""The router in virtual time: shares follow speed, nobody is flooded, failures are left and forgiven."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p.identity import PeerId
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


class Simulation:
    """A caller with ``credits`` microbatches in flight and replicas that work on one at a time or more."""

    def __init__(self, router: Router, seconds: dict[PeerId, float], credits: int) -> None:
        self.router = router
        self.seconds = seconds
        self.now = 0.0
        self.asked: Counter[PeerId] = Counter()
        self.order: list[PeerId] = []
        self._ends: list[tuple[float, int, Choice, float]] = []
        self._count = itertools.count()
        self._free = credits

    def run(self, microbatches: int) -> None:
        for _ in range(microbatches):
            while self._free == 0 or (choice := self.router.choose(self.now)) is None:
                self.now, _, ended, began = heapq.heappop(self._ends)
                self.router.answered(ended, self.now - began, 4)
                self._free += 1
            self._free -= 1
            self.asked[choice.peer] += 1
            self.order.append(choice.peer)
            end = self.now + self.seconds[choice.peer]
            heapq.heappush(self._ends, (end, next(self._count), choice, self.now))


@pytest.mark.parametrize("credits", [1, 4, 16])
def test_twice_as_fast_gets_about_twice_the_work(credits: int) -> None:
    simulation = Simulation(router_of(A, B), {A: 0.1, B: 0.2}, credits)
    simulation.run(600)
    assert simulation.asked[A] / simulation.asked[B] == pytest.approx(2.0, rel=0.1)
    # Interleaved, not in blocks.
    longest = max(len(list(run)) for _, run in itertools.groupby(simulation.order[-300:]))
    assert longest <= 4


@settings(deadline=None)
@given(
    st.lists(st.floats(0.02, 2.0), min_size=2, max_size=5),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
def test_shares_are_inverse_to_response_times(times: list[float], credits: int, seed: int) -> None:
    peers = [PeerId(str(number)) for number in range(len(times))]
    simulation = Simulation(router_of(*peers, seed=seed), dict(zip(peers, times, strict=True)), credits)
    simulation.run(200)  # until every average is known
    simulation.asked.clear()
    simulation.run(1000)
    speed = sum(1 / t for t in times)
    for peer, t in zip(peers, times, strict=True):
        fair = 1000 / t / speed
        assert abs(simulation.asked[peer] - fair) <= 0.2 * fair + 5 + credits


def test_equal_replicas_share_equally_from_the_first() -> None:
    router = router_of(A, B, C)
    assert Counter(choose(router).peer for _ in range(30)) == {A: 10, B: 10, C: 10}


def test_a_newcomer_is_not_flooded() -> None:
    router = router_of(A, B)
    simulation = Simulation(router, {A: 0.1, B: 0.1, C: 0.1}, 4)
    simulation.run(500)
    router.update({A: 1.0, B: 1.0, C: 1.0})
    simulation.asked.clear()
    simulation.run(30)
    assert 6 <= simulation.asked[C] <= 14
    assert "ccc" not in "".join(simulation.order[-30:])


@pytest.mark.parametrize("how", ["busy", "failed"])
def test_one_that_comes_back_is_not_flooded_either(how: str) -> None:
    router = router_of(A, B)

    def work(now: float, microbatches: int) -> Counter[PeerId]:
        asked = Counter[PeerId]()
        for _ in range(microbatches):
            choice = choose(router, now)
            asked[choice.peer] += 1
            router.answered(choice, 0.1, 4)
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
        router.answered(choice, 0.1, 4)
    # A owes 0.8 s for eight microbatches and B stands at 8.0: A is to be asked until it is level.
    turns = [choose(router, 1.0).peer for _ in range(60)]
    assert turns == [A] * 60


def test_an_unused_choice_costs_nothing() -> None:
    router = router_of(A, B)
    first = choose(router)
    router.answered(first, 1.0, 4)
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
    router.answered(choose(router, wait), 0.1, 1)
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
            router.room(choice, 5)
            router.answered(choice, 1.0, 5)
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
    router.room(first, 2)
    assert [choose(router).room for _ in range(3)] == [True, True, False]
    router.answered(first, 0.1, 1)
    last = choose(router)
    assert last.room
    router.room(last, 9)
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
                    router.answered(choice, amount, number)
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
