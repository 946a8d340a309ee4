"""The queue in virtual time: fair, paced, patient with those who drop out, and never more than is free."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from agorad.authority.queue import Place, Queue
from agorad.run import Admission
from p2p.errors import Refused


def _queue(**rules: Any) -> Queue:
    return Queue(Admission(**rules))


def _filled(count: int, **rules: Any) -> Queue:
    queue = _queue(**rules)
    for index in range(count):
        queue.enter(f"p{index}", f"a{index}", float(index))
    return queue


def test_first_come_first_served_as_far_as_there_is_room() -> None:
    queue = _filled(5)
    assert queue.turns(10, free=2, paused=False) == ["p0", "p1"]
    assert queue.turns(10, free=0, paused=False) == []
    assert queue.turns(10, free=9, paused=True) == []
    queue.granted("p0", 10)
    assert queue.turns(10, free=1, paused=False) == ["p1"]


def test_a_pace_lets_one_in_at_a_time_and_says_when() -> None:
    queue = _filled(4, joins_per_minute=6)
    assert queue.turns(10, free=9, paused=False) == ["p0"]
    queue.granted("p0", 10)
    assert queue.turns(19.9, free=9, paused=False) == []
    assert queue.wait_s(13) == pytest.approx(7)
    views = queue.views(13, free=9, paused=False)
    assert [views[f"p{i}"].position for i in (1, 2, 3)] == [1, 2, 3]
    assert [views[f"p{i}"].eta_s for i in (1, 2, 3)] == pytest.approx([7, 17, 27])
    assert queue.turns(20, free=9, paused=False) == ["p1"]


def test_the_pace_counts_from_the_last_that_any_authority_let_in() -> None:
    queue = _filled(3, joins_per_minute=6)
    queue.heard(8.0)
    assert queue.turns(10, free=9, paused=False) == []
    assert queue.wait_s(10) == pytest.approx(8)
    assert queue.turns(18, free=9, paused=False) == ["p0"]
    queue.granted("p0", 18)
    queue.heard(17.9)
    assert queue.wait_s(18) == pytest.approx(10)


def test_a_full_run_estimates_from_recent_grants() -> None:
    queue = _filled(3)
    assert queue.views(5, free=0, paused=False)["p0"].eta_s is None  # nobody knows
    for index in range(5):
        queue.enter(f"q{index}", "a", 0.0)
        queue.granted(f"q{index}", 100.0 * index)
    view = queue.views(500, free=0, paused=False)["p1"]
    assert (view.position, view.waitlisted, view.paused) == (2, True, False)
    assert view.eta_s == pytest.approx(200)
    assert queue.views(500, free=0, paused=True)["p1"].eta_s is None


def test_who_drops_out_keeps_the_place_for_a_while_and_is_passed_over() -> None:
    queue = _filled(3, place_kept_s=300)
    queue.drop("p0", 10)
    assert queue.turns(11, free=1, paused=False) == ["p1"]
    assert "p0" not in queue.views(11, free=1, paused=False)
    queue.enter("p0", "a0", 300)
    assert queue.turns(300, free=1, paused=False) == ["p0"]
    queue.drop("p0", 300)
    assert queue.expire(600) == []
    assert [place.peer for place in queue.expire(601)] == ["p0"]
    queue.enter("p0", "a0", 602)
    assert [place.peer for place in queue.places] == ["p1", "p2", "p0"]


def test_places_survive_the_authority() -> None:
    before = _filled(3)
    after = _queue(place_kept_s=300)
    after.restore(reversed(before.places), 1000)
    after.enter("new", "b", 1001)
    after.enter("p2", "a2", 1002)
    assert after.turns(1003, free=1, paused=False) == ["p2"]
    assert after.views(1003, free=1, paused=False)["new"].position == 4
    assert {place.peer for place in after.expire(1301)} == {"p0", "p1"}


def test_a_place_belongs_to_an_account() -> None:
    queue = _filled(2)
    queue.drop("p0", 5)
    queue.enter("p0", "another", 6)
    assert queue.turns(7, free=1, paused=False) == ["p1"]


def test_limits_are_told() -> None:
    queue = _filled(2, queue_limit=2, queue_timeout_s=100, max_download_s=50)
    with pytest.raises(Refused) as no:
        queue.enter("p2", "a", 3)
    assert (no.value.code, no.value.retry_after) == ("queue_full", 60.0)
    queue.enter("p1", "a1", 4)  # it has a place
    assert queue.overdue("p0", 100) is None
    out = queue.overdue("p0", 101)
    assert out is not None
    assert out.code == "queue_timeout"
    queue.progress("p0", 10, finished=False, eta_s=40)
    with pytest.raises(Refused) as no:
        queue.progress("p0", 10, finished=False, eta_s=41)
    assert no.value.code == "download_too_slow"
    queue.progress("p1", 10, finished=True, eta_s=None)
    queue.progress("p1", 1000, finished=False, eta_s=1e6)  # it holds the state: nothing can be too slow


class Crowd(RuleBasedStateMachine):
    """A run of three slots, against a list that anybody can follow."""

    peers = Bundle("peers")

    def __init__(self) -> None:
        super().__init__()
        self.queue = _queue(place_kept_s=100, queue_limit=8)
        self.now = 0.0
        self.model: list[list[Any]] = []  # [peer, open, seen] in order
        self.inside: set[str] = set()
        self.free = 3

    @rule(target=peers, name=st.integers(0, 12))
    def known(self, name: int) -> str:
        return f"p{name}"

    @rule(peer=peers)
    def enters(self, peer: str) -> None:
        if peer in self.inside:
            return
        row = next((row for row in self.model if row[0] == peer), None)
        if row is None and len(self.model) >= 8:
            with pytest.raises(Refused):
                self.queue.enter(peer, "a", self.now)
            return
        self.queue.enter(peer, "a", self.now)
        if row is None:
            self.model.append([peer, True, self.now])
        else:
            row[1] = True

    @rule(peer=peers)
    def drops(self, peer: str) -> None:
        self.queue.drop(peer, self.now)
        for row in self.model:
            if row[0] == peer:
                row[1:] = [False, self.now]

    @rule(seconds=st.floats(0.1, 80))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        gone = {row[0] for row in self.model if not row[1] and self.now - row[2] > 100}
        assert {place.peer for place in self.queue.expire(self.now)} == gone
        self.model = [row for row in self.model if row[0] not in gone]

    @rule()
    def somebody_is_called(self) -> None:
        turns = self.queue.turns(self.now, free=self.free, paused=False)
        assert turns == [row[0] for row in self.model if row[1]][: self.free]
        if turns:
            peer = turns[0]
            self.queue.granted(peer, self.now)
            assert peer not in self.inside
            self.inside.add(peer)
            self.free -= 1
            self.model = [row for row in self.model if row[0] != peer]

    @rule(peer=peers)
    def leaves_the_run(self, peer: str) -> None:
        if peer in self.inside:
            self.inside.remove(peer)
            self.free += 1

    @rule()
    def the_authority_restarts(self) -> None:
        places = [Place(p.peer, p.account, p.arrived, p.seen) for p in self.queue.places]
        self.queue = _queue(place_kept_s=100, queue_limit=8)
        self.queue.restore(places, self.now)
        for row in self.model:
            row[1:] = [False, self.now]

    @invariant()
    def order_is_kept(self) -> None:
        assert [place.peer for place in self.queue.places] == [row[0] for row in self.model]
        assert 0 <= self.free <= 3
        for peer, view in self.queue.views(self.now, free=self.free, paused=False).items():
            assert self.model[view.position - 1][0] == peer
            assert view.waitlisted == (self.free == 0)


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
