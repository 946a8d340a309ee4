"""Turns at the door: bounded, and fair between addresses."""

from __future__ import annotations

from collections import Counter

import attrs
from hypothesis import given
from hypothesis import strategies as st

from p2p.door import SOURCES, Arrivals, Door, crowding, source_of


class Handshake:
    """One that knows whether it had to go."""

    def __init__(self, addr: str) -> None:
        self.addr = addr
        self.gone = False

    def give_up(self) -> None:
        self.gone = True


def of(host: int) -> str:
    return f"/ip4/10.0.0.{host}/tcp/1"


def test_a_flood_from_one_address_leaves_the_others_theirs() -> None:
    door = Door(8)
    flood = [Handshake(of(1)) for _ in range(100)]
    assert [door.enter(one.addr, one.give_up) for one in flood].count(True) == 8
    others = [Handshake(of(host)) for host in range(2, 6)]
    assert all(door.enter(one.addr, one.give_up) for one in others)
    assert sum(one.gone for one in flood) == 4
    assert not any(one.gone for one in others)
    assert len(door) == 8


def test_those_that_began_first_stay() -> None:
    door = Door(4)
    flood = [Handshake(of(1)) for _ in range(4)]
    for one in flood:
        door.enter(one.addr, one.give_up)
    assert door.enter(of(2), Handshake(of(2)).give_up)
    assert [one.gone for one in flood] == [False, False, False, True]


def test_an_address_does_not_push_its_own_out() -> None:
    door = Door(2)
    first, second = Handshake(of(1)), Handshake(of(2))
    assert door.enter(first.addr, first.give_up)
    assert door.enter(second.addr, second.give_up)
    assert not door.enter(of(1), Handshake(of(1)).give_up)
    assert not door.enter(of(3), Handshake(of(3)).give_up)  # nobody has more than one
    assert not first.gone
    assert not second.gone
    door.leave(first.addr, first.give_up)
    door.leave(first.addr, first.give_up)
    assert door.enter(of(3), Handshake(of(3)).give_up)


def test_one_household_is_one_source() -> None:
    assert source_of("/ip6/2001:db8:1:2:3::4/tcp/1") == source_of("/ip6/2001:db8:1:2:ffff::/tcp/9")
    assert source_of("/ip6/2001:db8:1:2::1/tcp/1") != source_of("/ip6/2001:db8:1:3::1/tcp/1")
    assert source_of("/ip4/10.0.0.1/tcp/5") == "10.0.0.1"
    assert source_of("somewhere") == "somewhere"


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=200))
def test_never_more_than_there_are_places(script: list[tuple[int, bool]]) -> None:
    door = Door(6)
    inside: list[Handshake] = []
    for host, leaves in script:
        if leaves and inside:
            one = inside.pop(0)
            door.leave(one.addr, one.give_up)
        else:
            one = Handshake(of(host))
            if door.enter(one.addr, one.give_up):
                inside.append(one)
        inside = [one for one in inside if not one.gone]
        assert len(door) == len(inside) <= 6
        shares = Counter(one.addr for one in inside)
        assert all(shares.values())


def test_an_address_comes_often_and_then_no_faster_than_it_may() -> None:
    arrivals = Arrivals(4, 2.0)
    assert [arrivals.admit("a", 0.0) for _ in range(6)] == [True] * 4 + [False] * 2
    assert arrivals.admit("b", 0.0)
    assert [arrivals.admit("a", 1.0) for _ in range(3)] == [True, True, False]
    assert not arrivals.admit("a", 1.4)
    assert arrivals.admit("a", 1.5)  # what was refused has cost nothing
    assert [arrivals.admit("a", 100.0) for _ in range(5)] == [True] * 4 + [False]


def test_arrivals_of_many_addresses_are_forgotten_longest_ago_first() -> None:
    arrivals = Arrivals(1, 0.001)
    for number in range(SOURCES):
        assert arrivals.admit(str(number), 0.0)
    assert not arrivals.admit("0", 1.0)  # known, and the newest by now
    assert arrivals.admit("new", 1.0)
    assert not arrivals.admit("0", 1.0)
    assert arrivals.admit("1", 1.0)


@attrs.frozen
class Guest:
    source: str
    number: int


def test_room_is_made_by_the_address_that_has_most() -> None:
    guests = [Guest(source, number) for number, source in enumerate("abaacab")]
    assert crowding(guests, "d") == Guest("a", 5)
    assert crowding(guests, "b") == Guest("a", 5)
    assert crowding(guests, "a") is None
    assert crowding([Guest("a", 0), Guest("b", 1)], "c") is None
    assert crowding([], "c") is None
